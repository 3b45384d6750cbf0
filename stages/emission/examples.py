"""Rows shown in the report, as readable text."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.emission.decisions import Decisions
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
SEARCHED = 60
"""Rows of each fate that can be searched in the report."""


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
    why: str = ""


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


def searched_rows(
    decisions: Decisions, emitted: IntArray, own: npt.NDArray[np.bool_], seed: int
) -> IntArray:
    """Numbers of emitted rows, of selected ones that weren't drawn, and of dropped ones.

    At most SEARCHED of each, those of lowest hash; the dropped ones take turns by reason.

    Args:
        decisions: of selection.
        emitted: distinct row numbers, int64.
        own: rows that aren't an anchor's, bool [n].
        seed: the recipe's.
    """
    drawn = np.zeros(len(own), dtype=bool)
    drawn[emitted] = True
    groups = [(drawn,), (own & decisions.keep & ~drawn,)]
    dropped = own & ~decisions.keep
    groups.append(
        tuple(
            dropped & (decisions.reason == code)
            for code in np.unique(decisions.reason[dropped]).tolist()
        )
    )
    chosen = [
        row
        for masks in groups
        for row in _in_turn([_lowest(decisions, mask, seed) for mask in masks])
    ]
    return np.array(chosen, dtype=np.int64)


def shown_examples(
    gathered: Gathered,
    rows: IntArray,
    emitted: IntArray,
    decisions: Decisions,
    values: FloatArray,
) -> list[Example]:
    """The rows as text, each with what became of it and why.

    Args:
        gathered: of the run; the rows are among those shown.
        rows: row numbers, int64.
        emitted: distinct row numbers, int64.
        decisions: of selection.
        values: what the rows were ranked by, float64 [n] (or [0]: by nothing).
    """
    if not len(rows):
        return []
    examples = _examples(gathered.shown_rows(rows))
    return [
        replace(
            one,
            score=float(values[row]) if len(values) and np.isfinite(values[row]) else None,
            fate=fate(row, emitted, decisions),
            why=decisions.reasons[decisions.reason[row]],
        )
        for one, row in zip(examples, rows.tolist(), strict=True)
    ]


def fate(row: int, emitted: IntArray, decisions: Decisions) -> str:
    """What became of a row: emitted, selected (and not drawn) or dropped."""
    place = int(np.searchsorted(emitted, row))
    if place < len(emitted) and emitted[place] == row:
        return "emitted"
    return "selected" if decisions.keep[row] else "dropped"


def _lowest(decisions: Decisions, mask: npt.NDArray[np.bool_], seed: int) -> list[int]:
    """Rows of a mask of lowest hash, at most SEARCHED."""
    rows = np.flatnonzero(mask).astype(np.int64)
    hashed = zip(
        (key_hash(f"search:{row}", seed) for row in decisions.ids_of(rows)),
        rows.tolist(),
        strict=True,
    )
    return [row for _, row in heapq.nsmallest(SEARCHED, hashed)]


def _in_turn(groups: list[list[int]]) -> list[int]:
    """One of each group after the other, at most SEARCHED in all."""
    turns = zip_longest(*groups)
    return [row for turn in turns for row in turn if row is not None][:SEARCHED]


def _examples(table: pa.Table) -> list[Example]:
    originals: list[Any] = (
        table["original"].to_pylist()
        if "original" in table.column_names
        else [None] * table.num_rows
    )
    texts = zip(
        table["id"].to_pylist(),
        table["source"].to_pylist(),
        table["effective"].to_pylist(),
        originals,
        strict=True,
    )
    return [
        Example(name, source, None, _turns(now), _turns(before) if before else None)
        for name, source, now, before in texts
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
