"""Candidates: rows that share a band of their MinHash signatures with another row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from stages.storage import Store
from stages.words import HashArray, IntArray

_BANDS_AT_ONCE = 4
"""Bands in memory: fewer take less of it and open every sketch more often."""


@dataclass(frozen=True)
class ClusterTask:
    """Rows that may be near duplicates of each other and of no other rows, by number, sorted."""

    rows: IntArray


def candidate_tasks(
    store: Store, sketches: Sequence[str], n_rows: int, names: Sequence[str], task_rows: int
) -> list[ClusterTask]:
    """Rows that share a band with another one, directly or by way of others, as tasks.

    Holds about 70 bytes a row.

    Args:
        store: holds the sketches.
        sketches: their names, in the order of rows.
        n_rows: rows in all shards.
        names: columns of the bands.
        task_rows: rows from which on a task is full; a group of candidates is never split.
    """
    groups = np.arange(n_rows)
    for start in range(0, len(names), _BANDS_AT_ONCE):
        some = names[start : start + _BANDS_AT_ONCE]
        table = pa.concat_tables(store.read_arrow(sketch, ["row", *some]) for sketch in sketches)
        rows = table["row"].to_numpy()
        for name in some:
            first, other = bucket_mates(rows, table[name].to_numpy())
            groups = _joined_groups(groups, first, other)
    sizes = np.bincount(groups, minlength=1)
    members = np.flatnonzero(sizes[groups] > 1)
    members = members[np.argsort(groups[members], kind="stable")]
    tasks = []
    ends = np.flatnonzero(np.diff(groups[members], append=-1)) + 1
    start = 0
    for place, end in enumerate(ends.tolist()):
        if end - start >= task_rows or place == len(ends) - 1:
            tasks.append(ClusterTask(np.sort(members[start:end])))
            start = end
    return tasks


def bucket_mates(rows: IntArray, numbers: HashArray) -> tuple[IntArray, IntArray]:
    """Rows of equal numbers, each but one beside that one of its bucket."""
    order = np.argsort(numbers)
    numbers = numbers[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = numbers[1:] != numbers[:-1]
    starts = np.flatnonzero(new)
    first = np.repeat(starts, np.diff(starts, append=len(order)))
    other = np.flatnonzero(~new)
    return rows[order[first[other]]], rows[order[other]]


def _joined_groups(groups: IntArray, first: IntArray, other: IntArray) -> IntArray:
    """Groups after the groups of pairs of rows are joined."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = groups[first], groups[other]
    apart = a != b
    if not apart.any():
        return groups
    shape = (len(groups), len(groups))
    edges = coo_array((np.ones(apart.sum(), np.bool_), (a[apart], b[apart])), shape=shape)
    _, labels = connected_components(edges, directed=False)
    joined: IntArray = labels[groups]
    return joined
