"""Rows shown in the report, as readable text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.emission.gather import Gathered
from stages.emission.sample import FloatArray, IntArray
from stages.rows import Message, key_hash

DIFFICULTY = (
    "ifd_effective",
    "ifd",
    "budgeted_pass_rate",
    "pass_rate",
    "p_think",
    "loss_conditional",
)
"""Scores by which rows are ranked, the first that a run has."""
LOW_IS_HARD = frozenset({"budgeted_pass_rate", "pass_rate"})
LONGEST = 1_500
"""Characters of a turn that are shown."""


SHOWN = 20
"""Hardest rows, and easiest, that the report shows."""


@dataclass(frozen=True)
class Ranked:
    """The hardest and the easiest rows: row numbers, hardest (easiest) first.

    Attributes:
        score: the column that they were ranked by, None where there is none.
        values: what they were ranked by, float64 [n], NaN where a row has none.
        hardest: int64.
        easiest: int64.
    """

    score: str | None
    values: FloatArray
    hardest: IntArray
    easiest: IntArray

    @property
    def numbers(self) -> IntArray:
        """All of them, distinct and ascending."""
        return np.union1d(self.hardest, self.easiest).astype(np.int64)


@dataclass(frozen=True)
class Example:
    """One row: what is trained on, what it was before where it was rewritten, what became of it."""

    id: str
    source: str
    score: float | None
    turns: list[tuple[str, str]]
    before: list[tuple[str, str]] | None
    fate: str = "emitted"


def difficulty_column(scores: Mapping[str, npt.NDArray[Any]]) -> str | None:
    """The first of DIFFICULTY that has values."""
    return next((name for name in DIFFICULTY if name in scores and _any(scores[name])), None)


def extremes(values: npt.NDArray[Any], low_is_hard: bool, count: int) -> tuple[IntArray, IntArray]:
    """Numbers of the hardest rows, hardest first, and of the easiest, easiest first.

    Args:
        values: a score of all rows [n], NaN where there is none; ties go by row number.
        low_is_hard: whether low values are hard.
        count: how many of each; never the same row twice.
    """
    known = np.flatnonzero(np.isfinite(values)).astype(np.int64)
    hard = -values[known] if low_is_hard else values[known]
    ranked = known[np.lexsort((known, -hard))]
    return ranked[:count], ranked[min(count, len(ranked)) :][::-1][:count]


def shown_examples(
    gathered: Gathered,
    rows: IntArray,
    emitted: IntArray,
    keep: npt.NDArray[np.bool_],
    values: FloatArray,
) -> list[Example]:
    """The rows as text, each with what became of it.

    Args:
        gathered: of the run; the rows are among those shown.
        rows: row numbers, int64.
        emitted: distinct row numbers, int64.
        keep: what selection kept, bool [n].
        values: what the rows were ranked by, float64 [n].
    """
    if not len(rows):
        return []
    examples = _examples(gathered.shown_rows(rows), None)
    inside = np.isin(rows, emitted)
    return [
        replace(
            one,
            score=float(values[row]),
            fate="emitted" if out else "selected" if keep[row] else "dropped",
        )
        for one, row, out in zip(examples, rows.tolist(), inside.tolist(), strict=True)
    ]


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
    return _examples(gathered.rows(chosen), difficulty_column(gathered.scores))


def _examples(table: pa.Table, score: str | None) -> list[Example]:
    nothing = [None] * table.num_rows
    values = table[score].to_pylist() if score and score in table.column_names else nothing
    originals: list[Any] = (
        table["original"].to_pylist() if "original" in table.column_names else nothing
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
