"""Columns of shards held in memory: what stages read, without a run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pyarrow as pa

T = TypeVar("T")


class Tables:
    """A table cut into shards of a number of rows."""

    def __init__(self, table: pa.Table, shard: int) -> None:
        self.table, self.shard = table, shard

    @property
    def n_rows(self) -> int:
        return int(self.table.num_rows)

    def iter(self, names: Sequence[str]) -> Iterator[pa.Table]:
        for start in range(0, self.n_rows, self.shard):
            yield self.table.select(list(names)).slice(start, self.shard)

    def map(
        self,
        names: Sequence[str],
        fn: Callable[[pa.Table, pa.Table], T],
        merge: Callable[[T, T], T],
        *,
        beside: pa.Table,
    ) -> T:
        starts = range(0, self.n_rows, self.shard)
        parts = (beside.slice(start, self.shard) for start in starts)
        first, *rest = [fn(*pair) for pair in zip(self.iter(names), parts, strict=True)]
        for other in rest:
            first = merge(first, other)
        return first
