"""What the analyses share on the way out: tables, figures, small charts, files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from stages.errors import ConfigError
from stages.storage import Store

_BARS = "▁▂▃▄▅▆▇█"


def plain_table(
    left: Sequence[str],
    right: Sequence[str],
    last: Sequence[str],
    lines: Iterable[Sequence[str]],
) -> Table:
    """A table of columns of words, then of numbers, then of words again.

    Names of sources and models are shown as they are: square brackets in them are no markup.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for names, justify in ((left, "left"), (right, "right"), (last, "left")):
        for name in names:
            table.add_column(Text(name), justify="right" if justify == "right" else "left")
    for cells in lines:
        table.add_row(*map(Text, cells))
    return table


def sparkline(rates: Sequence[float]) -> str:
    """One bar a rate in [0, 1], in eight heights."""
    return "".join(_BARS[min(int(rate * len(_BARS)), len(_BARS) - 1)] for rate in rates)


def figure(value: float) -> str:
    """A number in four digits; the sign of infinity, and a dash for NaN."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{share:.1%}"


def finite(value: float | None) -> float | None:
    """The number as JSON can hold it: None for infinity and NaN."""
    return value if value is not None and math.isfinite(value) else None


def write_file(url: str, data: bytes) -> None:
    """Write a file that a person asked for.

    Raises:
        ConfigError: it can't be written there.
    """
    folder, _, name = url.rpartition("/")
    store = Store(folder or ("/" if url.startswith("/") else "."))
    if not name or store.names(name):
        raise ConfigError(f"{url} is a folder; name the file to write")
    try:
        store.write_bytes(name, data)
    except OSError as error:
        raise ConfigError(f"cannot write {url}: {error.strerror or error}") from error


def json_bytes(value: object) -> bytes:
    """A report as readable JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
