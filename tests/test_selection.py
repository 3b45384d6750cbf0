"""Selection: every row gets a decision and a reason; checked against plain sorting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sharded import Tables

from pipeline.why import story
from stages.errors import ConfigError, StageError
from stages.licenses import LicensePolicy
from stages.rows import row_id
from stages.selection.settings import SelectionSettings
from stages.selection.stage import SelectionStage

PRESENT = frozenset({"id", "source", "messages", "score", "other", "tokens"})


def rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    draws = np.random.default_rng(seed)
    made = []
    for i in range(n):
        messages = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
        made.append(
            {
                "id": row_id(messages, None),
                "source": "ab"[i % 2],
                "effective_messages": messages,
                # Few distinct values, so that ties happen.
                "score": float(draws.integers(0, 8)) if i % 5 else None,
                "other": float(draws.random()),
                "tokens": int(draws.integers(1, 50)),
            }
        )
    return made


def decide(
    data: list[dict[str, Any]],
    shard: int = 7,
    anchors: tuple[str, ...] = (),
    policy: LicensePolicy | None = None,
    **settings: Any,
) -> Any:
    present = PRESENT | ({"embedding", "reflection_outcome"} & data[0].keys())
    stage = SelectionStage(SelectionSettings(**settings), frozenset(anchors), present, policy)
    none = Tables(pa.table({}), 1)
    outcome = stage.decide(Tables(pa.Table.from_pylist(data), shard), none, {})
    return outcome.tables["decisions.parquet"].to_pylist(), outcome.report


def test_top_share_is_that_of_plain_sorting_with_ties_by_id() -> None:
    data = rows(60)
    decisions, report = decide(data, score="score", share=0.5, filters=[{"rule": "other > 0.2"}])
    passing = [row for row in data if row["other"] > 0.2 and row["score"] is not None]
    best = sorted(passing, key=lambda row: (-row["score"], row["id"]))[: round(len(passing) / 2)]
    assert {row["id"] for row in decisions if row["keep"]} == {row["id"] for row in best}
    assert len(decisions) == 60 == report["rows"] == sum(report["reasons"].values())
    assert report["kept"] == len(best)


def test_reasons_say_which_rule_or_lack_dropped_a_row() -> None:
    data = rows(40)
    decisions, _ = decide(
        data, score="score", rows=10, filters=[{"rule": "other > 0.3", "reason": "dull"}]
    )
    for row, decision in zip(data, decisions, strict=True):
        if row["other"] <= 0.3:
            assert decision["reason"] == "filter: dull"
        elif row["score"] is None:
            assert decision["reason"] == "missing_score: score"
        else:
            assert decision["reason"] in ("kept", "below_cut")


def test_decisions_do_not_depend_on_shards() -> None:
    data = rows(50)
    assert decide(data, 3, score="score", rows=20) == decide(data, 50, score="score", rows=20)


def test_missing_scores_rank_last_where_asked() -> None:
    data = rows(20)
    decisions, _ = decide(data, score="score", rows=18, missing="keep_last")
    kept = [row for row in decisions if row["keep"]]
    assert len(kept) == 18
    scored = sum(row["score"] is not None for row in data)
    assert sum(row["reason"] == "kept: no score" for row in kept) == 18 - scored
    assert sum(row["reason"] == "kept" for row in kept) == scored


def test_per_source_cut_keeps_the_share_of_each() -> None:
    data = rows(40)
    decisions, report = decide(data, score="other", share=0.25, per_source=True)
    assert {name: found["kept"] for name, found in report["by_source"].items()} == {"a": 5, "b": 5}
    for source in "ab":
        mine = sorted(row["other"] for row in data if row["source"] == source)[-5:]
        kept = [d["score"] for d in decisions if d["keep"] and d["source"] == source]
        assert sorted(kept) == pytest.approx(mine)


def test_equal_effective_texts_are_dropped_but_the_first() -> None:
    data = rows(9)
    for row in data[3:6]:
        row["effective_messages"] = data[2]["effective_messages"]
    decisions, _ = decide(data, 2)
    reasons = [row["reason"] for row in decisions]
    assert reasons[3:6] == [f"duplicate_text: {data[2]['id']}"] * 3
    assert reasons.count("kept") == 6


LONG = "To add two numbers start at the first of them and count on by the second."


def test_one_response_of_a_teacher_stands_once_and_short_ones_as_often_as_they_are_given() -> None:
    given = {
        # By row: what reflection did, and the response that stands.
        0: ("none", LONG),
        1: ("response", LONG),
        2: (None, LONG),
        3: ("both", LONG.upper().replace(" ", "  ")),
        4: ("instruction", f"**{LONG}**"),
        5: ("response", "Yes."),
        6: ("both", "Yes."),
        7: ("response", LONG + " Then stop."),
        8: ("failed", LONG),
    }
    data = rows(9)
    for place, (outcome, response) in given.items():
        data[place]["effective_messages"][1]["content"] = response
        data[place]["reflection_outcome"] = outcome
    repeated = {3, 4}
    for shard in (2, 9):
        decisions, _ = decide(data, shard)
        for place, decision in enumerate(decisions):
            first = f"duplicate_response: {data[1]['id']}"
            assert decision["reason"] == (first if place in repeated else "kept")
    # A row that is dropped for its response stands for no other row.
    data[8]["effective_messages"] = data[3]["effective_messages"]
    decisions, report = decide(data)
    assert decisions[8]["keep"]
    assert report["reasons"] == {"duplicate_response": 2, "kept": 7}
    decisions, _ = decide(data, duplicates=False)
    assert all(decision["keep"] for decision in decisions)


def test_anchors_are_never_kept_and_their_texts_count_wherever_they_stand() -> None:
    data = rows(8)
    data[7]["source"] = "anchor"
    data[0]["effective_messages"] = data[7]["effective_messages"]
    decisions, _ = decide(data, 3, anchors=("anchor",))
    assert decisions[7]["reason"] == "anchor"
    assert not decisions[7]["keep"]
    assert decisions[0]["reason"] == f"duplicate_text: {data[7]['id']}"


def test_nothing_left_is_an_error_with_the_reasons_counted() -> None:
    with pytest.raises(StageError, match=r"left no row of 6.*filter: other > 2.*6"):
        decide(rows(6), filters=[{"rule": "other > 2"}])


def test_unknown_column_is_named() -> None:
    with pytest.raises(ConfigError, match="'beauty'"):
        decide(rows(3), score="beauty", rows=1)


def test_tokens_are_measured_where_a_stage_counted_them() -> None:
    data = rows(5)
    decisions, report = decide(data)
    assert [d["tokens"] for d in decisions] == [row["tokens"] for row in data]
    assert report["tokens_are"] == "measured"
    assert all(math.isfinite(d["tokens"]) for d in decisions)


def test_tokens_of_rows_that_no_stage_counted_are_estimated_and_never_nothing() -> None:
    data = rows(6)
    data[2]["tokens"] = data[4]["tokens"] = None
    decisions, report = decide(data)
    text = "".join(turn["content"] for turn in data[4]["effective_messages"])
    assert decisions[4]["tokens"] == len(text.encode()) // 4 + 1
    assert [d["tokens"] for i, d in enumerate(decisions) if i not in (2, 4)] == [
        row["tokens"] for i, row in enumerate(data) if i not in (2, 4)
    ]
    assert report["tokens_are"] == "estimated for 2 of 6 kept rows: UTF-8 bytes / 4"


@pytest.mark.parametrize("unknown", ["block", "allow"])
def test_license_policy_blocks_single_records_and_leaves_their_copies(unknown: Any) -> None:
    data = rows(30)
    stated = ["MIT", "CC BY-NC 4.0", None, "apache-2.0"]
    for i, row in enumerate(data):
        row["license"] = stated[i % 4]
    # The same text under a licence that is refused, and later under one that isn't.
    data[2]["effective_messages"] = data[1]["effective_messages"]
    data[2]["license"] = "mit"
    policy = LicensePolicy(allow=("mit", "Apache 2.0"), unknown=unknown)
    decisions, report = decide(data, policy=policy, anchors=("b",))
    for row, decision in zip(data, decisions, strict=True):
        if row["source"] == "b":
            expected = "anchor"
        elif row["license"] is None:
            expected = "license: not stated" if unknown == "block" else "kept"
        else:
            expected = "kept" if row["license"] != "CC BY-NC 4.0" else "license: cc-by-nc-4.0"
        # An anchor's text counts as seen whatever its licence.
        if row is data[2]:
            expected = f"duplicate_text: {data[1]['id']}"
        assert decision["reason"] == expected
    free, _ = decide(data, policy=policy)
    assert free[1]["reason"] == "license: cc-by-nc-4.0"
    assert free[2]["reason"] == "kept"
    assert sum(report["reasons"].values()) == 30


# Semantic duplicates


def with_vectors(n: int, seed: int, spread: float) -> list[dict[str, Any]]:
    """Rows whose vectors lie around a few directions; some have none."""
    draws = np.random.default_rng(seed)
    centres = draws.normal(size=(6, 12))
    data = rows(n, seed)
    for row in data:
        vector = centres[draws.integers(6)] + spread * draws.normal(size=12)
        vector /= np.linalg.norm(vector)
        row["embedding"] = None if draws.random() < 0.1 else vector.astype(np.float32).tolist()
    return data


def plainly_kept(
    data: list[dict[str, Any]], threshold: float, anchors: tuple[str, ...]
) -> list[Any]:
    """For each row the kept row nearest to it, where that is near enough, one row at a time."""
    kept = [row for row in data if row["source"] in anchors and row["embedding"]]
    mates = []
    for row in data:
        cosines = [float(np.dot(row["embedding"] or 0, one["embedding"])) for one in kept
                   if row["embedding"]]  # fmt: skip
        best = max(cosines, default=-1.0)
        duplicate = row["source"] not in anchors and best >= threshold
        mates.append(kept[cosines.index(best)]["id"] if duplicate else None)
        if row["embedding"] and row["source"] not in anchors and not duplicate:
            kept.append(row)
    return mates


@pytest.mark.parametrize("anchors", [(), ("a",)])
@pytest.mark.parametrize("block", [3, 4096])
def test_semantic_duplicates_are_those_of_comparing_one_by_one(
    anchors: tuple[str, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.selection.semantic._BLOCK", block)
    data = with_vectors(90, 4, 0.25)
    decisions, report = decide(data, 7, anchors, semantic_duplicates=0.9)
    expected = plainly_kept(data, 0.9, anchors)
    assert 10 < sum(mate is not None for mate in expected) < 80
    for row, decision, mate in zip(data, decisions, expected, strict=True):
        if row["source"] in anchors:
            assert decision["reason"] == "anchor"
        elif mate is None:
            assert decision["reason"] == "kept"
        else:
            assert decision["reason"].startswith(f"semantic_duplicate: {mate} (cosine 0.9")
    assert report["reasons"]["semantic_duplicate"] == sum(mate is not None for mate in expected)


def test_semantic_duplicates_of_dropped_rows_stay() -> None:
    data = with_vectors(30, 1, 0.0)
    for row in data:
        row["other"] = 0.0 if row["embedding"] else 1.0
    data[-1]["embedding"], data[-1]["other"] = (
        next(r["embedding"] for r in data if r["embedding"]),
        1,
    )
    decisions, _ = decide(data, semantic_duplicates=0.99, filters=[{"rule": "other > 0.5"}])
    assert decisions[-1]["reason"] == "kept"


def test_semantic_duplicates_need_embeddings() -> None:
    with pytest.raises(ConfigError, match="needs an embedding section"):
        SelectionStage(SelectionSettings(semantic_duplicates=0.9), frozenset(), PRESENT)


# What people decided


def decided(folder: Path, *lines: dict[str, Any], name: str = "o.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_people_have_the_last_word_and_the_cut_is_made_among_the_others(tmp_path: Path) -> None:
    data = rows(40)
    settings: dict[str, Any] = {
        "score": "score", "share": 0.5, "filters": [{"rule": "other > 0.2"}],
    }  # fmt: skip
    before, _ = decide(data, **settings)
    best = max((d for d in before if d["keep"]), key=lambda d: d["score"])
    worst = next(d for d in before if d["reason"].startswith("filter"))
    unscored = next(d for d in before if d["reason"].startswith("missing_score"))
    path = decided(
        tmp_path,
        {"id": best["id"], "decision": "drop", "reviewer": "R", "reason": "a false answer"},
        {"id": worst["id"], "decision": "keep", "reviewer": "R"},
        {"id": unscored["id"], "decision": "keep"},
    )
    after, report = decide(data, overrides=path, **settings)
    by_id = {d["id"]: d for d in after}
    assert by_id[best["id"]]["reason"] == "override: by R: a false answer"
    assert by_id[worst["id"]]["reason"] == "kept: override: by R"
    assert by_id[unscored["id"]]["reason"] == "kept: override"
    assert not by_id[best["id"]]["keep"]
    assert by_id[worst["id"]]["keep"]
    assert by_id[unscored["id"]]["keep"]
    assert report["reasons"]["kept: override"] == 2
    assert report["reasons"]["override"] == 1
    # The others are as if those three weren't there.
    apart = {best["id"], worst["id"], unscored["id"]}
    others, _ = decide([row for row in data if row["id"] not in apart], **settings)
    assert {d["id"]: d["keep"] for d in others} == {
        d["id"]: d["keep"] for d in after if d["id"] not in apart
    }


def test_licences_and_anchors_go_before_people_and_copies_behind_them(tmp_path: Path) -> None:
    data = rows(12)
    data[3]["effective_messages"] = data[2]["effective_messages"]
    for number, row in enumerate(data):
        row["license"] = "CC BY-NC 4.0" if number == 4 else "mit"
    data[5]["source"] = "anchor"
    path = decided(tmp_path, *({"id": row["id"], "decision": "keep"} for row in data[2:6]))
    policy = LicensePolicy(allow=["mit"])
    found, _ = decide(data, overrides=path, anchors=("anchor",), policy=policy)
    kept = {number: row["reason"] for number, row in enumerate(found) if number in range(2, 6)}
    # Both copies were asked for by name.
    assert kept == {
        2: "kept: override", 3: "kept: override", 4: "license: cc-by-nc-4.0", 5: "anchor",
    }  # fmt: skip
    path = decided(tmp_path, {"id": data[2]["id"], "decision": "keep"})
    found, _ = decide(data, overrides=path, filters=[{"rule": "other > 2"}])
    assert [row["keep"] for row in found].count(True) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"id": "a"}, "record 1 has no decision"),
        ({"decision": "keep"}, "record 1 has no id"),
        ({"id": "a", "decision": "maybe"}, "'maybe'; it must be keep or drop"),
        ({"id": "first", "decision": "drop"}, "first is decided twice"),
        ({"id": 7, "decision": "drop"}, "id is no text: 7"),
    ],
)
def test_a_decision_that_is_none_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = decided(tmp_path, {"id": "first", "decision": "keep"}, line)
    with pytest.raises(ConfigError, match=f"o.jsonl.*{said}"):
        decide(rows(3), overrides=path)
    with pytest.raises(ConfigError, match="gone"):
        decide(rows(3), overrides=f"{path}-gone.jsonl")


def test_a_decision_about_no_row_stops_selection(tmp_path: Path) -> None:
    path = decided(tmp_path, {"id": "f" * 32, "decision": "drop"})
    with pytest.raises(StageError, match="1 rows that there aren't, such as ffff"):
        decide(rows(3), overrides=path)


def test_a_recipe_finds_its_overrides_and_their_content_counts(recipe: Any, execute: Any) -> None:
    execute()
    decisions = recipe.run_folder / "selection" / "decisions.parquet"
    kept = next(row["id"] for row in pq.read_table(decisions).to_pylist() if row["keep"])
    (recipe.path.parent / "people.csv").write_text(f"id,decision,reviewer\n{kept},drop,R\n")
    recipe.value["selection"]["overrides"] = "people.csv"
    execute(restart_from="selection")
    row = next(row for row in pq.read_table(decisions).to_pylist() if row["id"] == kept)
    assert row["reason"] == "override: by R"
    assert "override: by R" in story(str(recipe.run_folder), kept)
    assert execute().kinds("selection") == ["kept"]
    (recipe.path.parent / "people.csv").write_text(f"id,decision,reviewer\n{kept},keep,R\n")
    with pytest.raises(ConfigError, match="restart-from selection"):
        execute()
    execute(restart_from="selection")
    assert "kept: override: by R" in story(str(recipe.run_folder), kept)
    assert str(recipe.path.parent) not in (recipe.run_folder / "dataset/lineage.json").read_text()
