"""Sources to shards: counts on every real file, duplicates, anchors, limits and equal bytes."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from stages.errors import ConfigError, StageError
from stages.ingest import IngestReport, IngestSettings, Reject, Row, content_of, ingest, iter_rows
from stages.rows import REJECTS, ROWS, TARGETS, row_id
from stages.sources.settings import Source, Target
from stages.storage import Store

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data isn't at {DATA}")

PAIR = ("instruction", "input", "output")

# File, its records, the columns that make its text, and its rejects.
SOURCES: list[tuple[str, int, tuple[str, ...], dict[str, int]]] = [
    ("alpaca_5000.json", 5000, PAIR, {"empty_turn": 2}),
    ("dolly_3k.json", 2996, PAIR, {"duplicate": 2}),
    ("flan_cot_aqua.json", 2728, PAIR, {}),
    ("flan_cot_creak.json", 6915, PAIR, {}),
    ("flan_cot_ecqa.json", 7112, PAIR, {}),
    ("flan_cot_qasc.json", 1084, PAIR, {}),
    ("flan_cot_sensemaking.json", 6070, PAIR, {}),
    ("flan_cot_strategyqa.json", 2061, PAIR, {}),
    ("gpteacher_codegen.json", 4535, ("instruction", "input", "response"), {}),
    ("gpteacher_roleplay.json", 1923, ("instruction", "input", "response"), {}),
    ("gpteacher_toolformer.json", 7673, ("instruction", "input", "response"), {}),
    ("gsm8k_train.jsonl", 7473, ("question", "answer"), {}),
    ("lima_history.json", 1029, (*PAIR, "history"), {}),
    ("math_5000.jsonl", 5000, ("problem", "solution"), {}),
    ("math_adapters.json", 3260, PAIR, {"empty_turn": 3, "duplicate": 9}),
    ("messages_kto_demo.json", 300, ("messages", "label"), {"bad_label": 150}),
    ("new_codealpaca.json", 4535, PAIR, {}),
    ("small_instructions.json", 1100, PAIR, {}),
    ("t0_20k.jsonl.gz", 20_000, ("prompt", "completion"), {"duplicate": 476}),
]

TARGET_FILES: list[tuple[str, int, tuple[str, ...], int]] = [
    ("aime24.jsonl", 30, ("problem",), 30),
    ("aime25.jsonl", 30, ("problem",), 30),
    ("gsm8k_test.jsonl", 1319, ("question", "answer"), 1319),
    ("humaneval.jsonl.gz", 164, ("prompt", "canonical_solution"), 0),
    ("math500.jsonl", 500, ("problem", "solution"), 500),
    ("mbpp.jsonl", 974, ("text", "code"), 0),
    ("mt_bench_questions.jsonl", 80, ("turns",), 0),
    ("truthfulqa.csv", 817, ("Question", "Best Answer"), 0),
    ("tydiqa_id_validation.jsonl", 565, ("input", "target"), 0),
]


def plain(path: Path) -> list[dict[str, Any]]:
    """A file's records, read without the code under test."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".json":
        found: list[dict[str, Any]] = json.loads(path.read_bytes())
        return found
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.split(b"\n") if line.strip()]


def distinct(records: list[dict[str, Any]], columns: tuple[str, ...]) -> int:
    return len({json.dumps([record.get(name) for name in columns]) for record in records})


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def pairs(numbers: range, answer: str = "A") -> list[dict[str, str]]:
    return [{"question": f"Q{i}", "answer": f"{answer}{i}"} for i in numbers]


def source(name: str, path: Path, **fields: Any) -> Source:
    return Source(name=name, path=str(path), **fields)


def run(
    store: Store, *sources: Source, targets: tuple[Target, ...] = (), **settings: Any
) -> IngestReport:
    return ingest(sources, targets, IngestSettings(**settings), store)


def table(store: Store, shards: list[tuple[str, int]]) -> pa.Table:
    return pa.concat_tables([store.read_table(name) for name, _ in shards], promote_options="none")


def all_bytes(store: Store) -> dict[str, bytes]:
    return {
        f"{folder}/{name}": store.read_bytes(f"{folder}/{name}" if folder else name)
        for folder in ("", "rejects", "targets")
        for name in store.names(folder)
        if name.endswith(".parquet")
    }


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Store:
    store = Store(f"memory://ingest-{abs(hash(request.node.nodeid))}")
    store.remove("")
    return store


# Real files


@needs_data
@pytest.mark.parametrize(("name", "count", "columns", "rejected"), SOURCES)
def test_every_source_file_loses_no_record(
    tmp_path: Path, name: str, count: int, columns: tuple[str, ...], rejected: dict[str, int]
) -> None:
    path = DATA / "sources" / name
    records = plain(path)
    assert len(records) == count
    store = Store(str(tmp_path))
    report = run(store, source("s", path)).as_dict()
    numbers = report["sources"]["s"]
    assert numbers["in"] == count == numbers["kept"] + sum(numbers["rejected"].values())
    assert numbers["rejected"] == rejected
    bad = sum(number for code, number in rejected.items() if code != "duplicate")
    assert numbers["kept"] == distinct(records, columns) - bad
    rows = table(store, report["shards"])
    assert rows.schema.remove_metadata() == ROWS
    assert rows.num_rows == numbers["kept"]
    assert rows["record"].to_pylist() == sorted(set(rows["record"].to_pylist()))
    assert rows["license"].null_count == 0
    assert set(rows["file"].to_pylist()) == {path.name}
    if name in SPECIAL:
        SPECIAL[name](records, rows, numbers)
    if rejected:
        rejects = table(store, report["reject_shards"])
        assert rejects.schema.remove_metadata() == REJECTS
        assert rejects.num_rows == count - numbers["kept"]
        for one in rejects.slice(0, 20).to_pylist():
            line = one["raw"]
            assert len(line) == 10_000 or json.loads(line) == records[one["record"]]


def _gsm8k(records: list[dict[str, Any]], rows: pa.Table, numbers: dict[str, Any]) -> None:
    for record, answer in zip(records, rows["answer"].to_pylist(), strict=True):
        assert answer == record["answer"].rpartition("#### ")[2].strip()
        float(answer.replace(",", ""))


def _math(records: list[dict[str, Any]], rows: pa.Table, numbers: dict[str, Any]) -> None:
    published = {one["problem"]: one["answer"] for one in plain(DATA / "targets" / "math500.jsonl")}
    found = {
        turns[0]["content"]: answer
        for turns, answer in zip(
            rows["messages"].to_pylist(), rows["answer"].to_pylist(), strict=True
        )
    }
    assert None not in found.values()
    common = published.keys() & found.keys()
    assert len(common) == 500
    assert [key for key in common if found[key] != published[key]] == []


def _t0(records: list[dict[str, Any]], rows: pa.Table, numbers: dict[str, Any]) -> None:
    assert all(one["completion"].endswith("<|endoftext|>") for one in records)
    assert numbers["end_markers"] == rows.num_rows
    columns = [rows[name].to_pylist() for name in ("record", "messages", "extra")]
    for index, turns, extra in zip(*columns, strict=True):
        assert [turn["content"] for turn in turns] == [
            records[index]["prompt"],
            records[index]["completion"][: -len("<|endoftext|>")],
        ]
        assert json.loads(extra) == {"template": records[index]["template"]}


def _kto(records: list[dict[str, Any]], rows: pa.Table, numbers: dict[str, Any]) -> None:
    assert all(records[index]["label"] is True for index in rows["record"].to_pylist())


def _lima(records: list[dict[str, Any]], rows: pa.Table, numbers: dict[str, Any]) -> None:
    for record, turns in zip(records, rows["messages"].to_pylist(), strict=True):
        said = [text for pair in record["history"] for text in pair]
        expected = [*said, record["instruction"], record["output"]]
        assert [turn["content"] for turn in turns] == expected
    assert sum(len(turns) > 2 for turns in rows["messages"].to_pylist()) == 29


def _adapters(records: list[dict[str, Any]], rows: pa.Table, numbers: dict[str, Any]) -> None:
    for index, answer in zip(rows["record"].to_pylist(), rows["answer"].to_pylist(), strict=True):
        assert answer == records[index]["answer"]


def _toolformer(records: list[dict[str, Any]], rows: pa.Table, numbers: dict[str, Any]) -> None:
    extra = [one for one in rows["extra"].to_pylist() if one is not None]
    assert extra == ['{"example_input":"The quick brown fox jumps over the lazy dog"}']


SPECIAL = {
    "gsm8k_train.jsonl": _gsm8k,
    "math_5000.jsonl": _math,
    "t0_20k.jsonl.gz": _t0,
    "messages_kto_demo.json": _kto,
    "lima_history.json": _lima,
    "math_adapters.json": _adapters,
    "gpteacher_toolformer.json": _toolformer,
}


@needs_data
@pytest.mark.parametrize(("name", "count", "columns", "answers"), TARGET_FILES)
def test_every_target_file_loses_no_record(
    tmp_path: Path, name: str, count: int, columns: tuple[str, ...], answers: int
) -> None:
    path = DATA / "targets" / name
    records = plain(path)
    assert len(records) == count == distinct(records, columns)
    store = Store(str(tmp_path))
    report = run(store, targets=(Target(name="t", path=str(path)),))
    assert report.targets["t"].as_dict()["in"] == count
    assert (report.targets["t"].kept, report.targets["t"].answers) == (count, answers)
    assert report.tasks == {"t": count}
    rows = store.read_table("targets/part-00000.parquet")
    assert rows.schema.remove_metadata() == TARGETS
    assert rows.num_rows == count
    last = Counter(turns[-1]["role"] for turns in rows["messages"].to_pylist())
    unanswered = {"aime25.jsonl": 1, "mt_bench_questions.jsonl": 80}.get(name, 0)
    assert last["user"] == unanswered
    if name == "math500.jsonl":
        assert rows["answer"].to_pylist() == [one["answer"] for one in records]
    if name == "mt_bench_questions.jsonl":
        for record, turns, extra in zip(
            records, rows["messages"].to_pylist(), rows["extra"].to_pylist(), strict=True
        ):
            assert [turn["content"] for turn in turns] == record["turns"][:1]
            assert json.loads(extra) == record


@needs_data
def test_big_bench_hard_gives_a_task_a_file(tmp_path: Path) -> None:
    folder = DATA / "targets" / "bbh"
    expected = {
        path.stem: len(json.loads(path.read_bytes())["examples"]) for path in folder.iterdir()
    }
    assert (len(expected), sum(expected.values())) == (27, 6511)
    store = Store(str(tmp_path))
    report = run(store, targets=(Target(name="bbh", path=str(folder), task="{file}"),))
    # Two examples of one task are there twice.
    assert report.tasks == {**expected, "sports_understanding": 248}
    assert report.targets["bbh"].rejected == {"duplicate": 2}
    rows = store.read_table("targets/part-00000.parquet")
    turns = rows["messages"].to_pylist()
    assert rows["answer"].to_pylist() == [one[-1]["content"] for one in turns]
    files = set(rows["file"].to_pylist())
    assert files == {f"{name}.json" for name in expected}


@needs_data
def test_preference_pairs_never_leak_in(tmp_path: Path) -> None:
    path = DATA / "sources" / "sharegpt_dpo_demo.json"
    records = plain(path)
    with pytest.raises(StageError, match=r"preference_pair 300.*preference: chosen"):
        run(Store(str(tmp_path / "a")), source("s", path))
    rejects = Store(str(tmp_path / "a")).read_table("rejects/part-00000.parquet")
    assert set(rejects["reason"].to_pylist()) == {
        "preference_pair: chosen and rejected, and the source doesn't say which"
    }
    store = Store(str(tmp_path / "b"))
    report = run(store, source("s", path, preference="chosen")).as_dict()["sources"]["s"]
    kept = distinct(records, ("conversations", "chosen"))
    assert (report["kept"], report["rejected"]) == (kept, {"duplicate": 300 - kept})
    rows = store.read_table("part-00000.parquet")
    for index, turns in zip(rows["record"].to_pylist(), rows["messages"].to_pylist(), strict=True):
        said = [turn["value"] for turn in records[index]["conversations"]]
        assert [turn["content"] for turn in turns] == [*said, records[index]["chosen"]["value"]]


@needs_data
def test_a_copy_of_a_source_is_an_error_that_says_so(tmp_path: Path) -> None:
    folder = DATA / "sources"
    first = source("codegen", folder / "gpteacher_codegen.json")
    again = source("copy", folder / "new_codealpaca.json")
    with pytest.raises(StageError, match=r"source copy.*duplicate 4535.*Remove it") as caught:
        run(Store(str(tmp_path)), first, again)
    assert caught.value.stage == "ingest"


# Quarantine


def test_bad_records_are_quarantined_with_their_place_and_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"question": "a", "answer": "b"}\n{"question": "half\n\n{"question": "c"}\n'
        b'{"question": "\\ud800", "answer": "b"}\n{"question": "a", "answer": "b"}\n'
        b'{"question": "x", "answer": "' + b"y" * 30_000 + b'"}\n'
    )
    store = Store(str(tmp_path / "run"))
    report = run(store, source("s", path), max_reject_rate=1, max_chars=20_000)
    rejects = store.read_table("rejects/part-00000.parquet").to_pylist()
    assert [(one["record"], one["reason"].partition(":")[0]) for one in rejects] == [
        (1, "unparsable"),
        (2, "no_assistant_turn"),
        (3, "invalid_unicode"),
        (4, "duplicate"),
        (5, "too_long"),
    ]
    assert rejects[0]["raw"] == '{"question": "half'
    assert len(rejects[4]["raw"]) == 10_000
    (row,) = store.read_table("part-00000.parquet").to_pylist()
    assert rejects[3]["reason"] == f"duplicate: {row['id']}"
    assert row["id"] == row_id(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None
    )
    assert report.totals()["in"] == 6
    json.dumps(report.as_dict(), allow_nan=False)


def test_too_many_rejects_fail_the_run_and_say_what_to_do(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [*pairs(range(7)), {"question": "a"}, {"b": 1}, {"b": 2}])
    message = r"source s: 3 of 10 records .*30\.0%.* 0\.2: unknown_form 2, no_assistant_turn 1"
    store = Store(str(tmp_path / "run"))
    with pytest.raises(StageError, match=message):
        run(store, source("s", path))
    assert store.read_table("rejects/part-00000.parquet").num_rows == 3
    assert run(store, source("s", path, max_reject_rate=0.3)).sources["s"].kept == 7
    # Duplicates are no fault of the data.
    path = lines(tmp_path / "y.jsonl", pairs(range(2)) * 5)
    assert run(store, source("s", path)).sources["s"].rejected == {"duplicate": 8}


def test_a_source_without_rows_is_an_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    empty = lines(tmp_path / "empty.jsonl", [])
    some = lines(tmp_path / "some.jsonl", pairs(range(3)))
    broken = lines(tmp_path / "broken.jsonl", [{"question": "a"}])
    with pytest.raises(ConfigError, match=r"source s: .*empty\.jsonl holds no record"):
        run(store, source("s", empty))
    with pytest.raises(ConfigError, match=r"holds no record in rows \[5, 9\]"):
        run(store, source("s", some, rows=(5, 9)))
    with pytest.raises(ConfigError, match="none"):
        run(store, source("s", tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="source s is named twice"):
        run(store, source("s", some), source("s", some))
    with pytest.raises(StageError, match="every one of its 1 rows"):
        run(store, source("s", broken), max_reject_rate=1)
    targets = (Target(name="a", path=str(some)), Target(name="b", path=str(some)))
    with pytest.raises(StageError, match=r"target b: every one of its 3 rows.*duplicate 3"):
        run(store, targets=targets)


def test_a_damaged_file_is_named_in_the_report(tmp_path: Path) -> None:
    text = json.dumps(pairs(range(50)))
    (tmp_path / "x.json").write_text(text[: len(text) // 2])
    report = run(Store(str(tmp_path / "run")), source("s", tmp_path / "x.json")).sources["s"]
    assert report.damaged_files == ["x.json"]
    assert report.rejected == {"damaged_file": 1}
    assert 20 <= report.kept < 26


# Shards and order


def test_shards_are_bounded_and_keep_the_order(memory: Store, tmp_path: Path) -> None:
    one = lines(tmp_path / "one.jsonl", pairs(range(7)))
    long = {"question": "Q", "answer": "x" * 500}
    two = lines(tmp_path / "two.jsonl", [*pairs(range(7, 9)), long, *pairs(range(9, 10))])
    report = run(
        memory,
        source("b", one),
        source("a", two),
        rows_per_shard=3,
        max_chars_per_shard=300,
        max_chars=None,
    )
    names = [name for name, _ in report.shards]
    assert names == [f"part-{i:05d}.parquet" for i in range(5)]
    assert [rows for _, rows in report.shards] == [3, 3, 3, 1, 1]
    rows = table(memory, report.shards)
    assert rows["source"].to_pylist() == ["b"] * 7 + ["a"] * 4
    assert rows["record"].to_pylist() == [*range(7), *range(4)]
    by_chars = run(memory, source("s", one), max_chars_per_shard=8, max_chars=None)
    assert [rows for _, rows in by_chars.shards] == [2, 2, 2, 1]


def test_slices_count_over_all_files(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    lines(folder / "a.jsonl", pairs(range(4)))
    lines(folder / "b.jsonl", pairs(range(4, 8)))
    (folder / "c.jsonl").write_text("never read")
    found = list(iter_rows(source("s", folder, rows=(2, 6))))
    places = [(row.file, row.record) for row in found]
    assert places == [("a.jsonl", 2), ("a.jsonl", 3), ("b.jsonl", 0), ("b.jsonl", 1)]


def test_same_bytes_every_time_and_everywhere(
    memory: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for place in ("here", "there"):
        folder = tmp_path / place
        folder.mkdir()
        lines(folder / "pool.jsonl", [*pairs(range(40)), *pairs(range(3)), {"bad": 1}])
        lines(folder / "goal.jsonl", pairs(range(100, 105)))
        monkeypatch.chdir(folder)
        for store in (Store(str(folder / "run")), memory.child(place)):
            ingest(
                [Source(name="pool", path="pool.jsonl")],
                [Target(name="goal", path="*goal*")],
                IngestSettings(rows_per_shard=16),
                store,
                metadata=lambda name: {"file": name, "stage": "f00"},
            )
            results.append(all_bytes(store))
    assert len(results[0]) == 5
    assert all(other == results[0] for other in results[1:])
    store = memory.child("here")
    assert store.table_metadata("rejects/part-00000.parquet") == {
        "file": "rejects/part-00000.parquet",
        "stage": "f00",
    }


def test_sources_are_read_from_memory_urls(memory: Store) -> None:
    memory.write_bytes("in/x.jsonl.gz", gzip.compress(b'{"question": "a", "answer": "b"}\n'))
    report = run(memory.child("out"), Source(name="s", path=f"{memory.url}/in"))
    assert report.sources["s"].files == ["x.jsonl.gz"]
    assert report.sources["s"].kept == 1


# Anchors and targets


@pytest.mark.parametrize("anchor_first", [True, False])
def test_anchors_count_first_wherever_they_stand(tmp_path: Path, anchor_first: bool) -> None:
    pool = source("pool", lines(tmp_path / "pool.jsonl", pairs(range(10))))
    anchor = source(
        "anchor", lines(tmp_path / "anchor.jsonl", pairs(range(5, 12)) * 2), role="anchor"
    )
    order = (anchor, pool) if anchor_first else (pool, anchor)
    store = Store(str(tmp_path / "run"))
    report = run(store, *order)
    assert (report.sources["pool"].kept, report.sources["anchor"].kept) == (5, 7)
    assert report.sources["pool"].rejected == {"duplicate": 5}
    assert report.sources["anchor"].rejected == {"duplicate": 7}
    rows = table(store, report.shards)
    assert list(dict.fromkeys(rows["source"].to_pylist())) == [one.name for one in order]


def test_one_prompt_with_two_responses_is_one_group(tmp_path: Path) -> None:
    records = [{"question": "Q", "answer": "one"}, {"question": "Q", "answer": "two"}]
    first, second = iter_rows(source("s", lines(tmp_path / "x.jsonl", records)))
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert first.group == second.group
    assert first.id != second.id
    (goal,) = iter_rows(
        Target(name="t", path=str(lines(tmp_path / "t.jsonl", [{"question": "Q"}])))
    )
    assert isinstance(goal, Row)
    assert (goal.group, goal.task) == (first.group, "t")


def test_tasks_come_from_a_column_or_the_file(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "x.jsonl",
        [{**one, "task": f"t{i % 2}"} for i, one in enumerate(pairs(range(5)))],
    )
    report = run(
        Store(str(tmp_path / "run")),
        targets=(
            Target(name="a", path=str(path), task_column="task"),
            Target(
                name="b",
                path=str(lines(tmp_path / "y.v1.jsonl", pairs(range(9, 10)))),
                task="m_{file}",
            ),
        ),
    )
    assert report.tasks == {"m_y.v1": 1, "t0": 3, "t1": 2}
    assert report.target_shards == [("targets/part-00000.parquet", 6)]
    assert report.shards == []


def test_content_changes_with_the_bytes_only(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", pairs(range(3)))
    spec = source("s", path)
    before = content_of([spec])
    ((name, identity),) = before["s"]
    assert name == "x.jsonl"
    assert identity.startswith("sha256:")
    path.write_bytes(path.read_bytes())
    assert content_of([spec]) == before
    lines(path, pairs(range(4)))
    assert content_of([spec]) != before


def test_rows_without_a_run(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [*pairs(range(1)), *pairs(range(1)), {"no": 1}])
    first, again, bad = iter_rows(source("s", path, license="MIT"))
    assert isinstance(first, Row)
    assert isinstance(again, Row)
    assert isinstance(bad, Reject)
    assert (first.id, first.license, first.chars) == (again.id, "MIT", 4)
    assert (bad.record, bad.reason, bad.raw) == (2, "unknown_form: columns no", '{"no": 1}')


def test_wrong_limits_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_chars 9 is more than max_chars_per_shard 5"):
        IngestSettings(max_chars=9, max_chars_per_shard=5)
    with pytest.raises(ValidationError, match="rows_per_shard"):
        IngestSettings(rows_per_shard=0)
