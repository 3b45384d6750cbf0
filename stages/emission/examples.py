"""Rows shown in the report, as readable text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.emission.gather import Gathered
from stages.emission.sample import IntArray
from stages.rows import Message, key_hash

DIFFICULTY = ("ifd_effective", "ifd", "pass_rate")
LONGEST = 1_500
"""Characters of a turn that are shown."""


@dataclass(frozen=True)
class Example:
    """One emitted row: what is trained on, and what it was before where it was rewritten."""

    id: str
    source: str
    score: float | None
    turns: list[tuple[str, str]]
    before: list[tuple[str, str]] | None


def difficulty_column(gathered: Gathered) -> str | None:
    """The first of DIFFICULTY that has values."""
    found = gathered.scores
    return next((name for name in DIFFICULTY if name in found and _any(found[name])), None)


def extremes(
    gathered: Gathered, emitted: IntArray, count: int
) -> tuple[list[Example], list[Example]]:
    """The hardest and the easiest emitted rows (high IFD, or low pass rate, is hard).

    Args:
        gathered: of the run.
        emitted: distinct row numbers, int64.
        count: how many of each; never the same row twice.
    """
    name = difficulty_column(gathered)
    if name is None:
        return [], []
    scores = gathered.scores[name].astype(np.float64)
    known = emitted[np.isfinite(scores[emitted])]
    hard = scores[known] if name != "pass_rate" else -scores[known]
    ranked = known[np.lexsort((known, -hard))]
    hardest = ranked[:count]
    easiest = ranked[len(hardest) :][::-1][:count]
    return _examples(gathered, hardest, name), _examples(gathered, easiest, name)


def rewrites(gathered: Gathered, emitted: IntArray, seed: int, count: int) -> list[Example]:
    """Rewritten rows by lowest hash, one of each source in turn."""
    changed = emitted[gathered.rewritten[emitted]]
    if not len(changed):
        return []
    by_source: dict[str, list[tuple[int, int]]] = {}
    for numbers, table in gathered.chunks:
        inside = np.flatnonzero(np.isin(numbers, changed))
        ids, sources = table["id"].to_pylist(), table["source"].to_pylist()
        for i in inside.tolist():
            entry = (key_hash(f"show:{ids[i]}", seed), int(numbers[i]))
            by_source.setdefault(sources[i], []).append(entry)
    turns = [
        (place, source, row)
        for source, entries in by_source.items()
        for place, (_, row) in enumerate(sorted(entries)[:count])
    ]
    chosen = np.array([row for _, _, row in sorted(turns)[:count]], dtype=np.int64)
    return _examples(gathered, chosen, difficulty_column(gathered))


def _examples(gathered: Gathered, rows: IntArray, score: str | None) -> list[Example]:
    if not len(rows):
        return []
    table = gathered.rows(rows)
    values = table[score].to_pylist() if score in table.column_names else [None] * len(rows)
    originals: list[Any] = (
        table["original"].to_pylist() if "original" in table.column_names else [None] * len(rows)
    )
    texts = zip(
        table["id"].to_pylist(),
        table["source"].to_pylist(),
        values,
        table["effective"].to_pylist(),
        originals,
        strict=True,
    )
    return [
        Example(name, source, value, _turns(now), _turns(before) if before else None)
        for name, source, value, now, before in texts
    ]


def _turns(messages: list[Message]) -> list[tuple[str, str]]:
    shown = []
    for turn in messages:
        text = "\n".join(
            part
            for part in (turn.get("reasoning"), turn["content"], turn.get("tool_calls"))
            if part
        )
        cut = len(text) > LONGEST
        shown.append((turn["role"], text[:LONGEST].rstrip() + " …" if cut else text))
    return shown


def _any(values: Any) -> bool:
    return bool(np.isfinite(values).any())
