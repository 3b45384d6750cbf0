"""How much of a source may be unreadable where a command reads it without an ingest."""

from __future__ import annotations

from stages.errors import ConfigError
from stages.ingest.settings import IngestSettings
from stages.sources.settings import Source


def reject_limit(source: Source) -> float:
    """The largest share of its records that may be unreadable."""
    rate = source.max_reject_rate
    return IngestSettings().max_reject_rate if rate is None else rate


def check_mostly_read(source: Source, rows: int, rejected: int) -> None:
    """Refuse a source that mostly can't be read.

    Args:
        source: the source.
        rows: its readable records.
        rejected: its unreadable ones.

    Raises:
        ConfigError: it holds no row, or too many records that are none.
    """
    if rows == 0 or rejected > reject_limit(source) * (rows + rejected):
        raise ConfigError(
            f"sources: {source.name}: {rejected} of {rows + rejected} records can't be read; mend "
            "it, name its form, or raise its max_reject_rate"
        )
