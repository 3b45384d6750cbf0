"""Which rows fill a quota, and the order in which rows are written: functions of ids and seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stages.rows import key_hash

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def sampling_order(
    rows: IntArray, ids: Sequence[str], seed: int, scores: FloatArray | None = None
) -> IntArray:
    """Rows in the order in which a source gives them.

    By hash of id and seed; with scores, from the highest down, NaN last, ties by that hash. The
    hash has a purpose of its own: row stages hash ids for `limit`, and a shared order would favour
    the rows that were scored or rewritten.

    Args:
        rows: row numbers, int64 [n].
        ids: their ids, in the same order.
        seed: the recipe's.
        scores: float64 [n], or None for a random sample.
    """
    hashes = np.array([key_hash(f"sample:{row}", seed) for row in ids], dtype=np.uint64)
    if scores is None:
        return rows[np.lexsort((rows, hashes))]
    return rows[np.lexsort((rows, hashes, -np.nan_to_num(scores, nan=-np.inf)))]


def fill_quota(
    order: IntArray, quota: int, sizes: IntArray | None = None, repeats: int = 1
) -> IntArray:
    """Row numbers that fill a quota: all rows once, then (with repeats) all again.

    A quota in tokens stops before the first row that would pass it, also where a shorter row
    further on would still fit: skipping would favour short rows. What is missing is at most that
    row's length.

    Args:
        order: row numbers, int64 [n].
        quota: rows, or tokens where `sizes` is given.
        sizes: tokens of the rows in `order`, int64 [n]; None counts rows.
        repeats: how often a row may be given, at least 1.
    """
    if not len(order):
        return order
    if sizes is None:
        return np.tile(order, min(repeats, -(-quota // len(order))))[:quota]
    rounds = min(repeats, quota // max(1, int(sizes.sum())) + 1)
    total = np.cumsum(np.tile(sizes, rounds))
    return np.tile(order, rounds)[: int(np.searchsorted(total, quota, side="right"))]


def shuffled(rows: IntArray, ids: Sequence[str], seed: int) -> IntArray:
    """Rows of all sources in the order of a hash of id, copy and seed.

    Args:
        rows: row numbers, int64 [n]; a row that is there twice is shuffled as two.
        ids: their ids, in the same order.
        seed: the recipe's.
    """
    copies: dict[int, int] = {}
    hashes = np.empty(len(rows), dtype=np.uint64)
    for i, (row, name) in enumerate(zip(rows.tolist(), ids, strict=True)):
        copies[row] = copies.get(row, 0) + 1
        hashes[i] = key_hash(f"shuffle:{copies[row]}:{name}", seed)
    return rows[np.lexsort((rows, hashes))]
