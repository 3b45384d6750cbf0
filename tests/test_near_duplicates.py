"""Near duplicates: against brute force, whatever the shards, and told to whoever asks."""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.sparse import csr_array

from pipeline.config import read_config
from pipeline.why import story
from stages.base import Each, in_turn
from stages.errors import ConfigError, StageError
from stages.ingest import (
    ContaminationSettings,
    IngestReport,
    IngestSettings,
    NearDuplicateSettings,
    ingest,
    iter_rows,
)
from stages.ingest.bands import bands_of, candidate_probability
from stages.ingest.clusters import Duplicates, _Shingles
from stages.ingest.near_duplicates import found_near_duplicates
from stages.ingest.parse import Row
from stages.rows import ROWS
from stages.sources.settings import Source, Target
from stages.storage import Store
from stages.words import IntArray, words

SURE = NearDuplicateSettings(
    part="response", threshold=0.5, shingle=1, permutations=128, recall=1 - 1e-7
)
"""64 bands of two hashes: at 0.5 and above a pair is missed once in 100 million."""

SOME = NearDuplicateSettings(part="response")


def lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
    return str(path)


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(max(len(found) - n + 1, min(len(found), 1)))}


def similarities(texts: list[str], n: int) -> Any:
    """Jaccard similarity of all pairs, from all pairs' common shingles."""
    sets = [sorted(shingles(text, n)) for text in texts]
    names = {gram: place for place, gram in enumerate(sorted({g for one in sets for g in one}))}
    columns = [names[gram] for one in sets for gram in one]
    rows = np.repeat(np.arange(len(sets)), [len(one) for one in sets])
    held = csr_array((np.ones(len(columns)), (rows, columns)), shape=(len(sets), len(names)))
    common = (held @ held.T).tocoo()
    sizes = np.array([len(one) for one in sets])
    joint = sizes[common.row] + sizes[common.col] - common.data
    return csr_array((common.data / joint, (common.row, common.col)), shape=common.shape)


def components(near: Any) -> np.ndarray[Any, Any]:
    """For each row the first of those that near pairs join it with, by walking from row to row."""
    found = np.full(near.shape[0], -1)
    for start in range(near.shape[0]):
        waiting = [start] if found[start] < 0 else []
        while waiting:
            row = waiting.pop()
            if found[row] < 0:
                found[row] = start
                waiting += near.indices[near.indptr[row] : near.indptr[row + 1]].tolist()
    return found


def found_in(
    store: Store,
    texts: list[str],
    wanted: NearDuplicateSettings,
    rows_per_shard: int,
    each: Each = in_turn,
) -> Duplicates:
    """Near duplicates among rows with these responses."""
    parts = []
    for start in range(0, len(texts), rows_per_shard):
        rows = [
            {"source": "s", "messages": [{"role": "user", "content": "?"},
                                         {"role": "assistant", "content": text}]}
            for text in texts[start : start + rows_per_shard]
        ]  # fmt: skip
        schema = pa.schema([ROWS.field("source"), ROWS.field("messages")])
        parts.append((f"part-{len(parts):05d}.arrow", len(rows)))
        store.write_arrow(parts[-1][0], pa.Table.from_pylist(rows, schema=schema))
    return found_near_duplicates(store, parts, wanted, {"s": 0}, each)


# Bands


def test_probability_of_a_candidate_is_that_of_drawn_signatures() -> None:
    draws = np.random.default_rng(0)
    for similarity in (0.3, 0.6, 0.8):
        # Each hash of two signatures agrees with the probability of the Jaccard similarity.
        agree = draws.random((20_000, 16, 4)) < similarity
        measured = agree.all(axis=2).any(axis=1).mean()
        assert measured == pytest.approx(candidate_probability(similarity, 16, 4), abs=0.015)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_reach_the_recall_and_wider_ones_would_not(threshold: float) -> None:
    bands, width = bands_of(threshold, 128, 0.99)
    assert bands * width <= 128
    assert candidate_probability(threshold, bands, width) >= 0.99
    for wider in range(width + 1, 129):
        assert candidate_probability(threshold, 128 // wider, wider) < 0.99


def test_unreachable_recall_is_refused() -> None:
    with pytest.raises(ValidationError, match="raise permutations, or lower recall"):
        NearDuplicateSettings(threshold=0.1, permutations=8)


# Against brute force


@pytest.mark.parametrize("neighbours", [0, 4])
@settings(max_examples=50)
@given(
    st.lists(
        st.lists(st.sampled_from("abcdefgh"), max_size=8).map(" ".join), min_size=1, max_size=14
    ),
    st.integers(5, 15),
)
def test_clusters_are_those_of_all_pairs(
    neighbours: int, texts: list[str], rows_per_shard: int
) -> None:
    store = Store("memory://near-duplicates")
    store.remove("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.ingest.clusters._NEIGHBOURS", neighbours)
        found = found_in(store, texts, SURE, rows_per_shard)
    similar = similarities(texts, 1)
    near = similar.copy()
    near.data = near.data >= 0.5
    near.eliminate_zeros()
    first = components(near)
    dropped = [row for row in range(len(texts)) if first[row] != row]
    assert found.rows.tolist() == dropped
    assert found.kept.tolist() == first[dropped].tolist()
    expected = [similar[row, first[row]] for row in dropped]
    assert found.similarity.tolist() == pytest.approx(expected)


def edited(texts: list[str], seed: int) -> list[str]:
    """The texts, and copies of some with words left out."""
    draws = random.Random(seed)
    copies = []
    for text in texts[::3]:
        kept = [word for word in text.split() if draws.random() > 0.02]
        copies.append(" ".join(kept))
    return texts + copies


def real_responses(shared_data: Path, name: str, rows: int) -> list[str]:
    source = Source(name="s", path=str(shared_data / "sources" / name), rows=(0, rows))
    return [row.messages[-1]["content"] for row in iter_rows(source) if isinstance(row, Row)]


def test_recall_and_precision_on_five_thousand_real_rows(tmp_path: Path, shared_data: Path) -> None:
    names = ("t0_20k.jsonl.gz", "gpteacher_codegen.json", "flan_cot_aqua.json", "math_5000.jsonl")
    texts = [text for name in names for text in real_responses(shared_data, name, 950)]
    texts = edited(texts, 7)
    assert len(texts) > 5000
    wanted = NearDuplicateSettings(part="response")
    found = found_in(Store(str(tmp_path)), texts, wanted, 1000)
    similar = similarities(texts, wanted.shingle)
    near = similar.copy()
    near.data = near.data >= wanted.threshold
    near.eliminate_zeros()
    expected, clusters = components(near), np.arange(len(texts))
    clusters[found.rows] = found.kept
    # Precision: what is joined here, brute force joins.
    assert np.array_equal(expected[found.rows], expected[found.kept])
    measured = np.array(
        [similar[a, b] for a, b in zip(found.rows.tolist(), found.kept.tolist(), strict=True)]
    )
    assert found.similarity == pytest.approx(measured)
    # Recall, of pairs over the threshold.
    pairs = near.tocoo()
    apart = pairs.row < pairs.col
    joined = clusters[pairs.row[apart]] == clusters[pairs.col[apart]]
    assert apart.sum() > 1000
    assert joined.mean() > 0.999
    dropped = (expected != np.arange(len(texts))).sum()
    assert len(found.rows) == pytest.approx(dropped, rel=0.002)


def test_answer_is_the_same_for_any_shards_tasks_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = random.Random(3)
    texts = [" ".join(draws.choices("abcdef", k=9)) for _ in range(300)]
    wanted = NearDuplicateSettings(part="response", threshold=0.4, shingle=2)
    one = found_in(Store(str(tmp_path / "a")), texts, wanted, 1000)
    assert len(one.rows) > 20
    monkeypatch.setattr("stages.ingest.near_duplicates._TASK_ROWS", 5)
    with ProcessPoolExecutor(2, get_context("spawn")) as workers:
        other = found_in(Store(str(tmp_path / "b")), texts, wanted, 50, workers.map)
    for name in ("rows", "kept", "similarity"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


def filled_templates(count: int, own: range, seed: int) -> list[str]:
    """Texts with 170 words in common, and so many words of their own each."""
    draws = random.Random(seed)
    frame = " ".join(f"word{i}" for i in range(170))
    return [
        f"{frame} {' '.join(str(draws.random()) for _ in range(draws.choice(own)))}"
        for _ in range(count)
    ]


@pytest.mark.parametrize("own", [range(30, 31), range(10, 60)])
def test_buckets_searched_by_shingles_give_what_all_their_pairs_do(own: range) -> None:
    texts = filled_templates(300, own, 0)
    texts = edited(texts, 1)
    found = []
    for number, neighbours in enumerate((0, 4, len(texts))):
        store = Store(f"memory://searched-{number}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stages.ingest.clusters._NEIGHBOURS", neighbours)
            found.append(found_in(store, texts, SOME, 1000))
    assert len(found[0].rows) > 60
    for name in ("rows", "kept", "similarity"):
        for other in found[1:]:
            assert np.array_equal(getattr(found[0], name), getattr(other, name))


@pytest.mark.parametrize("own", [range(30, 31), range(20, 60)])
def test_filled_templates_that_stay_apart_are_not_compared_pair_by_pair(
    own: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = 0
    similarities_of = _Shingles.similarities

    def counted(self: _Shingles, a: IntArray, b: IntArray) -> Any:
        nonlocal verified
        verified += len(a)
        return similarities_of(self, a, b)

    monkeypatch.setattr(_Shingles, "similarities", counted)
    counts = []
    for rows in (400, 1600):
        verified = 0
        texts = filled_templates(rows, own, 2)
        found = found_in(Store(f"memory://apart-{rows}"), texts, SOME, 1000)
        assert len(found.rows) < rows / 2
        counts.append(verified)
    # All pairs would be 16 times as many.
    assert counts[1] < 6 * counts[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏",
            "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬",
        ),
        (
            "วันนี้อากาศดีมากฉันไปเดินเล่นที่สวนกับเพื่อน",
            "วันนี้อากาศดีมากฉันไปเดินเล่นที่สวนกับเพื่อ",
        ),
    ],
)
def test_scripts_without_spaces_are_compared_by_character(
    tmp_path: Path, one: str, other: str
) -> None:
    wanted = NearDuplicateSettings(part="response")
    found = found_in(Store(str(tmp_path)), [one, other, one[::-1]], wanted, 10)
    assert found.rows.tolist() == [1]
    assert 0.8 <= found.similarity[0] < 1


# In ingest


LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def pool(path: Path, name: str, answers: list[str], **fields: Any) -> Source:
    records = [{"question": f"{name} {i}?", "answer": text} for i, text in enumerate(answers)]
    return Source(name=name, path=lines(path / f"{name}.jsonl", records), **fields)


def run(
    store: Store, sources: list[Source], rows_per_shard: int = 512, **fields: Any
) -> tuple[IngestReport, list[dict[str, Any]], list[dict[str, Any]]]:
    wanted = NearDuplicateSettings(**{"part": "response", **fields})
    chosen = IngestSettings(near_duplicates=wanted, rows_per_shard=rows_per_shard)
    report = ingest(sources, [], chosen, store)
    rows, rejects = (
        [row for name, _ in shards for row in store.read_table(name).to_pylist()]
        for shards in (report.shards, report.reject_shards)
    )
    return report, rows, rejects


def origins(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["source"], row["record"]) for row in rows]


def test_dropped_rows_are_rejected_with_the_row_that_stays(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    first = pool(tmp_path, "a", [LONG, "Something else.", LONG + " sixteen"])
    second = pool(tmp_path, "b", ["Something new.", "zero " + LONG])
    report, rows, rejects = run(store, [first, second], rows_per_shard=2)
    assert origins(rows) == [("a", 0), ("a", 1), ("b", 0)]
    assert [count for _, count in report.shards] == [2, 1]
    assert origins(rejects) == [("a", 2), ("b", 1)]
    assert [row["kept"] for row in rejects] == [rows[0]["id"]] * 2
    # 11 shingles of 5 words, one more on either side.
    assert rejects[0]["reason"] == f"near_duplicate: of {rows[0]['id']} (Jaccard 0.91)"
    assert json.loads(rejects[0]["raw"])["messages"][1]["content"] == LONG + " sixteen"
    assert len({row["id"] for row in rows + rejects}) == 5
    numbers = report.as_dict()["sources"]
    assert (numbers["a"]["kept"], numbers["a"]["near_duplicate_of"]) == (2, {"a": 1})
    assert (numbers["b"]["kept"], numbers["b"]["near_duplicate_of"]) == (1, {"a": 1})
    assert numbers["b"]["rejected"] == {"near_duplicate": 1}
    assert not store.exists("scratch")


def test_declared_rule_says_which_row_stays(tmp_path: Path) -> None:
    first = pool(tmp_path, "a", [LONG])
    second = pool(tmp_path, "b", [LONG + " sixteen seventeen", LONG + " sixteen"])

    def kept(number: int, *sources: Source, **fields: Any) -> list[tuple[str, int]]:
        store = Store(str(tmp_path / f"run-{number}"))
        chosen = IngestSettings(
            near_duplicates=NearDuplicateSettings(part="response", **fields),
            allow_empty_sources=True,
        )
        report = ingest(sources, [], chosen, store)
        return origins(
            [row for name, _ in report.shards for row in store.read_table(name).to_pylist()]
        )

    assert kept(1, first, second) == [("a", 0)]
    assert kept(2, second, first) == [("b", 0)]
    assert kept(3, first, second, keep="longest") == [("b", 0)]
    assert kept(4, first, second, prefer=["b"]) == [("b", 0)]
    assert kept(5, first, second, prefer=["a"], keep="longest") == [("a", 0)]
    anchor = second.model_copy(update={"role": "anchor"})
    # Rows of anchors go before all others, and are never dropped.
    assert kept(6, first, anchor, prefer=["a"]) == [("b", 0), ("b", 1)]


def test_preferred_sources_win_exact_duplicates_too(tmp_path: Path) -> None:
    answers = ["Something else.", LONG]
    sources = [pool(tmp_path, name, []) for name in ("a", "b", "c")]
    for source in sources:
        records = [{"question": f"{text} Why?", "answer": text} for text in answers]
        lines(Path(str(source.path)), [*records, {"question": source.name, "answer": "only mine"}])

    def kept(number: int, *given: Source, **fields: Any) -> list[tuple[str, int]]:
        blocked = fields.pop("blocked", ())
        near = NearDuplicateSettings(part="response", **fields) if fields else None
        store = Store(str(tmp_path / f"run-{number}"))
        chosen = IngestSettings(near_duplicates=near, allow_empty_sources=True)
        report = ingest(given, [], chosen, store, blocked=blocked)
        assert list(report.sources) == [source.name for source in given]
        return origins(
            [row for name, _ in report.shards for row in store.read_table(name).to_pylist()]
        )

    both = [("b", 0), ("b", 1)]
    assert kept(1, *sources) == [("a", 0), ("a", 1), ("a", 2), ("b", 2), ("c", 2)]
    assert kept(2, *sources, prefer=["b"], threshold=0.9) == [*both, ("b", 2)]
    assert kept(3, *sources, blocked=["a"]) == [*both, ("b", 2), ("c", 2), ("a", 2)]
    assert kept(4, *sources, prefer=["a", "c"], blocked=["a", "c"]) == [*both, ("b", 2)]
    late = sources[2].model_copy(update={"role": "anchor"})
    assert kept(5, *sources[:2], late, blocked=["a"]) == [("b", 2), ("c", 0), ("c", 1), ("c", 2),
                                                         ("a", 2)]  # fmt: skip


def test_rows_that_license_policy_blocks_displace_no_others(recipe: Any, execute: Any) -> None:
    folder = recipe.path.parent
    same = [{"question": f"{name} {LONG}", "answer": "yes"} for name in ("one", "two")]
    near = [{"question": f"three {LONG}", "answer": "yes"}]
    lines(folder / "closed.jsonl", [*same, {"question": f"four {LONG}", "answer": "yes"}])
    lines(folder / "open.jsonl", [*same, *near])
    recipe.value["sources"] = [
        {"name": name, "path": f"{name}.jsonl", "license": license_name}
        for name, license_name in (("closed", "CC BY-NC 4.0"), ("open", "MIT"), ("apples", "mit"))
    ]
    recipe.value["ingest"] |= {"near_duplicates": {"threshold": 0.95}, "allow_empty_sources": True}

    def kept() -> list[str]:
        execute("ingest", restart_from="ingest")
        files = (recipe.run_folder / "ingest").glob("part-*.parquet")
        rows = [row for file in sorted(files) for row in pq.read_table(file).to_pylist()]
        return sorted(f"{name} {record}" for name, record in origins(rows) if name != "apples")

    assert kept() == ["closed 0", "closed 1", "closed 2", "open 2"]
    recipe.value["models"]["teacher"]["terms"] = "unrestricted"
    recipe.value["license_policy"] = {"allow": ["mit"]}
    assert kept() == ["closed 2", "open 0", "open 1", "open 2"]
    recipe.value["ingest"]["near_duplicates"]["threshold"] = 0.5
    assert kept() == ["open 0"]


def test_an_error_while_sources_are_read_leaves_their_rejects_and_no_scratch(
    tmp_path: Path,
) -> None:
    good = pool(tmp_path, "good", [LONG, LONG + " sixteen"])
    bad = Source(name="bad", path=lines(tmp_path / "bad.jsonl", [{"question": "Who?"}]))
    store = Store(str(tmp_path / "run"))
    chosen = IngestSettings(near_duplicates=NearDuplicateSettings())
    with pytest.raises(StageError, match="source bad: 1 of 1 records are rejected"):
        ingest([good, bad], [], chosen, store)
    assert store.read_table("rejects/part-00000.parquet")["source"].to_pylist() == ["bad"]
    assert not store.exists("scratch")


def test_rows_without_words_are_no_duplicates(tmp_path: Path) -> None:
    report, rows, _ = run(Store(str(tmp_path / "run")), [pool(tmp_path, "a", ["...", "!", "?"])])
    assert len(rows) == report.sources["a"].kept == 3


def test_system_turns_are_not_compared(tmp_path: Path) -> None:
    records = [
        {"system": LONG, "question": f"{word} and what is it good for?", "answer": word}
        for word in ("iron", "tin")
    ]
    source = Source(name="s", path=lines(tmp_path / "x.jsonl", records))
    chosen = IngestSettings(near_duplicates=NearDuplicateSettings())
    assert ingest([source], [], chosen, Store(str(tmp_path / "run"))).sources["s"].kept == 2


def test_reasoning_and_tool_calls_are_compared(tmp_path: Path) -> None:
    def called(city: str) -> dict[str, Any]:
        arguments = json.dumps({"city": city})
        call = {"type": "function", "function": {"name": "go", "arguments": arguments}}
        return {
            "messages": [
                {"role": "user", "content": "Do what the plan says next, step by step."},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
        }

    def reasoned(reasoning: str, prompt: str = "What is 12 times 12, say it.") -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": "It is 144.", "reasoning_content": reasoning},
            ]
        }

    ten = "First I take ten times twelve and then two times twelve, which is easy enough to add."
    records = [
        called("Oslo"),
        called("Rome"),
        reasoned(ten),
        reasoned("Squares: 144 is a known square."),
        reasoned(f"{ten} Done."),
    ]
    source = Source(name="s", path=lines(tmp_path / "x.jsonl", records))
    for part, kept in (("both", [0, 1, 2, 3]), ("response", [0, 1, 2, 3]), ("prompt", [0, 2])):
        _, rows, _ = run(Store(str(tmp_path / part)), [source], part=part)
        assert [row["record"] for row in rows] == kept


def test_a_copied_source_vanishes_edited_or_not(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "sources"
    original = Source(name="codegen", path=str(folder / "gpteacher_codegen.json"))
    copy = Source(name="copy", path=str(folder / "new_codealpaca.json"))
    records = json.loads((folder / "new_codealpaca.json").read_bytes())
    for record in records:
        record["output"] = record["response"] = f"Certainly. {record['output']}"
    edited = Source(name="edited", path=lines(tmp_path / "edited.jsonl", records))
    chosen = IngestSettings(
        near_duplicates=NearDuplicateSettings(part="prompt"), allow_empty_sources=True
    )
    report = ingest([original, copy, edited], [], chosen, Store(str(tmp_path / "run")))
    numbers = report.as_dict()["sources"]
    assert numbers["copy"]["duplicate_of"] == {"codegen": 4535}
    assert numbers["edited"]["rejected"] == {"near_duplicate": 4535}
    assert numbers["edited"]["near_duplicate_of"] == {"codegen": 4535}
    assert numbers["codegen"]["kept"] > 4000


# In runs


def test_story_of_a_near_duplicate_and_of_the_row_that_stays(recipe: Any, execute: Any) -> None:
    folder = recipe.path.parent
    records = [json.loads(line) for line in (folder / "apples.jsonl").read_text().splitlines()]
    records.append({"question": f"tell me {LONG}", "answer": "no"})
    lines(folder / "apples.jsonl", records)
    lines(folder / "pears.jsonl", [{"question": f"please {LONG}", "answer": "no"},
                                   {"question": "Another?", "answer": "yes"}])  # fmt: skip
    recipe.value["ingest"]["near_duplicates"] = {"threshold": 0.7, "prefer": ["apples"]}
    execute("ingest")
    run_url = str(recipe.run_folder)
    rejects = Store(run_url).read_table("ingest/rejects/part-00000.parquet").to_pylist()
    reject = next(row for row in rejects if row["source"] == "pears")
    told = " ".join(story(run_url, reject["id"][:20]).split())
    assert "pears: pears.jsonl, record 0" in told
    assert f"rejected: {reject['reason']}" in told
    assert f"kept {reject['kept']}: apples: apples.jsonl, record 10" in told
    other = " ".join(story(run_url, reject["kept"]).split())
    assert "instead of pears: pears.jsonl, record 0: near_duplicate" in other
    assert not (recipe.run_folder / "ingest" / "scratch").exists()


def test_copies_of_a_near_duplicate_are_followed_to_the_row_that_stays(
    recipe: Any, execute: Any
) -> None:
    folder = recipe.path.parent
    short, long = {"question": "tell", "answer": LONG}, {"question": "tell", "answer": f"{LONG} so"}
    for name, record in (("one", short), ("two", short), ("three", long)):
        lines(folder / f"{name}.jsonl", [record, {"question": f"Why {name}?", "answer": name}])
        recipe.value["sources"].append({"name": name, "path": f"{name}.jsonl"})
    recipe.value["ingest"]["near_duplicates"] = {"keep": "longest"}
    execute("ingest")
    run_url = str(recipe.run_folder)
    stays = next(
        row
        for part in sorted((recipe.run_folder / "ingest").glob("part-*.parquet"))
        for row in pq.read_table(part).to_pylist()
        if row["source"] == "three" and row["record"] == 0
    )
    (near,) = [
        row
        for row in pq.read_table(recipe.run_folder / "ingest" / "rejects").to_pylist()
        if row["source"] == "one"
    ]
    wanted = f"kept {stays['id']}: three: three.jsonl, record 0"
    for name in ("one:0", "two:0", near["id"]):
        told = " ".join(story(run_url, name).split())
        assert wanted in told
        assert near["reason"] in told
    assert "one: one.jsonl, record 0, is rejected too" in " ".join(story(run_url, "two:0").split())
    told = " ".join(story(run_url, stays["id"]).split())
    assert "one: one.jsonl, record 0: near_duplicate" in told
    assert "two: two.jsonl, record 0: duplicate" in told
    manifest = json.loads((recipe.run_folder / "ingest" / "manifest.json").read_text())
    counts = manifest["report"]["sources"]
    assert counts["one"]["near_duplicate_of"] == counts["two"]["duplicate_of"] == {"three": 1}


def test_counts_of_copies_name_sources_in_which_a_row_stays(tmp_path: Path) -> None:
    sources = [pool(tmp_path, name, ["Something else."]) for name in "abcd"]
    for source, ends in zip(sources, (["x"], ["x", "y"], ["y"], ["x y z"]), strict=True):
        records = [{"question": "?", "answer": f"{LONG} {end}"} for end in ends]
        with Path(str(source.path)).open("a") as file:
            file.write("".join(json.dumps(one) + "\n" for one in records))
    # A target's copy of its own rows has no part in it.
    goal = Target(
        name="goal",
        path=lines(tmp_path / "t.jsonl", [{"question": "?", "answer": f"{LONG} x"}] * 2),
    )
    chosen = IngestSettings(near_duplicates=NearDuplicateSettings(keep="longest"))
    report = ingest(
        sources,
        [goal],
        chosen,
        Store(str(tmp_path / "run")),
        contamination=ContaminationSettings(targets=False),
    )
    numbers = report.as_dict()["sources"]
    assert [numbers[name]["duplicate_of"] for name in "abcd"] == [{}, {"d": 1}, {"d": 1}, {}]
    assert [numbers[name]["near_duplicate_of"] for name in "ab"] == [{"d": 1}, {"d": 1}]
    assert report.targets["goal"].duplicate_of == {"goal": 1}


def test_story_of_a_target_says_that_it_is_one(recipe: Any, execute: Any) -> None:
    plums = recipe.path.parent / "plums.jsonl"
    plums.write_text(plums.read_text() + plums.read_text().splitlines()[0] + "\n")
    execute("ingest")
    targets = recipe.run_folder / "ingest" / "targets" / "part-00000.parquet"
    target = pq.read_table(targets).to_pylist()[1]
    told = story(str(recipe.run_folder), target["id"])
    assert told == story(str(recipe.run_folder), "plums:1")
    assert "plums: plums.jsonl, record 1, task plums" in told
    assert "never emitted" in told
    assert target["messages"][0]["content"] in told
    copied = " ".join(story(str(recipe.run_folder), "plums:4").split())
    assert "plums: plums.jsonl, record 0 user" in copied


def test_unknown_preferred_source_is_refused(recipe: Any) -> None:
    recipe.value["ingest"]["near_duplicates"] = {"prefer": ["aples"]}
    with pytest.raises(ConfigError, match=r"prefer names 'aples'"):
        read_config(recipe.save())
