"""Rows in memory as a source's file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from stages.errors import ConfigError
from stages.session.kinds import arrow_table, is_rows
from stages.sources.readers import plain
from stages.sources.settings import Source
from stages.storage import Store


def in_memory(value: Any) -> Any:
    """The rows that a source is given as; None where it is files."""
    if isinstance(value, Mapping):
        return value.get("data")
    return value if is_rows(value) else None


def source_file(name: str, data: Any, folder: Store) -> str:
    """Write the rows of a source as a file, to be read as any other.

    Args:
        name: of the source.
        data: lists of records become JSON lines, tables Parquet.
        folder: where the file is written.

    Returns:
        Its URL. It is called otherwise than its source, so that it is never taken for a file of
        the catalogue.

    Raises:
        ConfigError: they are no rows, or a value is of no type that such a file has.
    """
    file = f"{name}-in-memory"
    try:
        if isinstance(data, list | tuple):
            file += ".jsonl"
            folder.write_bytes(file, b"".join(_json_lines(data)))
        else:
            file += ".parquet"
            folder.write_table(file, arrow_table(data, {}))
    except (ConfigError, pa.ArrowNotImplementedError) as error:
        raise ConfigError(f"source {name}: {error}") from error
    return f"{folder.url}/{file}"


def facts_of(source: Source) -> dict[str, Any]:
    """A source's fields as a card names them, its files by their own names."""
    paths = [
        path if "://" in path else path.rstrip("/").rpartition("/")[2] for path in source.paths
    ]
    return source.model_dump(mode="json") | {"path": paths}


def _json_lines(records: Sequence[Any]) -> Iterator[bytes]:
    for number, record in enumerate(records):
        try:
            yield _json_line(record)
        except (pa.ArrowException, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"record {number} can't be written as JSON: {error}") from error


def _json_line(record: Any) -> bytes:
    """A record as a line of JSON; lone surrogates and infinity stay, for ingest to reject."""
    value = _json_value(record)
    try:
        line = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        line = json.dumps(value).encode()
    return line + b"\n"


def _json_value(value: Any) -> Any:
    """A value as readers of files have it. NaN is null: so pandas writes a missing number."""
    if isinstance(value, Mapping):
        return {str(name): _json_value(one) for name, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_json_value(one) for one in value]
    if value is None or isinstance(value, str | int):
        return value
    # Arrow knows the scalars of numpy and pandas, and what stands for a missing one.
    alone = np.atleast_1d(value) if isinstance(value, np.generic) else [value]
    known = pa.array(alone, from_pandas=True)[0].as_py()
    if isinstance(known, float):
        return None if math.isnan(known) else known
    return plain(known)
