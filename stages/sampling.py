"""Samples of rows that depend on ids and a seed, not on order or shards."""

from __future__ import annotations

import heapq

from stages.base import ShardedColumns
from stages.rows import key_hash


def sampled_ids(columns: ShardedColumns, rows: int, seed: int) -> set[str]:
    """Ids of the rows of lowest hash(id, seed); all where there are no more."""
    ids = (row for table in columns.iter(("id",)) for row in table["id"].to_pylist())
    return set(heapq.nsmallest(rows, ids, key=lambda row: key_hash(row, seed)))
