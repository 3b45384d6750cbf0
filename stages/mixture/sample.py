"""The rows that the mixture weighs: their vectors, and disjoint samples of them by hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stages.base import ShardedColumns
from stages.errors import StageError
from stages.mixture.problem import vectors_of
from stages.mixture.simplex import IntArray
from stages.rows import key_hash

Vectors = NDArray[np.float32]

FRESH_DRAWS = 4
"""Samples on which the weights found on the first one are tried."""


@dataclass(frozen=True)
class Rows:
    """Rows of sources.

    Attributes:
        vectors: float32 [n, d].
        source: number of each row's source, int64 [n].
    """

    vectors: Vectors
    source: IntArray


@dataclass(frozen=True)
class Lowest:
    """The rows of each source that come first in the order of a hash.

    Attributes:
        keys: hashes, uint64 [n], ascending within a source.
        rows: the rows, those of one source after another.
        found: kept rows of each source in all, int64 [K].
    """

    keys: NDArray[np.uint64]
    rows: Rows
    found: IntArray


def kept_rows(
    table: pa.Table, decisions: pa.Table, sources: Sequence[str]
) -> tuple[pa.Table, Rows]:
    """Kept rows and anchors' that have a vector, of one shard.

    Args:
        table: id, embedding.
        decisions: id, source, keep, reason of the same rows.
        sources: names, in the order of their numbers.

    Returns:
        The rows' part of `table`, and their vectors.

    Raises:
        StageError: the decisions are of other rows.
    """
    if not decisions["id"].combine_chunks().equals(table["id"].combine_chunks()):
        raise StageError(
            "selection's decisions are of other rows than the embeddings; run again with "
            "--restart-from selection",
            stage="mixture",
        )
    numbers = pc.index_in(decisions["source"].cast(pa.string()), value_set=pa.array(sources))
    counted = pc.or_(decisions["keep"], pc.equal(decisions["reason"].cast(pa.string()), "anchor"))
    wanted = pc.and_(pc.and_(counted, pc.is_valid(numbers)), table["embedding"].is_valid())
    kept = table.filter(wanted)
    of = numbers.filter(wanted).to_numpy().astype(np.int64)
    return kept, Rows(vectors_of(kept), of)


def lowest_rows(
    columns: ShardedColumns, decisions: pa.Table, sources: Sequence[str], most: int, seed: int
) -> Lowest:
    """The `most` rows of lowest hash(id, seed) of every source, whatever the shards.

    Args:
        columns: id, embedding.
        decisions: id, source, keep, reason of all rows.
        sources: names, in the order of their numbers.
        most: rows of each source.
        seed: of the recipe.

    Raises:
        StageError: a source has no kept row with a vector.
    """
    fn = partial(_lowest_of_shard, sources=sources, most=most, seed=seed)
    lowest: Lowest = columns.map(
        ("id", "embedding"), fn, partial(_merged, most=most), beside=decisions
    )
    for number in np.flatnonzero(lowest.found == 0).tolist():
        raise StageError(
            f"source {sources[number]} has no kept row with an embedding; loosen selection, or "
            "remove the source",
            stage="mixture",
        )
    return lowest


def draws_of(lowest: Lowest, size: int) -> list[Rows]:
    """Disjoint samples of `size` rows a source: the one to solve, then fresh ones.

    A source with no more rows than the sample gives all of them to every draw, which is exact; one
    that runs out of rows ends the fresh draws.
    """
    starts = np.concatenate([[0], np.cumsum(np.bincount(lowest.rows.source))])
    draws: list[Rows] = []
    for draw in range(1 + FRESH_DRAWS):
        places = []
        for number, found in enumerate(lowest.found.tolist()):
            first, last = (0, found) if found <= size else (draw * size, (draw + 1) * size)
            last = min(last, found)
            if last - first < min(size, found, max(found // 2, 1)):
                return draws
            places.append(np.arange(starts[number] + first, starts[number] + last))
        if draw and (lowest.found <= size).all():
            return draws
        chosen = np.concatenate(places)
        draws.append(Rows(lowest.rows.vectors[chosen], lowest.rows.source[chosen]))
    return draws


def _lowest_of_shard(
    table: pa.Table, decisions: pa.Table, *, sources: Sequence[str], most: int, seed: int
) -> Lowest:
    kept, rows = kept_rows(table, decisions, sources)
    keys = np.array([key_hash(row, seed) for row in kept["id"].to_pylist()], dtype=np.uint64)
    found = np.bincount(rows.source, minlength=len(sources)).astype(np.int64)
    return _cut(Lowest(keys, rows, found), most)


def _merged(one: Lowest, other: Lowest, *, most: int) -> Lowest:
    if not len(other.keys) or not len(one.keys):
        rows, keys = (one.rows, one.keys) if len(one.keys) else (other.rows, other.keys)
        return Lowest(keys, rows, one.found + other.found)
    joined = Rows(
        np.concatenate([one.rows.vectors, other.rows.vectors]),
        np.concatenate([one.rows.source, other.rows.source]),
    )
    return _cut(
        Lowest(np.concatenate([one.keys, other.keys]), joined, one.found + other.found), most
    )


def _cut(lowest: Lowest, most: int) -> Lowest:
    order = np.lexsort((lowest.keys, lowest.rows.source))
    source = lowest.rows.source[order]
    place = np.arange(len(order)) - np.searchsorted(source, source)
    order = order[place < most]
    rows = Rows(lowest.rows.vectors[order], lowest.rows.source[order])
    return Lowest(lowest.keys[order], rows, lowest.found)
