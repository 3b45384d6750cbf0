"""Parquet files that `datasets.load_dataset` opens as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.emission.formats import Layout, plan_layout
from stages.emission.gather import APART, Gathered
from stages.emission.provenance import provenance, provenance_type
from stages.emission.sample import IntArray
from stages.emission.settings import EmissionSettings
from stages.emission.splits import TRAIN, VALIDATION
from stages.storage import parquet_bytes

FOLDERS = {TRAIN: "data", VALIDATION: "validation"}
"""A folder for each split: LLaMA-Factory reads a folder as one split."""
_GROUP_BYTES = 64_000_000


@dataclass(frozen=True)
class ShardFile:
    """A written file: name below the data set's folder, split, rows, bytes, SHA-256 in hex."""

    name: str
    split: str
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
    splits: Mapping[str, IntArray],
    schema: Schema,
    shard_bytes: int,
    metadata: Mapping[str, str],
) -> tuple[list[ShardFile], dict[str, bytes]]:
    """Files of every split in its order, with equal numbers of rows (up to one).

    Args:
        gathered: the emitted rows.
        splits: row numbers by split, int64 [n], n >= 1.
        schema: of every file.
        shard_bytes: target size of a file in uncompressed bytes.
        metadata: for the files' footers.

    Returns:
        The files' facts, and their bytes by name.
    """
    held = sum(table.num_rows for _, table in gathered.chunks)
    size = sum(
        content_bytes(table[name])
        for _, table in gathered.chunks
        for name in table.schema.names
        if name not in APART
    )
    shards: list[ShardFile] = []
    files: dict[str, bytes] = {}
    for split, order in splits.items():
        count = min(len(order), max(1, -(-size * len(order) // (held * shard_bytes))))
        for i in range(count):
            rows = order[i * len(order) // count : (i + 1) * len(order) // count]
            name = f"{FOLDERS[split]}/{split}-{i:05d}-of-{count:05d}.parquet"
            table = _table(gathered.rows(rows), schema)
            files[name] = data_bytes(table, metadata)
            shards.append(shard_file(name, split, table.num_rows, files[name]))
    return shards, files


def write_lines(
    folder: str, tables: Mapping[str, pa.Table], shard_bytes: int, metadata: Mapping[str, str]
) -> tuple[list[ShardFile], dict[str, bytes]]:
    """Files of a data set beside the rows, with equal numbers of lines (up to one).

    Args:
        folder: of the files.
        tables: lines by split, at least one each.
        shard_bytes: target size of a file in uncompressed bytes.
        metadata: for the files' footers.

    Returns:
        The files' facts, and their bytes by name.
    """
    shards: list[ShardFile] = []
    files: dict[str, bytes] = {}
    for split, table in tables.items():
        lines = table.num_rows
        size = sum(content_bytes(table[name]) for name in table.schema.names)
        count = min(lines, max(1, -(-size // shard_bytes)))
        for i in range(count):
            start, stop = i * lines // count, (i + 1) * lines // count
            name = f"{folder}/{split}-{i:05d}-of-{count:05d}.parquet"
            files[name] = data_bytes(table.slice(start, stop - start), metadata)
            shards.append(shard_file(name, split, stop - start, files[name]))
    return shards, files


def shard_file(name: str, split: str, rows: int, data: bytes) -> ShardFile:
    """The facts of a file."""
    return ShardFile(name, split, rows, len(data), hashlib.sha256(data).hexdigest())


def data_bytes(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """Parquet as the Hub reads it well: row groups of some 64 MB, pages cut by content.

    Pages that are cut by content keep equal rows in equal bytes when rows are added, so that a new
    version uploads what is new.
    """
    size = sum(content_bytes(table[name]) for name in table.schema.names)
    rows = max(1, min(10_000, _GROUP_BYTES * table.num_rows // max(1, size)))
    return parquet_bytes(table, metadata, group_rows=rows, content_pages=True)


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
