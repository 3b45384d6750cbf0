"""From candidates to clusters of near duplicates, by exact similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.ingest.candidates import ClusterTask, bucket_mates
from stages.ingest.set_join import pairs_to_verify
from stages.ingest.settings import NearDuplicateSettings
from stages.ingest.sketch import band_names
from stages.storage import Store
from stages.words import HashArray, IntArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_PAIRS_AT_ONCE = 50_000

_NEIGHBOURS = 4
"""Rows of a bucket with which each is compared before the bucket is searched by its shingles.

Most buckets are small, or one cluster that neighbours join.
"""


@dataclass(frozen=True)
class Duplicates:
    """Rows that are near duplicates, by their numbers over all shards.

    Attributes:
        rows: rows to drop, int64 [n].
        kept: the row that stays for each, int64 [n].
        similarity: exact Jaccard similarity of the two, float64 [n]; below the threshold where
            only a chain of near duplicates joins them.
    """

    rows: IntArray
    kept: IntArray
    similarity: NDArray[np.float64]

    @staticmethod
    def joined(found: Sequence[Duplicates]) -> Duplicates:
        """Those of several tasks, by row number."""
        rows = np.concatenate([np.empty(0, np.int64), *(one.rows for one in found)])
        kept = np.concatenate([np.empty(0, np.int64), *(one.kept for one in found)])
        similarity = np.concatenate([np.empty(0), *(one.similarity for one in found)])
        order = np.argsort(rows)
        return Duplicates(rows[order], kept[order], similarity[order])


def near_duplicates(
    store: Store,
    sketches: Sequence[tuple[str, int]],
    settings: NearDuplicateSettings,
    task: ClusterTask,
) -> Duplicates:
    """The near duplicates among a task's rows.

    Args:
        store: holds the sketches.
        sketches: their names, and the number from which on their rows are.
        settings: the threshold, and which row stays.
        task: the rows.
    """
    table = _rows_of(store, sketches, task.rows)
    rows = table["row"].to_numpy()
    shingles = _Shingles.of(table["shingles"].combine_chunks())
    bands = [table[name].to_numpy() for name in band_names(settings)]
    clusters = _clusters(shingles, table["set"].to_numpy(), bands, settings.threshold)
    length = table["length"].to_numpy() if settings.keep == "longest" else np.zeros(len(rows))
    rank = table["rank"].to_numpy()
    best = np.lexsort((rows, -length, rank, clusters))
    first = np.flatnonzero(np.diff(clusters[best], prepend=-1))
    kept = np.empty(len(rows), np.int64)
    kept[clusters[best[first]]] = best[first]
    stays = kept[clusters]
    # Rows of anchors are trained on already: they are compared with, never dropped.
    dropped = np.flatnonzero((stays != np.arange(len(rows))) & (rank >= 0))
    return Duplicates(
        rows[dropped], rows[stays[dropped]], shingles.similarities(dropped, stays[dropped])
    )


def _rows_of(store: Store, sketches: Sequence[tuple[str, int]], rows: IntArray) -> pa.Table:
    """Sketches of the rows with these numbers."""
    starts = np.array([first for _, first in sketches])
    bounds = np.searchsorted(rows, np.append(starts, np.iinfo(np.int64).max))
    tables = []
    for (name, _), start, end in zip(sketches, bounds[:-1], bounds[1:], strict=True):
        if start < end:
            table = store.read_arrow(name)
            places = np.searchsorted(table["row"].to_numpy(), rows[start:end])
            tables.append(table.take(pa.array(places)))
    return pa.concat_tables(tables)


@dataclass(frozen=True)
class _Shingles:
    """Sets of shingles as rows of a sparse 0/1 matrix, and their sizes."""

    matrix: csr_array
    sizes: IntArray

    @classmethod
    def of(cls, lists: pa.LargeListArray) -> _Shingles:
        from scipy.sparse import csr_array

        offsets = lists.offsets.to_numpy()
        distinct, columns = np.unique(lists.flatten().to_numpy(), return_inverse=True)
        ones = np.ones(len(columns), np.int32)
        shape = (len(lists), len(distinct))
        matrix = csr_array((ones, columns, offsets - offsets[0]), shape=shape)
        return cls(matrix, np.diff(offsets))

    def similarities(self, a: IntArray, b: IntArray) -> NDArray[np.float64]:
        r"""Jaccard similarity of the sets `a` and `b`, float64 [pairs].

        .. math:: J(A, B) = \frac{|A \cap B|}{|A \cup B|}
        """
        found = np.empty(len(a))
        for start in range(0, len(a), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            common = self.matrix[a[some]].multiply(self.matrix[b[some]]).sum(axis=1)
            found[some] = common / (self.sizes[a[some]] + self.sizes[b[some]] - common)
        return found


class _Forest:
    """Disjoint sets of rows (union-find)."""

    def __init__(self, size: int) -> None:
        self._parents = np.arange(size)

    def roots(self, rows: IntArray) -> IntArray:
        """A row that stands for each row's set, int64 [rows]."""
        found = self._parents[rows]
        while (found != (above := self._parents[found])).any():
            found = above
        self._parents[rows] = found
        return found

    def join(self, a: IntArray, b: IntArray) -> None:
        """Make the sets of the pairs one."""
        for one, other in zip(a.tolist(), b.tolist(), strict=True):
            first, second = self._root(one), self._root(other)
            self._parents[max(first, second)] = min(first, second)

    def _root(self, row: int) -> int:
        parents = self._parents
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = int(parents[row])
        return row


def _clusters(
    shingles: _Shingles, sets: HashArray, bands: Sequence[HashArray], threshold: float
) -> IntArray:
    """A number of each row's cluster: rows joined by candidate pairs that are near duplicates.

    Every candidate pair is verified, but for those that verified pairs have joined already, which
    would change nothing, and for those that have too few shingles in common by `set_join`.
    """
    forest = _Forest(len(sets))
    first, other = bucket_mates(np.arange(len(sets)), sets)
    same = shingles.similarities(first, other) == 1
    forest.join(first[same], other[same])
    # Equal sets are in the same buckets, so one of them stands for all.
    lone = np.setdiff1d(np.arange(len(sets)), other[same])
    orders = [lone[np.argsort(band[lone], kind="stable")] for band in bands]

    def verify(a: IntArray, b: IntArray) -> None:
        apart = forest.roots(a) != forest.roots(b)
        a, b = a[apart], b[apart]
        near = shingles.similarities(a, b) >= threshold
        forest.join(a[near], b[near])

    for place, band in enumerate(bands):
        for distance in range(1, _NEIGHBOURS + 1):
            order = orders[place] = _unfinished(orders[place], band, forest, distance - 1)
            mates = band[order[distance:]] == band[order[:-distance]]
            verify(order[:-distance][mates], order[distance:][mates])
    left = [
        _unfinished(order, band, forest, _NEIGHBOURS)
        for order, band in zip(orders, bands, strict=True)
    ]
    rows = np.unique(np.concatenate(left))
    for a, b in pairs_to_verify(shingles.matrix[rows], threshold, forest.roots(rows)):
        a, b = rows[a], rows[b]
        mates = np.logical_or.reduce([band[a] == band[b] for band in bands])
        verify(a[mates], b[mates])
    return forest.roots(np.arange(len(sets)))


def _unfinished(order: IntArray, band: HashArray, forest: _Forest, distance: int) -> IntArray:
    """Rows whose bucket holds several clusters, and pairs farther apart than a distance.

    Args:
        order: rows, those of a bucket side by side.
        band: the number of the bucket by row.
        forest: clusters so far.
        distance: places in a bucket up to which pairs were compared.
    """
    if not len(order):
        return order
    starts = np.flatnonzero(np.concatenate([[True], band[order[1:]] != band[order[:-1]]]))
    sizes = np.diff(starts, append=len(order))
    roots = forest.roots(order)
    several = np.minimum.reduceat(roots, starts) != np.maximum.reduceat(roots, starts)
    unfinished: IntArray = order[np.repeat(several & (sizes > distance + 1), sizes)]
    return unfinished
