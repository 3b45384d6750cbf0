"""Columns of rows that are held in memory: what fit and set stages read without a run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import count
from typing import TypeVar

import pyarrow as pa

from stages.rows import effective_messages

T = TypeVar("T")


def view_of(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Named columns of a table; `effective_messages` is coalesce(messages_reflected, messages)."""
    columns = {
        name: effective_messages(table) if name == "effective_messages" else table[name]
        for name in names
    }
    return pa.table(columns)


def with_columns_of(table: pa.Table, added: pa.Table) -> pa.Table:
    """A table with another's columns at its end; its own of the same names are left out."""
    made = table.drop_columns([name for name in added.column_names if name in table.column_names])
    for field in added.schema:
        made = made.append_column(field, added[field.name])
    return made


@dataclass(frozen=True)
class MemoryColumns:
    """A table in shards of a number of rows; an empty one is one shard without rows.

    Attributes:
        table: all columns that there are.
        step: rows in a shard, at most.
        seen: told how many rows a shard had, as it is read.
    """

    table: pa.Table
    step: int
    seen: Callable[[int], object] = lambda _: None

    @property
    def n_rows(self) -> int:
        """Rows in all shards."""
        return int(self.table.num_rows)

    def iter(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """One table a shard, with the named columns."""
        view = view_of(self.table, names)
        for start in range(0, max(self.n_rows, 1), self.step):
            part = view.slice(start, self.step)
            yield part
            self.seen(part.num_rows)

    def map(
        self,
        names: Sequence[str],
        fn: Callable[[pa.Table, pa.Table], T],
        merge: Callable[[T, T], T],
        *,
        beside: pa.Table,
    ) -> T:
        """`fn` of every shard's columns and its rows of `beside`, merged in order."""
        starts = count(step=self.step)
        return reduce(
            merge,
            (
                fn(table, beside.slice(start, table.num_rows))
                for start, table in zip(starts, self.iter(names), strict=False)
            ),
        )
