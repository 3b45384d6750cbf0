"""Rows in memory as a source's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stages.errors import ConfigError
from stages.session.kinds import arrow_table, is_rows
from stages.sources.settings import Source


def in_memory(value: Any) -> Any:
    """The rows that a source is given as; None where it is files."""
    if isinstance(value, Mapping):
        return value.get("data")
    return value if is_rows(value) else None


def json_lines(name: str, data: Any) -> bytes:
    """The rows of a source as JSON lines.

    Raises:
        ConfigError: they are no rows, or a record holds what JSON can't.
    """
    try:
        listed = data if isinstance(data, list | tuple) else arrow_table(data, {}).to_pylist()
        return b"".join(_json_line(record) for record in listed)
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"source {name}: a text holds a lone surrogate, which no Arrow column can "
            f"({error}); give the rows as a list of dicts (frame.to_dict('records')) to have "
            "it rejected"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"source {name}: a record can't be written as JSON: {error}") from error


def facts_of(source: Source) -> dict[str, Any]:
    """A source's fields as a card names them, its files by their own names."""
    paths = [
        path if "://" in path else path.rstrip("/").rpartition("/")[2] for path in source.paths
    ]
    return source.model_dump(mode="json") | {"path": paths}


def _json_line(record: Any) -> bytes:
    """A record as a line of JSON; lone surrogates are escaped, for ingest to find and reject.

    Raises:
        TypeError: a value is of no type that JSON has.
        ValueError: a number isn't finite.
    """
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        line = json.dumps(record, allow_nan=False).encode()
    return line + b"\n"
