"""The best rows by one score, without sorting all of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def best_rows(values: FloatArray, ids: pa.ChunkedArray, count: int) -> IntArray:
    """Numbers of the `count` rows of highest value, ascending; all where there are no more.

    Ties go to the lower id, and NaN ranks behind every number. Only rows that tie at the cut have
    their ids compared, so that the time is that of one partition.

    Args:
        values: float64 [n].
        ids: string [n], distinct.
        count: rows wanted.
    """
    known = np.flatnonzero(~np.isnan(values)).astype(np.int64)
    unknown = np.flatnonzero(np.isnan(values)).astype(np.int64)
    if count >= len(known):
        return np.sort(np.concatenate([known, _lowest_ids(unknown, ids, count - len(known))]))
    if count == 0:
        return known[:0]
    place = len(known) - count
    cut = np.partition(values[known], place)[place]
    above = known[values[known] > cut]
    level = known[values[known] == cut]
    return np.sort(np.concatenate([above, _lowest_ids(level, ids, count - len(above))]))


def id_order(ids: pa.ChunkedArray) -> IntArray:
    """Row numbers in the order of their ids, int64 [n]."""
    order: IntArray = pc.sort_indices(ids).to_numpy().astype(np.int64)
    return order


def _lowest_ids(rows: IntArray, ids: pa.ChunkedArray, count: int) -> IntArray:
    if count >= len(rows):
        return rows
    return rows[id_order(ids.take(pa.array(rows)))[:count]]
