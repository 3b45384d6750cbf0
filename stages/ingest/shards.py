"""Rows to Parquet parts, one part in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from stages.storage import Store

Metadata = Mapping[str, str] | Callable[[str], Mapping[str, str]] | None
"""What goes into the footers of files: the same for all, or by file name."""


class ShardWriter:
    """Writes `part-00000.parquet` and so on, each when it is full.

    Attributes:
        written: names and rows of the parts written so far.
    """

    def __init__(
        self,
        store: Store,
        schema: pa.Schema,
        metadata: Metadata,
        *,
        folder: str = "",
        max_rows: int | None = None,
        max_chars: int | None = None,
    ) -> None:
        """Write into a folder of a store; parts are bounded by rows and characters where given."""
        self._store, self._schema, self._metadata = store, schema, metadata
        self._prefix = f"{folder}/" if folder else ""
        self._max_rows, self._max_chars = max_rows, max_chars
        self._rows: list[dict[str, Any]] = []
        self._chars = 0
        self.written: list[tuple[str, int]] = []

    def add(self, row: dict[str, Any], chars: int) -> None:
        """Put a row into the current part, or into a new one where it is full."""
        full = self._max_rows is not None and len(self._rows) >= self._max_rows
        long = self._max_chars is not None and self._chars + chars > self._max_chars
        if self._rows and (full or long):
            self.flush()
        self._rows.append(row)
        self._chars += chars

    def flush(self) -> None:
        """Write the current part, unless it is empty."""
        if not self._rows:
            return
        name = f"{self._prefix}part-{len(self.written):05d}.parquet"
        pairs = self._metadata(name) if callable(self._metadata) else self._metadata
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        self._store.write_table(name, table, pairs)
        self.written.append((name, len(self._rows)))
        self._rows, self._chars = [], 0
