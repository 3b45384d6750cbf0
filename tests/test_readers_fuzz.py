"""Any bytes: no reader crashes, and every record that is there is a row or a reject."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.ingest import IngestSettings, Reject, Row, ingest, iter_rows
from stages.rows import REJECTS, ROWS
from stages.sources.readers import BadRecord, Record, records
from stages.sources.reasons import REASONS, code_of
from stages.sources.settings import Source
from stages.storage import Store

ROOT = Path(__file__).resolve().parents[1]
TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
PACKED = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}

fuzzed = settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# Text as it is found: what JSON, CSV and encodings trip over, and anything else.
awkward = st.sampled_from(
    ["", " ", "\ufeff", "\x00", "\r\n", "\u2028", "\ud800", "\udfff", "\"", "\\", ",", "NaN",
     "1e999", "null", "<|endoftext|>", "é", "\x85", "\x1c"]
)  # fmt: skip
text = st.lists(st.one_of(awkward, st.text(max_size=5)), max_size=4).map("".join)
scalar = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text)
value = st.recursive(
    scalar,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=8,
)
known = st.sampled_from(
    ["messages", "conversations", "instruction", "input", "output", "response", "history",
     "prompt", "completion", "question", "answer", "problem", "solution", "system", "tools",
     "label", "chosen", "rejected", "license"]
)  # fmt: skip
turn = st.one_of(
    value,
    st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "tool_calls", "train", "weight"]),
        st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human"]), value),
        max_size=4,
    ),
)
record = st.dictionaries(
    st.one_of(known, text), st.one_of(value, st.lists(turn, max_size=3)), max_size=5
)
line = st.one_of(record, value)


def judged(path: Path) -> list[Row | Reject]:
    """What becomes of a file's records, in memory and as written; none is lost on the way."""
    found = list(iter_rows(Source(name="s", path=str(path))))
    for one in found:
        if isinstance(one, Reject):
            assert code_of(one.reason) in REASONS
            one.raw.encode()
            one.reason.encode()
    total, kept, rejected = written(path)
    assert total == kept + rejected == len(found) + 1
    return found


def written(path: Path) -> tuple[int, int, int]:
    """Records, rows and rejects of a file, and of one more row, as counted and as written."""
    store = Store("memory://fuzzed-readers")
    store.remove("")
    chosen = IngestSettings(max_reject_rate=1, allow_empty_sources=True)
    anyway = path.with_name("anyway.jsonl")
    anyway.write_text('{"question": "so that a row is left", "answer": "yes"}\n')
    source = Source(name="s", path=[str(path), str(anyway)])
    report = ingest([source], [], chosen, store)
    kept, rejected = (
        sum(store.read_table(name).num_rows for name, _ in shards)
        for shards in (report.shards, report.reject_shards)
    )
    assert all(store.read_table(n).schema.remove_metadata() == ROWS for n, _ in report.shards)
    assert all(
        store.read_table(n).schema.remove_metadata() == REJECTS for n, _ in report.reject_shards
    )
    numbers = report.sources["s"]
    assert (numbers.kept, numbers.rejected.total()) == (kept, rejected)
    return numbers.records, kept, rejected


@fuzzed
@given(data=st.binary(max_size=300), kind=st.sampled_from(TYPES), packed=st.sampled_from([*PACKED]))
def test_byte_soup(tmp_path: Path, data: bytes, kind: str, packed: str) -> None:
    for name, content in (("a", data), ("b", PACKED[packed](data))):
        path = tmp_path / f"{name}{kind}{packed}"
        path.write_bytes(content)
        judged(path)
        path.unlink()


@fuzzed
@given(lines=st.lists(line, max_size=6), end=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
def test_every_json_line_is_a_row_or_a_reject(
    tmp_path: Path, lines: list[Any], end: str, mark: bool
) -> None:
    data = "".join(json.dumps(one) + end for one in lines).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + data)
    assert [one.record for one in judged(path)] == list(range(len(lines)))


@fuzzed
@given(lines=st.lists(line, max_size=6), indent=st.sampled_from([None, 1]))
def test_every_member_of_a_json_list_is_a_row_or_a_reject(
    tmp_path: Path, lines: list[Any], indent: int | None
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(lines, indent=indent))
    assert [one.record for one in judged(path)] == list(range(len(lines)))


cells = st.lists(st.lists(text, min_size=1, max_size=4), max_size=6)


@fuzzed
@given(rows=cells, end=st.sampled_from(["\n", "\r\n"]))
def test_every_csv_record_is_a_row_or_a_reject(
    tmp_path: Path, rows: list[list[str]], end: str
) -> None:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["question", "answer"])
    writer.writerows(rows)
    path = tmp_path / "x.csv"
    path.write_bytes(sink.getvalue().encode("utf-8", "surrogatepass"))
    found = list(records(str(path)))
    assert [one.record for one in found] == list(range(len(rows)))
    for cells, one in zip(rows, found, strict=True):
        broken = any("\ud800" <= letter <= "\udfff" for letter in "".join(cells))
        if len(cells) > 2:
            assert isinstance(one, BadRecord)
        elif isinstance(one, Record) and not broken:
            assert [one.value[name] for name in ("question", "answer")][: len(cells)] == cells
    judged(path)


@fuzzed
@given(
    values=st.lists(
        st.fixed_dictionaries(
            {
                "question": st.one_of(st.none(), st.text(max_size=5)),
                "answer": st.one_of(st.none(), st.text(max_size=5)),
                "nested": st.one_of(
                    st.none(),
                    st.lists(
                        st.one_of(
                            st.none(),
                            st.fixed_dictionaries({"a": st.one_of(st.none(), st.floats())}),
                        ),
                        max_size=3,
                    ),
                ),
            }
        ),
        max_size=5,
    )
)
def test_every_parquet_row_is_a_row_or_a_reject(
    tmp_path: Path, values: list[dict[str, Any]]
) -> None:
    kinds = pa.schema(
        [("question", pa.string()), ("answer", pa.string()),
         ("nested", pa.list_(pa.struct([("a", pa.float64())])))]
    )  # fmt: skip
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(values, schema=kinds), path)
    assert [one.record for one in judged(path)] == list(range(len(values)))


ZONES = (None, "UTC", "Asia/Tokyo", "Nowhere/Land")
COUNTED: list[pa.DataType] = [
    *[pa.timestamp(unit, zone) for unit in ("ms", "us", "ns") for zone in ZONES],
    *[pa.duration(unit) for unit in ("s", "ms", "us", "ns")],
    pa.time64("us"),
    pa.time64("ns"),
    pa.date32(),
]
"""Types whose values are counts of units since some start, and so may lie beyond any calendar."""


def counted(numbers: list[int], kind: pa.DataType) -> pa.Array:
    width = pa.int32() if pa.types.is_date32(kind) else pa.int64()
    bits = 8 * width.byte_width
    return pa.array([n >> (64 - bits) for n in numbers], width).view(kind)


whole = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**40), 2**40))


@fuzzed
@given(
    rows=st.lists(st.tuples(whole, whole), min_size=1, max_size=5),
    kinds=st.tuples(st.sampled_from(COUNTED), st.sampled_from(COUNTED)),
    nested=st.booleans(),
    names=st.tuples(st.sampled_from(["when", "answer"]), st.sampled_from(["when", "then"])),
)
def test_far_times_unknown_zones_and_doubled_columns_of_parquet(
    tmp_path: Path,
    rows: list[tuple[int, int]],
    kinds: tuple[pa.DataType, pa.DataType],
    nested: bool,
    names: tuple[str, str],
) -> None:
    first, second = (
        counted(list(column), kind)
        for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)
    )
    if nested:
        ends = pa.array(range(len(rows) + 1), pa.int32())
        second = pa.ListArray.from_arrays(ends, pa.StructArray.from_arrays([second], ["at"]))
    texts = [pa.array([f"{letter} {i}" for i in range(len(rows))]) for letter in "qa"]
    table = pa.table([*texts, first, second], names=["question", "answer", *names])
    path = tmp_path / "x.parquet"
    pq.write_table(table, path)
    found = judged(path)
    assert [one.record for one in found] == list(range(len(rows)))
    if len(set(table.column_names)) < table.num_columns:
        assert not any(isinstance(one, Row) for one in found)
        return
    # A row's fate is its own.
    for place, one in enumerate(found):
        pq.write_table(table.slice(place, 1), path)
        (alone,) = iter_rows(Source(name="s", path=str(path)))
        assert type(alone) is type(one)


def test_a_name_of_two_parquet_columns_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    columns = [pa.array(["a", "b"]), pa.array(["c", "d"]), pa.array(["e", "f"])]
    pq.write_table(pa.table(columns, names=["question", "answer", "answer"]), path)
    found = judged(path)
    assert all(isinstance(one, Reject) for one in found)
    assert [one.reason for one in found if isinstance(one, Reject)] == [
        "unparsable: two columns are called 'answer'"
    ] * 2


def test_what_parquet_holds_beyond_json_is_read_or_rejected_by_its_column(tmp_path: Path) -> None:
    odd = {
        "far": pa.array([10**15, 0], pa.timestamp("s")),
        "date": pa.array([2**30, 0], pa.date32()),
        "long": pa.array([2**62, 0], pa.duration("s")),
        "zone": pa.array([1, 0], pa.timestamp("us", "Nowhere/Land")),
        "uuid": pa.array([bytes(16), bytes(16)], pa.uuid()),
    }
    texts = {"question": pa.array(["a", "b"]), "answer": pa.array(["c", "d"])}
    kept = []
    for name, values in odd.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({**texts, name: values}), path)
        found = judged(path)
        kept.append([isinstance(one, Row) for one in found])
        rejects = [one for one in found if isinstance(one, Reject)]
        assert all(f"unparsable: column '{name}'" in one.reason for one in rejects)
    assert kept == [*[[False, True]] * 3, [False, False], [True, True]]


SOME = [{"question": f"What is {i}?", "answer": f"It is {i}, é."} for i in range(200)]
ENCODED = {
    ".jsonl": "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in SOME).encode(),
    ".json": json.dumps(SOME, ensure_ascii=False).encode(),
    ".csv": "".join(
        ["question,answer\n", *(f'{one["question"]},"{one["answer"]}"\n' for one in SOME)]
    ).encode(),
}


@pytest.mark.parametrize("packed", [one for one in PACKED if one])
@pytest.mark.parametrize("kind", ENCODED)
@settings(fuzzed, max_examples=15)
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_files_give_what_stands_before_the_cut_and_say_that_more_is_lost(
    tmp_path: Path, kind: str, packed: str, share: float
) -> None:
    data = PACKED[packed](ENCODED[kind])
    path = tmp_path / f"x{kind}{packed}"
    path.write_bytes(data[: int(len(data) * share)])
    *rows, last = judged(path) or [None]
    if last is None:
        # Nothing at all is an empty file.
        assert path.stat().st_size == 0
        return
    assert isinstance(last, Reject)
    whole = [one for one in rows if isinstance(one, Row)]
    assert [one.messages[0]["content"] for one in whole] == [
        one["question"] for one in SOME[: len(whole)]
    ]


@settings(fuzzed, max_examples=60)
@given(
    kind=st.sampled_from([*ENCODED]), seed=st.integers(0, 2**16), packed=st.sampled_from([*PACKED])
)
def test_flipped_bytes_lose_no_record_without_a_word(
    tmp_path: Path, kind: str, seed: int, packed: str
) -> None:
    draws = random.Random(seed)
    data = bytearray(PACKED[packed](ENCODED[kind]))
    for _ in range(draws.randint(1, 5)):
        data[draws.randrange(len(data))] = draws.randrange(256)
    path = tmp_path / f"x{kind}{packed}"
    path.write_bytes(data)
    found = judged(path)
    damaged = any(isinstance(one, Reject) for one in found)
    assert len(found) >= len(SOME) or damaged


@pytest.mark.parametrize(
    "encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32", "cp1252", "gb18030"]
)
@pytest.mark.parametrize("kind", ENCODED)
def test_other_encodings_are_rejected_not_misread(tmp_path: Path, kind: str, encoding: str) -> None:
    path = tmp_path / f"x{kind}"
    path.write_bytes(ENCODED[kind].decode().encode(encoding))
    found = judged(path)
    assert found
    assert not any(isinstance(one, Row) for one in found)


def test_one_line_in_another_encoding_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = b'{"question": "a", "answer": "b"}\n'
    path.write_bytes(good + '{"question": "é", "answer": "b"}\n'.encode("latin-1") + good)
    kinds = [type(one).__name__ for one in judged(path)]
    assert kinds == ["Row", "Reject", "Row"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        # The last of equal keys counts, as in every JSON library.
        ('{"question": "a", "question": "b", "answer": "c"}', ["b", "c"]),
        ('{"instruction": "add", "input": null, "output": "3", "n": 12345678901234567890123}',
         ["add", "3"]),
    ],
)  # fmt: skip
def test_duplicate_keys_and_long_numbers(tmp_path: Path, record: str, said: list[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(record + "\n")
    (row,) = judged(path)
    assert isinstance(row, Row)
    assert [turn["content"] for turn in row.messages] == said
    if "n" in json.loads(record):
        assert json.loads(row.extra or "") == {"n": 12345678901234567890123}


@pytest.mark.parametrize(
    "record", ['{"question": 1, "answer": "2"}', '{"question": "1", "answer": 2}']
)
def test_numbers_where_text_belongs_are_rejected(tmp_path: Path, record: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(record + "\n")
    (reject,) = judged(path)
    assert isinstance(reject, Reject)
    assert reject.reason.startswith("wrong_type")


def test_marks_of_byte_order_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    for kind, data in ENCODED.items():
        plain, windows = tmp_path / f"plain{kind}", tmp_path / f"windows{kind}"
        plain.write_bytes(data)
        windows.write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
        assert [one.messages for one in judged(plain)] == [one.messages for one in judged(windows)]


READ = """
import json, re, sys
from pathlib import Path
from stages.ingest import Reject, iter_rows
from stages.sources import Source
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
rows = iter_rows(Source(name="s", path=sys.argv[1]))
found = [(one.reason, len(one.raw)) if isinstance(one, Reject) else None for one in rows]
print(json.dumps([found, peak() - before]))
"""


def read_apart(path: Path) -> tuple[list[Any], int]:
    """Reason and length of raw text of rejects, None for rows; and the memory that it took."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, taken = json.loads(done.stdout)
    return found, taken


def file_of(kind: str, records: list[dict[str, str]]) -> bytes:
    if kind == ".csv":
        return "".join(
            ["question,answer\n", *(f'"{one["question"]}",{one["answer"]}\n' for one in records)]
        ).encode()
    text = json.dumps(records) if kind == ".json" else "\n".join(map(json.dumps, records))
    return text.encode()


QUICKLY = {**PACKED, ".gz": lambda data: gzip.compress(data, 1)}
MEGABYTE = 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_line_of_100_megabytes_is_one_reject(tmp_path: Path, kind: str, packed: str) -> None:
    long = "word " * (20 * MEGABYTE)
    data = file_of(kind, [{"question": long, "answer": "b"}, {"question": "a", "answer": "b"}])
    path = tmp_path / f"x{kind}{packed}"
    path.write_bytes(QUICKLY[packed](data))
    found, taken = read_apart(path)
    assert found == [["too_long: 100000001 characters", 10_000], None]
    assert taken < 12 * len(data)
    cut = tmp_path / f"cut{kind}{packed}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    ((reason, shown),), taken = read_apart(cut)
    assert code_of(reason) == ("unparsable" if (kind, packed) == (".jsonl", "") else "damaged_file")
    assert shown <= 10_000
    assert taken < 12 * len(data)


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_100_megabytes_of_lines_take_the_memory_of_one(
    tmp_path: Path, kind: str, packed: str
) -> None:
    row = {"question": "word " * 20_000, "answer": "b"}
    path = tmp_path / f"x{kind}{packed}"
    path.write_bytes(QUICKLY[packed](file_of(kind, [row] * 1000)))
    found, taken = read_apart(path)
    assert found == [None] * 1000
    assert taken < 20 * MEGABYTE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "opening"), [(".jsonl", '{"question": "'), (".json", '[{"question": "'), (".csv", '"')]
)
def test_100_megabytes_without_an_end_are_one_reject(
    tmp_path: Path, kind: str, opening: str
) -> None:
    path = tmp_path / f"x{kind}"
    path.write_text(opening + "x" * (100 * MEGABYTE))
    ((reason, _),), taken = read_apart(path)
    assert code_of(reason) in ("unparsable", "damaged_file")
    assert taken < 1000 * MEGABYTE
