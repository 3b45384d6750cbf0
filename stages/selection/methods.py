"""Methods of selection: of rows that can be ranked, the wanted number."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stages.errors import StageError
from stages.selection.coverage import ActiveSets, greedy_coverage, unit_interval
from stages.selection.ranking import FloatArray, IntArray, best_rows, id_order
from stages.selection.round_robin import round_robin
from stages.selection.settings import SelectionSettings


class Method(Protocol):
    """Picks rows out of a group."""

    def __call__(self, rows: IntArray, count: int) -> IntArray:
        """`count` of these row numbers, ties to the lower id."""
        ...


def method_of(
    settings: SelectionSettings,
    ids: pa.ChunkedArray,
    scores: FloatArray,
    lists: pa.ChunkedArray | None,
) -> Method:
    """The method that the settings name.

    Args:
        settings: the recipe's section.
        ids: of all rows that can be ranked, string [n].
        scores: of the same rows, float64 [n]; for methods top and mixed.
        lists: scores by target row (round_robin), or active features (coverage and mixed).

    Raises:
        StageError: rows have scores for different numbers of target rows.
    """
    values = scores if settings.order == "highest" else -scores

    def ordered(rows: IntArray) -> IntArray:
        return rows[id_order(ids.take(pa.array(rows)))]

    if lists is None:
        return lambda rows, count: rows[best_rows(values[rows], ids.take(pa.array(rows)), count)]
    if settings.method == "round_robin":
        by_target = target_scores(lists)

        def in_turn(rows: IntArray, count: int) -> IntArray:
            rows = ordered(rows)
            return rows[round_robin(by_target[:, rows], count)]

        return in_turn
    sets = active_sets(lists)
    if settings.method == "coverage":
        return lambda rows, count: greedy_coverage(sets, ordered(rows), count)
    diversity = 0.5 if settings.diversity is None else settings.diversity

    def mixed(rows: IntArray, count: int) -> IntArray:
        rows = ordered(rows)
        return greedy_coverage(sets, rows, count, unit_interval(values[rows]), diversity)

    return mixed


def target_scores(lists: pa.ChunkedArray) -> NDArray[np.float32]:
    """Lists of one score a target row as float32 [targets, n].

    Raises:
        StageError: their lengths differ.
    """
    lengths = set(pc.unique(pc.list_value_length(lists)).to_pylist()) if len(lists) else {0}
    if len(lengths) > 1:
        raise StageError(
            f"selection: rows have scores for {sorted(lengths)} target rows; run again from the "
            "stage that adds them",
            stage="selection",
        )
    by_target = np.empty((lengths.pop(), len(lists)), np.float32)
    start = 0
    for chunk in lists.chunks:
        by_target[:, start : start + len(chunk)] = (
            chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), -1).T
        )
        start += len(chunk)
    return by_target


def active_sets(lists: pa.ChunkedArray) -> ActiveSets:
    """Lists of feature numbers as sets."""
    sizes = pc.list_value_length(lists).to_numpy()
    features = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in lists.chunks]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return ActiveSets(starts, np.concatenate([np.zeros(0, np.int32), *features]).astype(np.int32))
