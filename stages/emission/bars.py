"""Charts of the report as the template takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Chart:
    """A small chart with a title and a note."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Bar:
    """A line of a bar chart; positions are percentages of its width."""

    name: str
    width: float
    note: str
    low: float | None = None
    high: float | None = None
    cap: float | None = None


def bars_of(counts: Mapping[str, int], most: int = 12) -> list[Bar]:
    """A bar for each count, in order; what comes after the first `most` is summed up."""
    items = list(counts.items())
    if len(items) > most:
        rest = sum(count for _, count in items[most - 1 :])
        items = [*items[: most - 1], (f"{len(items) - most + 1} others", rest)]
    widest = max(max((count for _, count in items), default=0), 1)
    return [Bar(name, 100 * count / widest, f"{count:,}") for name, count in items]
