"""Stages on rows in memory: they give what a run gives, in the kind that they were given."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import weakref
from collections import Counter
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import STUDENT
from datasets import Array2D, ClassLabel, Dataset, DatasetInfo, Features
from engine_fakes import CountedEngines, FakeReader
from pydantic import BaseModel

import stages as st
from pipeline.config import Recipe
from stages.engines import MaskedSequence, RowConcepts
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, StageError

MODELS = {
    "student": STUDENT,
    "teacher": {"model": STUDENT, "generation_chunk": 4},
    "encoder": {"model": STUDENT},
}


@pytest.fixture
def engines() -> CountedEngines:
    return CountedEngines()


@pytest.fixture
def session(engines: CountedEngines) -> Any:
    with st.Session(MODELS, seed=5, rows_per_step=8, progress=False, make=engines) as opened:
        yield opened


def columns_of(run: Path, stage: str, *names: str) -> dict[str, list[Any]]:
    tables = [pq.read_table(file) for file in sorted((run / stage).glob("part-*.parquet"))]
    return pa.concat_tables(tables).select(list(names)).to_pydict()


def ingested(session: Any, folder: Path) -> tuple[Any, Any]:
    """Rows and targets of the recipe's files."""
    found = session.ingest(
        {"apples": str(folder / "apples.jsonl"), "pears": str(folder / "pears.jsonl")},
        {"plums": str(folder / "plums.jsonl")},
        rows_per_shard=8,
    )
    return found.rows, found.targets


def test_session_gives_what_a_run_gives(
    recipe: Any, execute: Any, session: Any, engines: CountedEngines
) -> None:
    recipe.value["reflection"] |= {"limit": 11, "where": "ifd > 0.5"}
    execute()
    run, folder = recipe.run_folder, recipe.path.parent
    rows, targets = ingested(session, folder)
    ids = columns_of(run, "ingest", "id", "messages")
    assert rows.select(["id", "messages"]).to_pydict() == ids

    rows = session.difficulty(rows)
    rows = session.reflection(rows, reply="whole", max_new_tokens=32, limit=11, where="ifd > 0.5")
    dictionary = session.dictionary(rows, layer=2, expansion=2, k=4, steps=6, batch=32)
    prototypes = session.prototypes(rows, targets, dictionary)
    rows = session.features(rows, prototypes)
    rows, targets = session.embedding(rows), session.embedding(targets)
    for stage, name in (
        ("difficulty", "ifd"), ("difficulty", "difficulty_status"),
        ("reflection", "messages_reflected"), ("reflection", "reflection_status"),
        ("features", "similarity"), ("embedding", "embedding"),
    ):  # fmt: skip
        assert rows[name].to_pylist() == columns_of(run, stage, name)[name], name
    assert Counter(rows["reflection_status"].to_pylist())["not_requested"] >= len(rows) - 11

    selected = session.selection(rows, score="similarity", share=0.8)
    decisions = pq.read_table(run / "selection" / "decisions.parquet")
    assert selected.decisions.to_pydict() == decisions.to_pydict()
    mixture = session.mixture(selected, targets, budget_rows=8, tolerance=0.05)
    weights = pq.read_table(run / "mixture" / "weights.parquet").to_pydict()
    assert mixture.weights == dict(zip(weights["source"], weights["weight"], strict=True))
    dataset = session.emission(selected, targets, mixture, name="small")
    written = pq.read_table(sorted((run / "dataset" / "data").glob("*.parquet"))[0])
    assert dataset.rows.to_pylist() == written.to_pylist()


@pytest.fixture
def with_concepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader without a model has no gradients: concepts are made of the tokens' numbers."""

    def made_up(sequence: MaskedSequence) -> RowConcepts:
        ids = np.array(sequence.ids, np.int32)[:, None] % 16
        return RowConcepts(ids, ids.astype(np.float32), ids[:2, 0], np.ones(2, np.float32))

    def concepts(_self: Any, sequences: Any, *_: Any) -> list[RowConcepts]:
        return [made_up(sequence) for sequence in sequences]

    monkeypatch.setattr(FakeReader, "concepts", concepts)


def test_scores_concepts_and_explanations_are_those_of_a_run(
    recipe: Any, execute: Any, session: Any, with_concepts: None
) -> None:
    scores = {"scores": ["random", "longest", "bm25", "embedding", "hidden"], "by_target": True}
    for section in ("difficulty", "reflection"):
        del recipe.value[section]
    recipe.value |= {
        "features": {"active_above": 0.0},
        "concepts": {"where": "source == 'apples'", "per_row": 3},
        "baselines": scores | {"limit": 15},
        "valuation": {"share": 0.5},
        "selection": {"score": "transport_value", "share": 0.8},
        "explanation": {"rows": 4, "latents": 3},
    }
    execute()
    run, folder = recipe.run_folder, recipe.path.parent
    rows, targets = ingested(session, folder)
    dictionary = session.dictionary(rows, layer=2, expansion=2, k=4, steps=6, batch=32)
    prototypes = session.prototypes(rows, targets, dictionary, active_above=0.0)
    rows, targets = session.features(rows, prototypes), session.features(targets, prototypes)
    rows = session.concepts(rows, dictionary, where="source == 'apples'", per_row=3)
    rows, targets = session.embedding(rows), session.embedding(targets)
    rows = session.baselines(rows, targets, **scores, limit=15)
    rows = session.valuation(rows, targets, share=0.5)
    for stage, names in {
        "features": ["active_features"],
        "concepts": ["concept_input_ids", "concept_ids", "concept_row_ids", "concepts_status"],
        "baselines": [
            "random", "longest", "bm25", "embedding_similarity", "hidden_similarity",
            "bm25_by_target", "baselines_status",
        ],
        "valuation": ["transport_value", "valuation_status"],
    }.items():  # fmt: skip
        written = columns_of(run, stage, *names)
        for name in names:
            assert rows[name].to_pylist() == written[name], name
    assert rows["baselines_status"].to_pylist().count("not_requested") == 4

    selected = session.selection(rows, targets, score="transport_value", share=0.8)
    decisions = pq.read_table(run / "selection" / "decisions.parquet")
    assert selected.decisions.to_pydict() == decisions.to_pydict()
    explained = session.explanation(selected, prototypes, rows=4, latents=3)
    written = json.loads((run / "explanation" / "explanations.json").read_text())
    assert explained.to_pylist() == written

    mixture = session.mixture(selected, targets, budget_rows=8, tolerance=0.05)
    dataset = session.emission(selected, targets, mixture, name="small")
    for shard in sorted((run / "dataset").glob("*/*.parquet")):
        name = f"{shard.parent.name}/{shard.name}"
        table = pq.read_table(pa.BufferReader(dataset.files[name]))
        assert table.to_pylist() == pq.read_table(shard).to_pylist(), name
    said = (run / "dataset" / "concepts" / "dictionary.json").read_bytes()
    assert dataset.files["concepts/dictionary.json"] == said
    page = dataset.files["report.html"].decode()
    assert all(row["id"] in page for row in written)
    other = session.selection(rows, targets, score="transport_value", share=0.5)
    page = session.emission(other, targets, name="other").files["report.html"].decode()
    assert "What made rows similar" not in page


def test_every_section_of_a_recipe_is_a_method_that_takes_its_fields_as_keywords() -> None:
    elsewhere = {"allocation": "rollouts", "sources": "ingest", "targets": "ingest",
                 "stages": "extension"}  # fmt: skip
    given = {"contamination": "ingest", "license_policy": "selection"}
    plain = {"name", "seed", "models", "max_failed_share"}
    for section, field in Recipe.model_fields.items():
        if section in plain:
            continue
        if section in given:
            assert section in inspect.signature(getattr(st.Session, given[section])).parameters
            continue
        method = getattr(st.Session, elsewhere.get(section, section))
        shown = inspect.signature(method).parameters
        if section == "features":
            shown = shown | inspect.signature(st.Session.prototypes).parameters
        kinds = [one for one in getattr(field.annotation, "__args__", (field.annotation,))
                 if isinstance(one, type) and issubclass(one, BaseModel)]  # fmt: skip
        if section in ("sources", "targets"):
            continue
        for name in {name for kind in kinds for name in kind.model_fields}:
            assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY, (section, name)


KINDS = {
    "arrow": lambda table: table,
    "pandas": lambda table: table.to_pandas(),
    "list": lambda table: table.to_pylist(),
    "datasets": lambda table: Dataset(table),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_as_the_kind_that_they_came_in(
    kind: str, session: Any, rows_of: Any
) -> None:
    records = rows_of("apples", 0, 10)
    ingested = session.ingest({"apples": records}).rows
    assert isinstance(ingested, list)
    expected = session.embedding(session.difficulty(pa.Table.from_pylist(ingested)))

    given = KINDS[kind](pa.Table.from_pylist(ingested))
    rows = session.difficulty(given)
    assert type(rows) is type(given)
    assert len(rows) == 10
    rows = session.embedding(rows)
    for name in ("id", "ifd", "embedding", "difficulty_status", "response_tokens"):
        assert list(rows[name] if kind != "list" else [r[name] for r in rows]) == (
            expected[name].to_pylist() if kind != "arrow" else list(expected[name])
        )
    selected = session.selection(rows, score="ifd", rows=4)
    assert type(selected.kept) is type(given)
    assert (len(selected.kept), len(selected.dropped)) == (4, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_every_stage_pass_through_every_kind(
    kind: str, session: Any, rows_of: Any, with_concepts: None
) -> None:
    found = session.ingest(
        {"apples": pa.Table.from_pylist(rows_of("apples", 0, 9))},
        {"plums": pa.Table.from_pylist(rows_of("plums", 0, 4))},
    )

    def worked(rows: Any, targets: Any) -> tuple[Any, Any]:
        dictionary = session.dictionary(rows, layer=2, expansion=2, k=4, steps=6, batch=32)
        prototypes = session.prototypes(rows, targets, dictionary)
        rows = session.concepts(session.features(rows, prototypes), dictionary)
        rows, targets = session.embedding(rows), session.embedding(targets)
        rows = session.baselines(rows, targets, scores=["bm25", "embedding"], by_target=True)
        rows = session.valuation(rows, targets)
        selected = session.selection(rows, score="transport_value", rows=5)
        return rows, session.explanation(selected, prototypes, rows=3)

    def listed(rows: Any) -> list[dict[str, Any]]:
        if isinstance(rows, pd.DataFrame):
            rows = pa.Table.from_pandas(rows, preserve_index=False)
        return rows.to_pylist() if isinstance(rows, pa.Table) else list(rows)

    expected = worked(found.rows, found.targets)
    given = KINDS[kind](found.rows), KINDS[kind](found.targets)
    made = worked(*given)
    for mine, arrow, asked in zip(made, expected, given, strict=True):
        assert type(mine) is type(asked)
        assert listed(mine) == arrow.to_pylist()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_dropped_can_be_selected_from_again(kind: str, session: Any, rows_of: Any) -> None:
    table = session.ingest({"apples": pa.Table.from_pylist(rows_of("apples", 0, 9))}).rows
    rows = session.difficulty(KINDS[kind](table))
    first = session.selection(rows, score="ifd", rows=4)
    second = session.selection(first.dropped, filters=[{"rule": "record > 3", "reason": "early"}])
    dropped = session._table(second.dropped)
    assert dropped.column_names == session._table(first.dropped).column_names
    assert dropped["reason"].to_pylist() == ["filter: early"] * len(dropped)
    assert len(second.kept) + len(dropped) == 5


OWN = pa.table(
    {
        "count": pa.array([3, None, 1, 2, None, 0, 5, 4, 6], pa.int16()),
        "weight": [0.5, None, -1.5, 2.0, 0.0, 1.0, None, 4.0, 8.0],
        "note": ["a", None, "", "ü", "e", "f", None, "h", "i"],
        "good": [True, False, None, True, False, True, False, True, None],
        "seen": [datetime(2020, 1, n) if n % 3 else None for n in range(1, 10)],
        "raw": [b"\xff", None, b"", b"d", b"e", b"f", b"g", b"h", b"i"],
        "tags": [["x"], [], None, ["y", "z"], ["x"], [], ["x"], ["x"], ["x"]],
        "about": [{"n": n, "at": None if n % 2 else "home"} for n in range(9)],
    }
)


@pytest.mark.parametrize("kind", [*KINDS, "records of a frame"])
def test_columns_of_ones_own_pass_through(kind: str, session: Any, rows_of: Any) -> None:
    table = session.ingest({"apples": pa.Table.from_pylist(rows_of("apples", 0, 9))}).rows
    table = table.drop_columns(["license"])
    for field, column in zip(OWN.schema, OWN.columns, strict=True):
        table = table.append_column(field, column)
    if kind == "records of a frame":
        given = table.to_pandas().to_dict("records")
    else:
        given = KINDS[kind](table)
    own = dict(
        zip(table["id"].to_pylist(), table.select(OWN.column_names).to_pylist(), strict=True)
    )

    scored = session.embedding(session.difficulty(given, limit=7))
    selected = session.selection(scored, score="ifd", rows=4)
    emitted = session.emission(selected).rows
    for rows, number in ((scored, 9), (selected.kept, 4), (selected.dropped, 5)):
        assert type(rows) is type(given)
        made = session._table(rows)
        assert made.column_names[: len(table.column_names)] == table.column_names
        ids = made["id"].to_pylist()
        assert len(ids) == number
        assert made.select(OWN.column_names).to_pylist() == [own[name] for name in ids]
    assert type(emitted) is type(given)
    assert {row["id"] for row in session._table(emitted).to_pylist()} == {
        row["id"] for row in session._table(selected.kept).to_pylist()
    }


def test_metadata_of_arrow_tables_stays(session: Any, rows_of: Any) -> None:
    table = session.ingest({"apples": pa.Table.from_pylist(rows_of("apples", 0, 6))}).rows
    text = table.schema.get_field_index("source")
    mine = pa.field("mine", pa.int8(), nullable=False, metadata={"unit": "apples"})
    given = (
        table.set_column(text, pa.field("source", pa.string(), metadata={"from": "me"}),
                         table["source"].cast(pa.string()))
        .append_column(mine, pa.array(range(6), pa.int8()))
        .replace_schema_metadata({"made": "by me"})
    )  # fmt: skip
    selected = session.selection(session.difficulty(given), score="ifd", rows=4)
    for rows in (session.difficulty(given), selected.kept, selected.dropped):
        assert rows.schema.metadata == {b"made": b"by me"}
        assert rows.schema.field("mine").equals(mine, check_metadata=True)
        assert rows.schema.field("source").metadata == {b"from": b"me"}
    assert session.emission(selected).rows.schema.metadata is None

    frame = given.to_pandas().set_axis([7, 2, 5, 9, 0, 4])
    for indexed in (frame, frame.reset_index(drop=True)):
        scored = session.difficulty(pa.Table.from_pandas(indexed))
        pd.testing.assert_index_equal(scored.to_pandas().index, indexed.index)
        kept = session.selection(scored, score="ifd", rows=4).kept.to_pandas()
        assert len(kept) == 4


def test_datasets_keep_features_and_format(session: Any, rows_of: Any) -> None:
    table = session.ingest({"apples": pa.Table.from_pylist(rows_of("apples", 0, 6))}).rows
    features = {
        "verdict": ClassLabel(names=["no", "yes"]),
        "pixels": Array2D((2, 2), "float32"),
        "said": {"lang": ClassLabel(names=["de", "en"])},
    }
    pixels = [[[n, 0], [0, n]] for n in range(6)]
    given = Dataset(
        table.append_column("verdict", pa.array([0, 1] * 3))
        .append_column("pixels", pa.array(pixels))
        .append_column("said", pa.array([{"lang": 1}] * 6)),
        info=DatasetInfo(description="Mine.", license="cc0-1.0"),
        split="train",
    )
    given = given.cast(Features(given.features | features)).select([4, 0, 3, 1, 5, 2])

    def check(rows: Dataset) -> None:
        assert {name: rows.features[name] for name in features} == features
        assert (rows.info.description, rows.info.license, str(rows.split)) == (
            "Mine.", "cc0-1.0", "train",
        )  # fmt: skip
        numbers = dict(zip(given["id"], given["pixels"], strict=True))
        assert rows["pixels"][:] == [numbers[name] for name in rows["id"]]

    scored = session.embedding(session.difficulty(given))
    selected = session.selection(scored, score="ifd", rows=4)
    for rows in (scored, selected.kept, selected.dropped):
        check(rows)
        assert rows._fingerprint != given._fingerprint
        assert rows.format["type"] is None

    shown = [name for name in given.column_names if name not in ("verdict", "said")]
    arrays = given.with_format("numpy", columns=shown, dtype=np.float64)
    scored = session.embedding(session.difficulty(arrays))
    assert scored.format == arrays.format | {
        "columns": [name for name in scored.column_names if name not in ("verdict", "said")]
    }
    assert scored[0]["embedding"].dtype == np.float64
    check(session.selection(scored, score="ifd", rows=4).kept.with_format(None))
    told = given.with_transform(lambda rows: {"seen": [name + "!" for name in rows["id"]]})
    assert session.difficulty(told)[1] == {"seen": given["id"][1] + "!"}
    assert session.emission(selected).rows.format["type"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_pass_through_every_stage(
    kind: str, session: Any, rows_of: Any, with_concepts: None
) -> None:
    found = session.ingest(
        {"apples": pa.Table.from_pylist(rows_of("apples", 0, 9))},
        {"plums": pa.Table.from_pylist(rows_of("plums", 0, 4))},
    )
    dictionary = session.dictionary(found.rows, layer=2, expansion=2, k=4, steps=6, batch=32)
    prototypes = session.prototypes(found.rows, found.targets, dictionary)
    targets = session.embedding(found.targets)
    asked = {"max_new_tokens": 8, "temperature": 1.0}
    for none in (KINDS[kind](found.rows.slice(0, 0)), KINDS[kind](found.targets.slice(0, 0))):
        rows = session.difficulty(none, where="source == 'apples'")
        rows = session.pass_rate(rows, model="student", rollouts=2, **asked)
        rows = session.reflection(rows, reply="whole", max_new_tokens=8)
        rows = session.concepts(session.features(rows, prototypes), dictionary)
        rows = session.embedding(rows)
        rows = session.baselines(rows, targets, scores=["bm25", "embedding"])
        assert type(rows) is type(none)
        assert len(rows) == 0
        with pytest.raises(StageError, match="no sampled row has an embedding"):
            session.valuation(rows, targets)
        with pytest.raises(StageError, match="left no row of 0"):
            session.selection(rows, score="ifd", share=0.5)


def test_no_targets_are_a_list_without_rows(session: Any, rows_of: Any) -> None:
    found = session.ingest({"apples": rows_of("apples", 0, 6)})
    assert session.embedding(found.targets) == []
    selected = session.selection(session.embedding(found.rows), found.targets)
    assert selected.dropped == session.embedding(selected.dropped) == []
    assert len(session.emission(selected, found.targets).rows) == 6


def test_records_of_every_kind_are_ingested_alike(session: Any, rows_of: Any) -> None:
    table = pa.Table.from_pylist(rows_of("apples", 0, 10))
    ids = [
        [row["id"] for row in pa.Table.to_pylist(session._table(session.ingest({"a": data}).rows))]
        for data in (
            table, table.to_pandas(), table.to_pylist(),
            Dataset.from_list(table.to_pylist()),
        )
    ]  # fmt: skip
    assert ids[0] == ids[1] == ids[2] == ids[3]
    assert len(set(ids[0])) == 10


def rows_and_rejects(session: Any, data: Any) -> tuple[list[Any], list[Any]]:
    """Rows without their file's name, and rejects by record and code."""
    where = "path" if isinstance(data, str) else "data"
    found = session.ingest({"apples": {where: data}}, max_reject_rate=1)
    rejects = pa.Table.to_pylist(session._table(found.rejects))
    return (
        session._table(found.rows).drop_columns("file").to_pylist(),
        [(reject["record"], reject["reason"].partition(":")[0]) for reject in rejects],
    )


VALUES = {
    "times": [datetime(2020, 1, 1, 12), None, datetime(2021, 2, 3, 4, 5, 6, 789)],
    "zoned": [datetime(2020, 1, 1, tzinfo=UTC), None, datetime(2021, 1, 1, tzinfo=UTC)],
    "days": [date(2020, 1, 1), None, date(2021, 2, 3)],
    "hours": [time(1, 2), None, time(3, 4, 5, 6)],
    "durations": [timedelta(days=1, seconds=2), None, timedelta(0)],
    "bytes": [b"x\xff", None, b""],
    "decimals": [Decimal("1.10"), None, Decimal("-2.00")],
    "floats": [0.1, float("nan"), None],
    "infinite": [1.0, float("inf"), float("-inf")],
    "lists": [[0.5, float("nan")], None, []],
    "structs": [{"n": 0.5, "at": datetime(2020, 1, 1)}, None, {"n": 1.5, "at": None}],
    "answer": ["", "Two.", "Three."],
}


@pytest.mark.parametrize("column", VALUES)
def test_rows_in_memory_are_read_as_their_file_is(
    column: str, session: Any, rows_of: Any, tmp_path: Path
) -> None:
    records = [
        row | {column: value}
        for row, value in zip(rows_of("apples", 0, 3), VALUES[column], strict=True)
    ]
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "rows.parquet")
    expected = rows_and_rejects(session, str(tmp_path / "rows.parquet"))
    assert len(expected[0]) + len(expected[1]) == 3
    frame = table.to_pandas()
    for data in (
        table, frame, table.to_pandas(types_mapper=pd.ArrowDtype), Dataset(table),
        records, frame.to_dict("records"),
    ):  # fmt: skip
        assert rows_and_rejects(session, data) == expected, type(data)


def test_records_are_read_as_lines_of_json_are(session: Any, rows_of: Any, tmp_path: Path) -> None:
    more = (7, "seven", None, [1, "a", {"b": None}], 2**70, True, "Äpfel")
    records = [
        row | {"more": value} for row, value in zip(rows_of("apples", 0, 7), more, strict=True)
    ] + [{"question": 5, "answer": "x"}, {"answer": "y"}, "no record"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    expected = rows_and_rejects(session, str(file))
    assert [len(part) for part in expected] == [7, 3]
    assert rows_and_rejects(session, records) == expected


def test_scalars_of_numpy_and_pandas_are_values(session: Any, rows_of: Any) -> None:
    values = {
        "i": np.int64(3), "b": np.bool_(True), "f": np.float32(0.5), "nan": np.float32("nan"),
        "t": pd.Timestamp("2020-01-01 12:00"), "nat": pd.NaT, "na": pd.NA,
        "a": np.array([[1, 2], [3, 4]]), "d": np.datetime64("2020-01-01"), "tuple": (1, np.int8(2)),
    }  # fmt: skip
    [row] = session.ingest({"apples": [rows_of("apples", 0, 1)[0] | values]}).rows
    assert json.loads(row["extra"]) == {
        "i": 3, "b": True, "f": 0.5, "nan": None, "t": "2020-01-01T12:00:00", "nat": None,
        "na": None, "a": [[1, 2], [3, 4]], "d": "2020-01-01", "tuple": [1, 2],
    }  # fmt: skip


def test_every_record_is_a_row_or_a_reject(session: Any, rows_of: Any) -> None:
    good = rows_of("apples", 0, 10)
    bad = [{"question": "", "answer": "x"}, {"question": 7, "answer": "x"}, good[0]]
    found = session.ingest({"apples": [*good, *bad]})
    assert len(found.rows) == 10
    assert [reject["reason"].split(":")[0] for reject in found.rejects] == [
        "empty_turn", "wrong_type", "duplicate",
    ]  # fmt: skip


def test_a_row_that_fails_has_nulls_and_a_status(session: Any, rows_of: Any) -> None:
    records = [*rows_of("apples", 0, 3), {"question": "Long?", "answer": "word " * 5000}]
    rows = session.ingest({"apples": records}).rows
    scored = session.difficulty(rows, min_response_tokens=9)
    assert len(scored) == 4
    failed = [row for row in scored if row["difficulty_status"].startswith("failed")]
    assert failed
    assert all(row["ifd"] is None for row in failed)


def test_a_stage_that_runs_again_replaces_its_columns(session: Any, rows_of: Any) -> None:
    rows = session.ingest({"apples": rows_of("apples", 0, 6)}).rows
    once = session.difficulty(rows, rifd=True)
    twice = session.difficulty(once, rifd=True, limit=2)
    assert [*once[0]] == [*twice[0]]
    assert sum(row["ifd"] is not None for row in twice) == 2
    kept = [row for row in twice if row["ifd"] is not None]
    assert all(row in once for row in kept)


def test_stages_share_models(engines: CountedEngines, rows_of: Any) -> None:
    with st.Session(progress=False, make=engines) as session:
        rows = session.ingest({"apples": rows_of("apples", 0, 6)}).rows
        rows = session.difficulty(rows, student=STUDENT)
        rows = session.reflection(
            rows, student=STUDENT, teacher=STUDENT, reply="whole", max_new_tokens=8
        )
        rows = session.difficulty(rows, student={"model": STUDENT})
        assert engines.opened == ["scorer", "generator"]
        asked = engines.asked["generator"]
        again = session.reflection(
            rows, student=STUDENT, teacher=STUDENT, reply="whole", max_new_tokens=8
        )
        assert engines.asked["generator"] == asked
        assert again == rows
        session.free_models()
        session.difficulty(rows, student=STUDENT)
        assert engines.opened == ["scorer", "generator", "scorer"]


def test_models_of_the_same_files_share_weights_until_the_last_is_gone() -> None:
    from stages.engines.model_files import load_causal_lm

    settings = ModelSettings(model=STUDENT, dtype="bfloat16")
    one = load_causal_lm(settings)
    two = load_causal_lm(settings.model_copy(update={"max_length": 64}))
    other = load_causal_lm(settings.model_copy(update={"dtype": "float32"}))
    pointers = [
        [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
        for model in (one, two, other)
    ]
    assert pointers[0] == pointers[1]
    assert not set(pointers[0]) & set(pointers[2])
    before = two.config._attn_implementation
    one.set_attn_implementation("eager")
    assert two.config._attn_implementation == before
    weight = weakref.ref(one.get_input_embeddings().weight)
    del one
    gc.collect()
    assert weight() is not None
    del two
    gc.collect()
    assert weight() is None


def test_it_works_where_an_event_loop_runs_already(session: Any, rows_of: Any) -> None:
    rows = session.ingest({"apples": rows_of("apples", 0, 3)}).rows

    async def cell() -> Any:
        return session.difficulty(rows)

    assert asyncio.run(cell()) == session.difficulty(rows)


def test_rollouts_go_on_from_the_pilot(session: Any, rows_of: Any) -> None:
    records = [{**row, "final": str(n * n)} for n, row in enumerate(rows_of("apples", 0, 6))]
    columns = {"prompt": "question", "response": "answer", "answer": "final"}
    rows = session.ingest({"apples": {"data": records, "columns": columns}}).rows
    with pytest.raises(ConfigError, match=r"session\.pass_rate first"):
        session.rollouts(rows, total=6)
    rows = session.pass_rate(rows, rollouts=2, max_new_tokens=8, temperature=1.0)
    rows = session.rollouts(rows, total=6, floor=1, gradient="one")
    assert [row["budgeted_rollouts"] for row in rows] == [3] * 6


def test_mistakes_are_named_before_a_model_is_loaded(
    session: Any, engines: CountedEngines, rows_of: Any
) -> None:
    rows = session.ingest({"apples": rows_of("apples", 0, 3)}).rows
    bare = [{"messages": row["messages"]} for row in rows]
    endpoint = {"model": "m", "engine": "openai", "endpoint": {"base_url": "http://localhost:1/v1"}}
    for call, message in (
        (lambda: session.difficulty(rows, varient="x"), "did you mean 'variant'?"),
        (lambda: session.difficulty(rows, limit=0), "difficulty can't be used: limit"),
        (lambda: session.difficulty(bare), r"column 'id'.*session\.ingest adds it"),
        (lambda: session.difficulty("rows"), "rows are of type str"),
        (lambda: session.thinking(rows), "thinking needs a model as its model"),
        (lambda: session.difficulty(rows, student={"modle": "x"}), "did you mean 'model'?"),
        (lambda: session.difficulty(rows, student=endpoint), "endpoints don't give"),
        (lambda: session.difficulty(rows, where="ifdd < 1"), "'ifdd'"),
        (lambda: session.selection(rows, score="ifd", share=0.5), "'ifd', which no stage"),
        (lambda: session.ingest({"apples": "gone.jsonl"}), "gone.jsonl"),
        (lambda: session.ingest({"apples": [{"question": object()}]}), "written as JSON"),
        (lambda: session.dictionary(rows, path="sae", layer=2), "needs targets too"),
        (lambda: session.baselines(rows), "scores: missing"),
        (lambda: session.baselines(rows, scores=["bm26"]), "baselines can't be used: scores"),
        (lambda: session.baselines(rows, scores=["bm25"]), "bm25 compares rows with targets"),
        (lambda: session.baselines(rows, rows, scores=["embedding"]), r"session\.embedding first"),
        (
            lambda: session.baselines(rows, rows, scores=["bm25"]),
            r"'task', which these targets.*session\.ingest\(\.\.\., targets\) adds it",
        ),
        (lambda: session.valuation(rows, rows), r"'embedding'.*session\.embedding adds it"),
        (lambda: session.extension(rows, "brevty"), "no installed package offers"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert engines.opened == []


ODD = {
    "of two types": [1, "a", None],
    "of too large a number": [2**70, 1, 2],
    "of no text": ["\ud800", "b", "c"],
    "of objects": [object(), None, None],
}


@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
def test_columns_that_arrow_has_no_type_for_are_named(
    values: list[Any], session: Any, engines: CountedEngines, rows_of: Any
) -> None:
    rows = session.ingest({"apples": rows_of("apples", 0, 3)}).rows
    listed = [row | {"mine": value} for row, value in zip(rows, values, strict=True)]
    frame = pd.DataFrame(rows).assign(mine=pd.Series(values, dtype=object))
    for call in (
        lambda: session.difficulty(listed),
        lambda: session.difficulty(frame),
        lambda: session.selection(frame),
        lambda: session.ingest({"pears": frame}),
    ):
        with pytest.raises(ConfigError, match=r"the column mine can't be read: .*; it needs"):
            call()
    with pytest.raises(ConfigError, match=r"source pears: .*the column mine"):
        session.ingest({"pears": frame})
    with pytest.raises(ConfigError, match="the column source can't be read"):
        session.difficulty([row | {"source": 5} for row in rows])
    assert engines.opened == []


def test_columns_of_one_name_are_refused(session: Any, rows_of: Any) -> None:
    table = session.ingest({"apples": pa.Table.from_pylist(rows_of("apples", 0, 3))}).rows
    frame = table.to_pandas()
    for rows in (
        table.append_column("license", table["license"]),
        pd.concat([frame, frame[["license"]]], axis=1),
    ):
        for call in (
            session.difficulty,
            session.selection,
            lambda rows: session.ingest({"a": rows}),
        ):
            with pytest.raises(ConfigError, match="several columns license; rename"):
                call(rows)


def test_columns_of_frames_and_records_may_be_called_by_numbers(session: Any, rows_of: Any) -> None:
    rows = session.ingest({"apples": rows_of("apples", 0, 3)}).rows
    assert session.difficulty([row | {5: "five"} for row in rows])[0]["5"] == "five"
    frame = pd.DataFrame(rows)
    frame[5] = 1
    assert session.difficulty(frame)["5"].tolist() == [1] * 3
    with pytest.raises(ConfigError, match="several columns 5; rename"):
        session.difficulty([row | {5: "five", "5": "six"} for row in rows])


@pytest.mark.parametrize("rows", [0, -1])
def test_steps_have_rows(rows: int) -> None:
    with pytest.raises(ConfigError, match="rows_per_step must be at least 1"):
        st.Session(rows_per_step=rows)


def test_scores_that_need_no_model_ask_for_none(rows_of: Any) -> None:
    with st.Session(progress=False) as session:
        found = session.ingest({"a": rows_of("apples", 0, 5)}, {"t": rows_of("plums", 0, 2)})
        rows = session.baselines(found.rows, found.targets, scores=["random", "bm25"])
        assert all(row["bm25"] > 0 for row in rows)
        with pytest.raises(ConfigError, match="baselines needs a model as its student"):
            session.baselines(found.rows, scores=["longest"])
    with pytest.raises(ConfigError, match="this session is closed"):
        session.baselines(found.rows, scores=["random"])
    with pytest.raises(ConfigError, match="this session is closed"):
        session.ingest({"a": rows_of("apples", 0, 5)})


def test_targets_need_the_columns_that_rows_have(session: Any, rows_of: Any) -> None:
    found = session.ingest({"a": rows_of("apples", 0, 6)}, {"t": rows_of("plums", 0, 3)})
    rows = session.embedding(found.rows)
    for call in (
        lambda: session.valuation(rows, found.targets),
        lambda: session.mixture(session.selection(rows), found.targets),
    ):
        with pytest.raises(ConfigError, match=r"'embedding', which these targets.*session\.emb"):
            call()
    dictionary = session.dictionary(rows, layer=2, expansion=2, k=4, steps=6, batch=32, rows=4)
    prototypes = session.prototypes(rows, found.targets, dictionary, active_above=0.0)
    rows = session.features(rows, prototypes)
    with pytest.raises(ConfigError, match="'active_features', which these targets"):
        session.selection(rows, found.targets)
    report = session.selection(rows).report["activation_coverage"]
    assert (report["target_features"], report["kept_rows"]) == (0, None)


def test_budget_of_emission_is_the_mixtures(session: Any, rows_of: Any) -> None:
    found = session.ingest(
        {"apples": rows_of("apples", 0, 6), "pears": rows_of("pears", 0, 6)},
        {"plums": rows_of("plums", 0, 4)},
    )
    rows, targets = session.embedding(found.rows), session.embedding(found.targets)
    selected = session.selection(rows)
    mixture = session.mixture(selected, targets, budget_rows=6)
    assert sum(mixture.weights.values()) == pytest.approx(1)
    with pytest.raises(ConfigError, match="isn't the budget of the mixture"):
        session.emission(selected, targets, mixture, budget_rows=8)
    assert len(session.emission(selected, targets, mixture).rows) == 6
    assert len(session.emission(selected, budget_rows=8).rows) == 8
    with pytest.raises(StageError):
        session.selection(rows, filters=[{"rule": "license == 'none'"}])


def test_artifacts_and_data_sets_are_kept_where_they_are_saved(
    session: Any, rows_of: Any, tmp_path: Path
) -> None:
    found = session.ingest({"apples": rows_of("apples", 0, 8)}, {"plums": rows_of("plums", 0, 4)})
    made = session.dictionary(found.rows, layer=2, expansion=2, k=4, steps=6, batch=32)
    made.save(str(tmp_path / "sae"))
    assert {"cfg.json", "sae_weights.safetensors"} <= {f.name for f in (tmp_path / "sae").iterdir()}
    dataset = session.emission(session.selection(found.rows), budget_rows=5)
    dataset.save(str(tmp_path / "data"))
    temporary = Path(session._store.url)
    assert temporary.is_dir()
    session.close()
    assert not temporary.exists()
    saved = pq.read_table(sorted((tmp_path / "data/data").glob("train-*.parquet"))[0])
    assert [row["id"] for row in saved.to_pylist()] == [row["id"] for row in dataset.rows]
    assert "apples" in (tmp_path / "data/README.md").read_text()


def test_frames_keep_nulls_lists_and_numbers(session: Any, rows_of: Any) -> None:
    table = pa.Table.from_pylist(session.ingest({"apples": rows_of("apples", 0, 6)}).rows)
    frame = session.difficulty(pd.DataFrame(table.to_pylist()), limit=3)
    assert frame["ifd"].isna().sum() == 3
    assert str(frame["response_tokens"].dtype) == "int32[pyarrow]"
    assert frame["messages"][0][-1]["role"] == "assistant"
    assert session.embedding(frame).shape == (6, frame.shape[1] + 3)


INDICES = {
    "shuffled": pd.Index([7, 2, 5, 9, 0, 4]),
    "named, with one label twice": pd.Index([*"abcdda"], name="key"),
    "times": pd.date_range("2020-01-01", periods=6, freq="D", name="day"),
    "two levels": pd.MultiIndex.from_product([["x", "y"], [3, 1, 2]], names=["part", None]),
    "called as a column": pd.Index([*"uvwxyz"], name="source"),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_frames_keep_their_index(index: pd.Index, session: Any, rows_of: Any) -> None:
    rows = session.ingest({"apples": rows_of("apples", 0, 6)}).rows
    frame = pd.DataFrame(rows, index=index)
    expected = {row["id"]: row["ifd"] for row in session.difficulty(rows)}

    scored = session.difficulty(frame)
    pd.testing.assert_index_equal(scored.index, index)
    for pool in (scored, scored.iloc[[4, 1, 3]]):
        selected = session.selection(pool, score="ifd", rows=2)
        for part, rows_of_part in ((selected.kept, 2), (selected.dropped, len(pool) - 2)):
            assert len(part) == rows_of_part
            pd.testing.assert_index_equal(part.index, pool.index[pool["id"].isin(part["id"])])
    if index.is_unique:
        frame["ifd"] = scored["ifd"]
        assert dict(zip(frame["id"], frame["ifd"], strict=True)) == expected
    emitted = session.emission(selected).rows
    pd.testing.assert_index_equal(emitted.index, pd.RangeIndex(2))


def test_second_ingest_forgets_neither_anchors_nor_what_must_stay_unseen(
    session: Any, rows_of: Any
) -> None:
    mine = session.ingest(
        {"mine": {"data": rows_of("apples", 0, 6), "role": "anchor"}},
        {"goals": rows_of("plums", 0, 4)},
        contamination={"ngram": 5, "short": 3},
    ).rows
    pool = session.ingest(
        {"pool": rows_of("pears", 0, 6)},
        contamination={"sets": [], "ngram": 9},
    ).rows
    emitted = session.emission(session.selection([*mine, *pool])).rows
    assert {row["source"] for row in emitted} == {"pool"}
    rows = session.reflection(pool, reply="whole", max_new_tokens=32)
    assert len(rows) == 6

    leak = session.ingest({"others": rows_of("plums", 4, 8)}, {"more": rows_of("apples", 8, 9)})
    assert leak.rows
    folder = session._unseen_rows
    tables = [folder.read_table(name) for name in folder.names()]
    unseen = pa.concat_tables(tables)["source"].to_pylist()
    assert sorted(unseen) == ["goals"] * 4 + ["more"]
    assert (session._unseen.ngram, session._unseen.short) == (5, 3)


def test_lone_surrogate_is_one_rejected_row(session: Any, rows_of: Any) -> None:
    records = [*rows_of("apples", 0, 3), {"question": "What is \ud800?", "answer": "Äpfel"}]
    found = session.ingest({"apples": {"data": records, "max_reject_rate": 1}})
    assert len(found.rows) == 3
    assert [row["reason"].partition(":")[0] for row in found.rejects] == ["invalid_unicode"]
    with pytest.raises(ConfigError, match="lone surrogate"):
        session.ingest({"apples": pd.DataFrame(records, dtype=object)})


def test_source_in_memory_is_never_taken_for_a_published_file(session: Any, rows_of: Any) -> None:
    rows = session.ingest({"mbpp": rows_of("apples", 0, 3)}).rows
    assert [row["license"] for row in rows] == [None] * 3
