"""Records of a file, one at a time, with what could not be read beside them.

No record is lost without a word: what cannot be read comes as a `BadRecord` with its reason. Where
a file breaks off (half a JSON list, a cut gzip), the records before the break are given and one
`BadRecord` with the code `damaged_file` stands for the rest.

JSON lines, CSV and Parquet are read in pieces. A `.json` file and any `.zst` or Parquet file is
held in memory as text or bytes, but its records are still decoded one by one.
"""

from __future__ import annotations

import base64
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import math
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import ConfigError
from stages.sources.forms import detect_form
from stages.storage import Store, iter_lines, read_file

TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = tuple(kind + packed for kind in TYPES for packed in ("", *COMPRESSIONS))
"""How the names of readable files end."""

RAW_CHARACTERS = 10_000
"""A reject's text is cut here."""

CSV_FIELD_CHARACTERS = 1 << 28
"""Characters in a CSV field; Python's own limit of 131,072 is less than a long conversation."""

_NO_PYTHON_VALUE = (ValueError, OverflowError, pa.ArrowException)
"""What Arrow raises for text that isn't UTF-8, far dates, unknown time zones, doubled fields."""

_BLANK = re.compile(r"[ \t\n\r]*")
_BOM = "\ufeff"


class Record(NamedTuple):
    """A record as it was read.

    Attributes:
        file: what the file is called.
        record: position in the file, from 0 (JSON lines: the how-manieth line that isn't blank).
        value: its columns.
    """

    file: str
    record: int
    value: dict[str, Any]
    text: str | None = None

    @property
    def raw(self) -> str:
        """The record's text in the file (as JSON where the file isn't text), cut."""
        text = self.text
        if text is None:
            text = json.dumps(self.value, ensure_ascii=False, default=str)
        return shown(text)


class BadRecord(NamedTuple):
    """A record that could not be read, with the reason (see `reasons.REASONS`) and its text."""

    file: str
    record: int
    reason: str
    raw: str


def shown(text: str) -> str:
    """The start of a text, with what isn't valid Unicode escaped, so that it can be stored."""
    return text[:RAW_CHARACTERS].encode("utf-8", "backslashreplace").decode()[:RAW_CHARACTERS]


def file_type(url: str) -> str | None:
    """The type in a file's name (`.jsonl`), whatever the compression; None where it is unknown."""
    name = url.lower()
    for packed in COMPRESSIONS:
        name = name.removesuffix(packed)
    return next((kind for kind in TYPES if name.endswith(kind)), None)


def records(
    url: str, *, file: str | None = None, key: str | None = None
) -> Iterator[Record | BadRecord]:
    """Every record of a file, in order.

    Args:
        url: path or fsspec URL.
        file: what records call the file; the URL unless given.
        key: the key of the list of records, for a `.json` file that holds an object.

    Raises:
        ConfigError: the type is unknown, the file cannot be opened, or `key` is given for a file
            that isn't `.json`.
    """
    kind, name = file_type(url), file or url
    if kind is None:
        raise ConfigError(f"{url} is of no known type; readable are {', '.join(TYPES)}")
    if key is not None and kind != ".json":
        raise ConfigError(f"{url}: `records: {key}` names a key of a .json file; remove it")
    if kind in (".jsonl", ".ndjson"):
        found = _json_lines(_texts(url), name)
    elif kind == ".csv":
        found = _csv(_texts(url), name)
    elif kind == ".parquet":
        found = _parquet(url, name)
    else:
        found = _json(url, name, key)
    number = 0
    try:
        for one in found:
            number = one.record + 1
            yield one
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        yield _damaged(name, number, str(error))
    except OSError as error:
        # gzip and bz2 report bad data as an OSError without a number; a disk's or store's has one.
        if isinstance(error, gzip.BadGzipFile) or _is_bad_data(url, error):
            yield _damaged(name, number, str(error))
        else:
            raise ConfigError(f"cannot read {url}: {error}") from error


def _is_bad_data(url: str, error: OSError) -> bool:
    return type(error) is OSError and error.errno is None and url.lower().endswith(COMPRESSIONS)


def _damaged(file: str, number: int, why: str, rest: str = "") -> BadRecord:
    return BadRecord(file, number, f"damaged_file: {why}", shown(rest))


# Bytes


def _texts(url: str) -> Iterator[str]:
    # Bytes that aren't UTF-8 become lone surrogates, so that only the record they are in is lost.
    lines = _zst_lines(url) if url.lower().endswith(".zst") else iter_lines(url)
    for number, line in enumerate(lines):
        text = line.decode("utf-8", "surrogateescape")
        yield text.removeprefix(_BOM) if number == 0 else text


def _content(url: str) -> bytes:
    return b"".join(_zst_pieces(url)) if url.lower().endswith(".zst") else read_file(url)


def _zst_pieces(url: str) -> Iterator[bytes]:
    # A stream reader would end without a word at the end of the first frame, or where a frame is
    # cut off; frame by frame, both are seen.
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f"to read {url}, install the package zstandard") from error
    folder, _, name = url.rpartition("/")
    packed = Store(folder or ".").read_bytes(name)
    position = 0
    while position < len(packed):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            piece = packed[position : position + (1 << 16)]
            if not piece:
                raise EOFError("the compressed file ends inside a frame")
            try:
                unpacked = frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise EOFError(f"no zstd data: {error}") from error
            yield unpacked
            position += len(piece)
        position -= len(frame.unused_data)


def _zst_lines(url: str) -> Iterator[bytes]:
    rest: list[bytes] = []
    for piece in _zst_pieces(url):
        *lines, last = piece.split(b"\n")
        for line in lines:
            yield b"".join([*rest, line, b"\n"])
            rest.clear()
        rest.append(last)
    if any(rest):
        yield b"".join(rest)


# JSON


class _Decoder:
    """JSON values that can be written as JSON again: NaN and infinity are noticed."""

    def __init__(self) -> None:
        self._refused: str | None = None
        self._json = json.JSONDecoder(parse_constant=self._refuse, parse_float=self._finite)

    def decode(self, text: str, start: int = 0) -> tuple[Any, int, str | None]:
        """The value at `start`, where it ends, and the first number in it that isn't finite.

        Raises:
            ValueError: there is no JSON value.
        """
        self._refused = None
        try:
            value, end = self._json.raw_decode(text, start)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        return value, end, self._refused

    def _refuse(self, constant: str) -> float:
        self._refused = self._refused or constant
        return float(constant)

    def _finite(self, digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            self._refuse(digits)
        return number


def _object(
    file: str, number: int, value: object, refused: str | None, text: str | None
) -> Record | BadRecord:
    if refused is None and isinstance(value, dict):
        return Record(file, number, value, text)
    if refused is not None:
        reason = f"unparsable: holds {refused}, which is no JSON number"
    else:
        reason = f"wrong_type: a record is an object, not {_type_name(value)}"
    return BadRecord(file, number, reason, shown(json.dumps(value) if text is None else text))


def _type_name(value: object) -> str:
    names = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def _json_lines(lines: Iterable[str], file: str) -> Iterator[Record | BadRecord]:
    decoder = _Decoder()
    filled = (text for line in lines if (text := line.strip(" \t\r\n")))
    for number, text in enumerate(filled):
        try:
            value, end, refused = decoder.decode(text)
        except ValueError as error:
            yield BadRecord(file, number, f"unparsable: {error}", shown(text))
            continue
        if end < len(text):
            reason = f"unparsable: more text after the value, at character {end}"
            yield BadRecord(file, number, reason, shown(text))
        else:
            yield _object(file, number, value, refused, text)


def _json(url: str, file: str, key: str | None) -> Iterator[Record | BadRecord]:
    text = _content(url).decode("utf-8", "surrogateescape").removeprefix(_BOM)
    start = _skip(text, 0)
    opening = text[start : start + 1]
    if not opening:
        return
    if opening == "[" and key is None:
        yield from _json_list(text, start + 1, file)
    elif opening == "[":
        yield _damaged(file, 0, f"holds a list, not an object with the key {key!r}", text)
    elif opening == "{":
        yield from _json_object(text, start, file, key)
    else:
        yield _damaged(file, 0, "holds neither a JSON list nor a JSON object", text)


def _json_list(text: str, position: int, file: str) -> Iterator[Record | BadRecord]:
    decoder, number = _Decoder(), 0
    position = _skip(text, position)
    closed = text[position : position + 1] == "]"
    while not closed:
        try:
            value, end, refused = decoder.decode(text, position)
        except ValueError as error:
            yield _damaged(file, number, f"the JSON list breaks off: {error}", text[position:])
            return
        yield _object(file, number, value, refused, text[position:end])
        number += 1
        position = _skip(text, end)
        mark = text[position : position + 1]
        closed = mark == "]"
        if mark == ",":
            position = _skip(text, position + 1)
        elif not closed:
            why = f"the JSON list breaks off at character {position}: no comma, no end"
            yield _damaged(file, number, why, text[position:])
            return
    rest = _skip(text, position + 1)
    if rest < len(text):
        yield _damaged(file, number, "more text after the JSON list", text[rest:])


def _json_object(text: str, start: int, file: str, key: str | None) -> Iterator[Record | BadRecord]:
    try:
        value, end, refused = _Decoder().decode(text, start)
        more = _skip(text, end) < len(text)
    except ValueError as error:
        if key is not None or not _second_line_is_object(text):
            yield _damaged(file, 0, f"the JSON object breaks off: {error}", text)
            return
        more = True
    if more and key is not None:
        yield _damaged(file, 0, f"holds several objects, so that {key!r} names no one list", text)
    elif more:
        lines = (match.group() for match in re.finditer(r"[^\n]+", text))
        yield from _json_lines(lines, file)
    else:
        yield from _inside(value, refused, text, file, key)


def _second_line_is_object(text: str) -> bool:
    lines = (match.group().strip(" \t\r") for match in re.finditer(r"[^\n]+", text))
    filled = (line for line in lines if line)
    next(filled, None)
    second = next(filled, "")
    try:
        value, end, _ = _Decoder().decode(second)
    except ValueError:
        return False
    return isinstance(value, dict) and end == len(second)


def _inside(
    value: dict[str, Any], refused: str | None, text: str, file: str, key: str | None
) -> Iterator[Record | BadRecord]:
    lists = [
        name
        for name, one in value.items()
        if isinstance(one, list) and all(isinstance(item, dict) for item in one)
    ]
    if key is not None:
        if not isinstance(value.get(key), list):
            why = f"no list under the key {key!r}; its keys are {', '.join(value)}"
            yield _damaged(file, 0, why, text)
            return
    elif detect_form(value) is not None or not lists:
        yield _object(file, 0, value, refused, text)
        return
    elif len(lists) > 1:
        why = f"lists under {', '.join(lists)}; name one with `records`"
        yield BadRecord(file, 0, f"unknown_form: {why}", shown(text))
        return
    else:
        key = lists[0]
    for number, item in enumerate(value[key]):
        # The decoder noticed that something isn't finite, but not where: look again, one by one.
        again = _Decoder().decode(json.dumps(item))[2] if refused is not None else None
        yield _object(file, number, item, again, None)


def _skip(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


# CSV


def _csv(lines: Iterator[str], file: str) -> Iterator[Record | BadRecord]:
    # The limit belongs to the process; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), CSV_FIELD_CHARACTERS))
    taken: list[str] = []

    def kept() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    # strict: else an open quote swallows the rest of the file into one field without a word.
    reader = csv.reader(kept(), strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            text = "".join(taken)
            if header is None:
                yield _damaged(file, 0, f"the header is no CSV: {error}", text)
                return
            if "unexpected end of data" in str(error):
                yield _damaged(file, number, "a quoted field has no end", text)
                return
            yield BadRecord(file, number, f"unparsable: {error}", shown(text))
            number += 1
            continue
        if not cells:
            continue
        if header is None:
            header = cells
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                why = f"the header names {', '.join(map(repr, twice))} twice"
                yield _damaged(file, 0, why, "".join(taken))
                return
            continue
        yield _csv_record(file, number, header, cells, "".join(taken))
        number += 1


def _csv_record(
    file: str, number: int, header: list[str], cells: list[str], text: str
) -> Record | BadRecord:
    if len(cells) > len(header):
        reason = f"unparsable: {len(cells)} fields under a header of {len(header)}"
        return BadRecord(file, number, reason, shown(text))
    missing = [None] * (len(header) - len(cells))
    return Record(file, number, dict(zip(header, [*cells, *missing], strict=True)), text)


# Parquet


def _parquet(url: str, file: str) -> Iterator[Record | BadRecord]:
    data = _content(url)
    if not data:
        return
    number = 0
    try:
        for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(batch_size=1024):
            for value, fault in _values(batch):
                yield _parquet_record(file, number, value, fault)
                number += 1
    except (pa.ArrowException, OSError) as error:
        yield _damaged(file, number, f"no readable Parquet: {error}")


def _values(batch: pa.RecordBatch) -> list[tuple[dict[str, Any], str | None]]:
    """Columns of every row, and why it is no record where one of them can't be read."""
    if len(set(batch.schema.names)) == batch.num_columns:
        try:
            return [(value, None) for value in batch.to_pylist()]
        except _NO_PYTHON_VALUE:
            pass
    return [_readable(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _readable(row: pa.RecordBatch) -> tuple[dict[str, Any], str | None]:
    """The columns of a row that can be read, and the fault of the first that can't."""
    value: dict[str, Any] = {}
    faults = []
    for name, column in zip(row.schema.names, row.columns, strict=True):
        if name in value:
            faults.append(f"unparsable: two columns are called {name!r}")
            continue
        try:
            value[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            faults.append(f"invalid_unicode: column {name!r}: {error}")
        except _NO_PYTHON_VALUE:
            why = f"column {name!r} has a value of type {column.type} that Python can't hold"
            faults.append(f"unparsable: {why}")
    return value, next(iter(faults), None)


def _parquet_record(
    file: str, number: int, value: dict[str, Any], fault: str | None
) -> Record | BadRecord:
    if fault is None:
        try:
            return Record(file, number, {name: plain(one) for name, one in value.items()})
        except ValueError as error:
            fault = f"unparsable: {error}"
    return BadRecord(file, number, fault, shown(json.dumps(value, ensure_ascii=False, default=str)))


def plain(value: Any) -> Any:
    """A Parquet value as JSON has it. NaN is null: that is how pandas writes a missing number."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError("holds infinity, which is no JSON number")
        return None if math.isnan(value) else value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta, uuid.UUID)):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(f"holds a {type(value).__name__}, which has no form in JSON")
