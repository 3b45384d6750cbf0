"""The struct that says how an emitted row came to be."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from stages.emission.formats import narrow_type, used_fields


def provenance_type(chunks: Sequence[pa.Table], names: Sequence[str]) -> pa.StructType | None:
    """The fields that some emitted row fills: licence, answer, stage columns, original text.

    Args:
        chunks: emitted rows.
        names: stage columns to carry, where they are scalar.

    Returns:
        A struct type, or None where there is nothing to tell.
    """
    fields = []
    for name in ("license", "answer", *names):
        columns = [chunk[name] for chunk in chunks if name in chunk.column_names]
        if any(column.null_count < len(column) for column in columns):
            fields.append(pa.field(name, columns[0].type))
    originals = [chunk["original"] for chunk in chunks if "original" in chunk.column_names]
    if any(column.null_count < len(column) for column in originals):
        fields.append(pa.field("original", narrow_type(used_fields(originals))))
    return pa.struct(fields) if fields else None


def provenance(rows: pa.Table, kind: pa.StructType) -> pa.StructArray:
    """The struct of these rows."""
    columns = [rows[field.name].combine_chunks().cast(field.type) for field in kind]
    return pa.StructArray.from_arrays(columns, fields=list(kind))
