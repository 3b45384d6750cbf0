"""Rows to Parquet parts, one part in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import pyarrow as pa

from stages.storage import Store

Metadata = Mapping[str, str] | Callable[[str], Mapping[str, str]] | None
"""What goes into the footers of files: the same for all, or by file name."""


def table_of(records: Sequence[Any], schema: pa.Schema) -> pa.Table:
    """Records as a table; a column is the attribute of its name.

    Labels are plain strings: a part's dictionary holds what stands in that part, whatever tables it
    was made of.
    """
    columns = [
        pa.array(
            list(map(attrgetter(field.name), records)),
            pa.string() if pa.types.is_dictionary(field.type) else field.type,
        )
        for field in schema
    ]
    return pa.table(columns, names=schema.names)


class ShardWriter:
    """Writes `part-00000.parquet` and so on, each when it is full.

    Attributes:
        written: names and rows of the parts written so far.
    """

    def __init__(
        self,
        store: Store,
        schema: pa.Schema,
        metadata: Metadata = None,
        *,
        folder: str = "",
        max_rows: int | None = None,
        max_chars: int | None = None,
        scratch: bool = False,
    ) -> None:
        """Write into a folder of a store.

        Args:
            store: where to.
            schema: columns of the parts.
            metadata: what goes into their footers.
            folder: inside the store.
            max_rows: rows of a part, at most.
            max_chars: characters of a part, at most.
            scratch: write Arrow files without metadata, quick to write and read.
        """
        self._store, self._schema, self._metadata = store, schema, metadata
        self._prefix = f"{folder}/" if folder else ""
        self._max_rows, self._max_chars = max_rows, max_chars
        self._scratch = scratch
        self._tables: list[pa.Table] = []
        self._rows = self._chars = 0
        self.written: list[tuple[str, int]] = []

    def add(self, rows: pa.Table, chars: Sequence[int] | None = None) -> None:
        """Put rows into the current part, and into new ones where it is full.

        Args:
            rows: with the schema's columns, labels as plain strings or not.
            chars: characters of each row, where parts are bounded by them.
        """
        start = 0
        for place in range(rows.num_rows):
            length = chars[place] if chars is not None else 0
            full = self._max_rows is not None and self._rows >= self._max_rows
            long = self._max_chars is not None and self._chars + length > self._max_chars
            if self._rows and (full or long):
                self._tables.append(rows.slice(start, place - start))
                self.flush()
                start = place
            self._rows += 1
            self._chars += length
        self._tables.append(rows.slice(start))

    def flush(self) -> None:
        """Write the current part, unless it is empty."""
        if self._rows:
            table = pa.concat_tables(self._tables).select(self._schema.names)
            table = table.combine_chunks().cast(self._schema)
            name = f"{self._prefix}part-{len(self.written):05d}"
            if self._scratch:
                name += ".arrow"
                self._store.write_arrow(name, table)
            else:
                name += ".parquet"
                pairs = self._metadata(name) if callable(self._metadata) else self._metadata
                self._store.write_table(name, table, pairs)
            self.written.append((name, self._rows))
        self._tables, self._rows, self._chars = [], 0, 0
