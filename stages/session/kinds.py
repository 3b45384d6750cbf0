"""Rows as their user holds them: Arrow table, pandas frame, list of dicts or `datasets.Dataset`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import pyarrow as pa

from stages.errors import ConfigError

Rows = TypeVar("Rows")
"""Any of the four kinds: what comes in as one goes out as the same."""


def is_rows(value: object) -> bool:
    """Whether a value is rows of one of the four kinds."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(isinstance(row, Mapping) for row in value)
    return isinstance(value, pa.Table) or _is(value, "pandas", "DataFrame") or _is_dataset(value)


def arrow_table(rows: object, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Rows of any kind as an Arrow table.

    Args:
        rows: of one of the four kinds. A list without rows has all the columns that have a type.
        types: Arrow types of columns by name; those of others are inferred.

    Raises:
        ConfigError: they are of none of the kinds, two columns have one name, or a column can't be
            of its type or of any.
    """
    if isinstance(rows, pa.Table):
        table = rows
    elif _is(rows, "pandas", "DataFrame"):
        frame = cast(Any, rows)
        names = [str(name) for name in frame.columns]
        columns = [_array(name, frame.iloc[:, at]) for at, name in enumerate(names)]
        table = pa.Table.from_arrays(columns, names)
    elif _is_dataset(rows):
        data = cast(Any, rows)
        # Arrow has no class labels, images or audio; the schema's metadata tells of them.
        features = data.features.arrow_schema.metadata
        table = data.with_format("arrow")[:].replace_schema_metadata(features)
    elif is_rows(rows):
        listed = cast("Sequence[Mapping[str, Any]]", rows)
        names = list(dict.fromkeys(name for row in listed for name in row) if listed else types)
        columns = [_listed(name, listed, types.get(name)) for name in names]
        table = pa.Table.from_arrays(columns, [str(name) for name in names])
    else:
        raise ConfigError(
            f"rows are of type {type(rows).__name__}; give an Arrow table, a pandas frame, a list "
            "of dicts or a datasets.Dataset"
        )
    twice = [name for name, times in Counter(table.column_names).items() if times > 1]
    if twice:
        raise ConfigError(f"there are several columns {twice[0]}; rename or leave out all but one")
    for place, name in enumerate(table.column_names):
        wanted = types.get(name)
        if wanted is not None and table[name].type != wanted:
            field = table.field(place).with_type(wanted)
            table = table.set_column(place, field, _cast(name, table[name], wanted))
    return table


def same_rows(rows: Rows, table: pa.Table, keep: pa.ChunkedArray | None = None) -> Rows:
    """The given rows with a table's columns: what their kind says of rows and of columns stays.

    That is the index of a pandas frame, and the format, split and description of a
    `datasets.Dataset`; its features and an Arrow table's metadata are in the table's schema.

    Args:
        rows: of one of the four kinds.
        table: a row for each of them that is kept, in their order.
        keep: which are; None: all.
    """
    made: Any = same_kind(rows, table)
    if _is(rows, "pandas", "DataFrame"):
        index = cast(Any, rows).index
        made.index = index if keep is None else index[keep.to_numpy()]
    elif _is_dataset(rows):
        made = _like(cast(Any, rows), made)
    return cast(Rows, made)


def same_kind(rows: Rows, table: pa.Table) -> Rows:
    """New rows: a table as the kind that the given rows are.

    A pandas frame gets columns of Arrow types, so that nulls and lists stay what they are. A
    `datasets.Dataset` has no dictionary types: labels are strings there.
    """
    made: Any = table
    if _is(rows, "pandas", "DataFrame"):
        import pandas as pd

        made = table.to_pandas(types_mapper=pd.ArrowDtype)
    elif _is_dataset(rows):
        from datasets import Dataset

        fields = [
            field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field
            for field in table.schema
        ]
        made = Dataset(table.cast(pa.schema(fields, table.schema.metadata)))
    elif not isinstance(rows, pa.Table):
        made = table.to_pylist()
    return cast(Rows, made)


def _like(given: Any, made: Any) -> Any:
    """A `datasets.Dataset` with what another says beside its rows; new columns are shown."""
    from datasets import Dataset

    about = given.info.copy()
    about.features = made.features
    form = given.format
    hidden = set(given.column_names) - set(form["columns"])
    return Dataset(made.data, info=about, split=given.split).with_format(
        form["type"],
        columns=[name for name in made.column_names if name not in hidden] if hidden else None,
        output_all_columns=form["output_all_columns"],
        **form["format_kwargs"],
    )


def _listed(name: str, rows: Sequence[Mapping[str, Any]], kind: pa.DataType | None) -> pa.Array:
    values = [row.get(name) for row in rows]
    if kind is not None and pa.types.is_dictionary(kind):
        return _array(name, values, kind.value_type).dictionary_encode()
    return _array(name, values, kind)


def _array(name: str, values: Any, kind: pa.DataType | None = None) -> Any:
    """A column; NaN, by which pandas means a missing value, is null."""
    try:
        return pa.array(values, kind, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"the column {name} can't be read: {error}; it needs values of one type that Arrow has "
            "(no integers of more than 64 bits, no lone surrogates): mend it, or leave it out. In "
            "a list of dicts, ingest takes or rejects such records one by one"
        ) from error


def _cast(name: str, column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        if pa.types.is_nested(kind):
            # A cast wants the same fields; turns may lack those that are null in all of them.
            return pa.chunked_array([pa.array(column.to_pylist(), kind)])
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise ConfigError(
            f"the column {name} has the type {column.type}, and {kind} is needed: {error}"
        ) from error


def _is(value: object, module: str, name: str) -> bool:
    """Whether a value is of a class of a library, which then is loaded already."""
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(value, found)


def _is_dataset(value: object) -> bool:
    return _is(value, "datasets", "Dataset")
