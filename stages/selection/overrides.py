"""What people decided about single rows: kept or dropped, whatever scores say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from stages.errors import ConfigError
from stages.rows import canonical_json
from stages.sources.readers import BadRecord, records

KEPT_BY = "kept: override"
DROPPED_BY = "override"


class Override(NamedTuple):
    """A decision about one row.

    Attributes:
        decision: what becomes of it.
        reviewer: who decided, None where that isn't said.
        why: their reason, None where that isn't said.
    """

    decision: Literal["keep", "drop"]
    reviewer: str | None
    why: str | None

    @property
    def reason(self) -> str:
        """The row's reason in the decisions."""
        who = f"by {self.reviewer}" if self.reviewer else None
        code = KEPT_BY if self.decision == "keep" else DROPPED_BY
        return ": ".join(text for text in (code, who, self.why) if text)


def read_overrides(path: str) -> dict[str, Override]:
    """Decisions by row id, of a JSON, JSON lines, CSV or Parquet file.

    Records have `id`, `decision` (keep or drop), and may have `reviewer` and `reason`.

    Raises:
        ConfigError: the file isn't there, or a record of it is no decision, naming the record.
    """
    found: dict[str, Override] = {}
    for record in records(path, file=PurePosixPath(path).name):
        where = f"selection.overrides: {record.file}, record {record.record}"
        if isinstance(record, BadRecord):
            raise ConfigError(f"{where} can't be read: {record.reason}")
        row = _text(record.value, "id", where)
        decision = _text(record.value, "decision", where)
        if row is None or decision is None:
            raise ConfigError(f"{where} has no {'id' if row is None else 'decision'}")
        if decision not in ("keep", "drop"):
            raise ConfigError(f"{where}: decision is {decision!r}; it must be keep or drop")
        if row in found:
            raise ConfigError(f"{where}: {row} is decided twice; leave one")
        said = (_text(record.value, name, where) for name in ("reviewer", "reason"))
        found[row] = Override("keep" if decision == "keep" else "drop", *said)
    return found


def overrides_digest(overrides: Mapping[str, Override]) -> str:
    """What identifies decisions, wherever and in whichever form their file lies."""
    return hashlib.sha256(canonical_json(sorted(overrides.items())).encode()).hexdigest()


def _text(record: Mapping[str, Any], name: str, where: str) -> str | None:
    value = record.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} is no text: {value!r}")
    return value.strip() or None
