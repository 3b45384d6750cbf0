"""Parquet files that `datasets.load_dataset` opens as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.emission.formats import Layout, plan_layout
from stages.emission.gather import Gathered
from stages.emission.provenance import provenance, provenance_type
from stages.emission.sample import IntArray
from stages.emission.settings import EmissionSettings
from stages.storage import parquet_bytes


@dataclass(frozen=True)
class ShardFile:
    """A written file: name below the data set's folder, rows, bytes on disk, SHA-256 in hex."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Schema:
    """What every shard holds."""

    layout: Layout
    tools: bool
    provenance: pa.StructType | None

    @property
    def arrow(self) -> pa.Schema:
        """The explicit schema: a shard whose values are all null has the same types."""
        fields = list(self.layout.fields)
        if self.tools:
            fields.append(("tools", pa.string()))
        fields += [("id", pa.string()), ("source", pa.string())]
        if self.provenance is not None:
            fields.append(("provenance", self.provenance))
        return pa.schema(fields)


def plan_schema(gathered: Gathered, settings: EmissionSettings, carried: tuple[str, ...]) -> Schema:
    """The schema that holds all emitted rows.

    Raises:
        StageError: rows don't fit the format.
    """
    chunks = [table for _, table in gathered.chunks]
    tools = any(
        "tools" in chunk.column_names and chunk["tools"].null_count < chunk.num_rows
        for chunk in chunks
    )
    kind = provenance_type(chunks, carried) if settings.provenance else None
    return Schema(plan_layout(settings.format, chunks), tools, kind)


def write_shards(
    gathered: Gathered,
    order: IntArray,
    schema: Schema,
    shard_bytes: int,
    metadata: Mapping[str, str],
) -> tuple[list[ShardFile], dict[str, bytes]]:
    """Files in the order of `order`, with equal numbers of rows (up to one).

    Args:
        gathered: the emitted rows.
        order: row numbers, int64 [n], n >= 1.
        schema: of every file.
        shard_bytes: target size of a file in uncompressed bytes.
        metadata: for the files' footers.

    Returns:
        The files' facts, and their bytes by name.
    """
    held = sum(table.num_rows for _, table in gathered.chunks)
    size = sum(
        content_bytes(table[name]) for _, table in gathered.chunks for name in table.schema.names
    )
    count = min(len(order), max(1, -(-size * len(order) // (held * shard_bytes))))
    shards, files = [], {}
    for i in range(count):
        start, stop = i * len(order) // count, (i + 1) * len(order) // count
        name = f"data/train-{i:05d}-of-{count:05d}.parquet"
        table = _table(gathered.rows(order[start:stop]), schema)
        files[name] = parquet_bytes(table, metadata)
        digest = hashlib.sha256(files[name]).hexdigest()
        shards.append(ShardFile(name, stop - start, len(files[name]), digest))
    return shards, files


def content_bytes(column: Any) -> int:
    """Uncompressed bytes of an Arrow column, from its values alone (not from its buffers).

    Buffers depend on how a column was cut into chunks, and the number of files must not.
    """
    if isinstance(column, pa.ChunkedArray):
        return sum(content_bytes(chunk) for chunk in column.chunks)
    if pa.types.is_list(column.type):
        return 4 * len(column) + content_bytes(column.flatten())
    if pa.types.is_struct(column.type):
        return sum(content_bytes(child) for child in column.flatten())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return 4 * len(column) + (pc.sum(pc.binary_length(column)).as_py() or 0)
    return int(len(column) * max(1, column.type.bit_width // 8))


def _table(rows: pa.Table, schema: Schema) -> pa.Table:
    columns: list[Any] = schema.layout.write(rows["effective"].combine_chunks())
    if schema.tools:
        columns.append(rows["tools"])
    columns += [rows["id"], rows["source"]]
    if schema.provenance is not None:
        columns.append(provenance(rows, schema.provenance))
    return pa.Table.from_arrays(columns, schema=schema.arrow)
