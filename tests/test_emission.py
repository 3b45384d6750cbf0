"""Emission: quotas, sampling, the written data set, and what explains it."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from emission_runs import NASTY, SCHEMA, Run, Table, assistant, read, two_sources, user
from pydantic import ValidationError

from stages.base import Outcome
from stages.emission import EmissionSettings, EmissionStage
from stages.emission.quotas import largest_remainder
from stages.errors import ConfigError, StageError
from stages.storage import Store


@pytest.fixture
def run() -> Run:
    return two_sources()


@pytest.fixture
def url(tmp_path: Any) -> str:
    return str(tmp_path / "run")


def test_largest_remainder_is_closest_of_all_splits() -> None:
    """Hamilton's method minimises the L1 distance to the exact shares: compared with all splits."""
    random = np.random.default_rng(0)
    for _ in range(60):
        k, total = int(random.integers(1, 5)), int(random.integers(0, 9))
        raw = random.random(k)
        weights = {f"s{i}": float(value) for i, value in enumerate(raw)}
        exact = raw / raw.sum() * total
        parts = np.array(list(largest_remainder(weights, total).values()))
        splits = (s for s in itertools.product(range(total + 1), repeat=k) if sum(s) == total)
        best = min(np.abs(np.array(split) - exact).sum() for split in splits)
        assert parts.sum() == total
        assert np.abs(parts - exact).max() < 1
        assert np.abs(parts - exact).sum() == pytest.approx(best)


def test_largest_remainder_ties_go_by_name_in_any_order() -> None:
    assert largest_remainder({"c": 1, "b": 1, "a": 1}, 4) == {"a": 2, "b": 1, "c": 1}
    assert largest_remainder({"a": 1, "b": 1, "c": 1}, 5) == {"a": 2, "b": 2, "c": 1}
    assert largest_remainder({"a": 0.1, "b": 0.2, "c": 0.7}, 10) == {"a": 1, "b": 2, "c": 7}


@pytest.mark.parametrize("weights", [{"a": -1.0, "b": 2.0}, {"a": 0.0}, {"a": float("nan")}])
def test_weights_that_are_none_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"."):
        largest_remainder(weights, 3)


def test_quotas_are_met_and_only_selected_rows_emitted(run: Run, url: str) -> None:
    outcome = run.emit(url, budget_rows=60)
    lines = read(outcome)
    assert Counter(line["source"] for line in lines) == {"sums": 15, "chat": 45}
    assert len({line["id"] for line in lines}) == 60
    assert {line["id"] for line in lines} <= {row["id"] for row in run.rows if row["keep"]}
    assert outcome.report["sources"]["chat"]["quota"] == 45
    assert outcome.report["shortfall"] == 0


def test_quota_above_what_is_there_names_source_and_remedy(run: Run, url: str) -> None:
    with pytest.raises(StageError) as raised:
        run.emit(url, budget_rows=100)
    message = str(raised.value)
    assert "source chat should give 75 rows but 64 are available" in message
    assert "sums" not in message
    largest = int(re.search(r"to at most (\d+)", message)[1])  # type: ignore[index]
    assert run.emit(url, budget_rows=largest).report["rows"] == largest
    with pytest.raises(StageError):
        run.emit(url, budget_rows=largest + 1)


def test_without_budget_the_most_that_meets_the_weights(run: Run, url: str) -> None:
    rows = run.emit(url).report["sources"]
    assert (rows["chat"]["rows"], rows["sums"]["rows"]) == (64, 21)
    run.mixture = None
    assert run.emit(f"{url}-unmixed").report["rows"] == sum(row["keep"] for row in run.rows)


def test_anchors_are_never_emitted(run: Run, url: str) -> None:
    run.add("house", 40, role="anchor")
    run.mixture["weights"] = {"sums": 0.2, "chat": 0.6, "house": 0.2}  # type: ignore[index]
    outcome = run.emit(url, budget_rows=60)
    assert Counter(line["source"] for line in read(outcome)) == {"sums": 15, "chat": 45}


def test_copies_only_after_all_rows_were_used(run: Run, url: str) -> None:
    run.sources[0]["repeats"] = 2.9
    run.mixture["weights"] = {"sums": 1.0}  # type: ignore[index]
    outcome = run.emit(url, budget_rows=70)
    copies = Counter(line["id"] for line in read(outcome))
    assert len(copies) == 40
    assert Counter(copies.values()) == {2: 30, 1: 10}
    table = outcome.tables["emitted.parquet"].to_pylist()
    assert all(line["copies"] == copies[line["id"]] for line in table)
    with pytest.raises(StageError, match="81 rows but 80 are available"):
        run.emit(url, budget_rows=81)


def test_token_budget_stops_before_passing_a_quota(run: Run, url: str) -> None:
    tokens = {row["id"]: row["tokens"] for row in run.rows}
    outcome = run.emit(url, budget_tokens=500)
    spent: Counter[str] = Counter()
    for line in read(outcome):
        spent[line["source"]] += tokens[line["id"]]
    for name, quota in (("sums", 125), ("chat", 375)):
        facts = outcome.report["sources"][name]
        assert facts["quota"] == quota
        assert facts["tokens"] == spent[name]
        assert facts["shortfall"] == quota - spent[name]
        assert 0 <= facts["shortfall"] < max(tokens.values())


def test_token_budget_below_one_row_is_refused(run: Run, url: str) -> None:
    with pytest.raises(StageError, match="holds no row"):
        run.emit(url, budget_tokens=4)


def test_smaller_budget_is_a_part_of_a_larger_one(run: Run, url: str) -> None:
    small = {line["id"] for line in read(run.emit(url, budget_rows=20))}
    large = {line["id"] for line in read(run.emit(url, budget_rows=60))}
    assert small < large
    other = {line["id"] for line in read(run.emit(url, budget_rows=20, seed=6))}
    assert other != small


def test_best_takes_the_highest_scores(run: Run, url: str) -> None:
    outcome = run.emit(url, budget_rows=60, order="best", score="similarity")
    taken = {line["id"] for line in read(outcome)}
    for name in ("sums", "chat"):
        kept = [row for row in run.rows if row["keep"] and row["source"] == name]
        inside = [row["similarity"] for row in kept if row["id"] in taken]
        outside = [row["similarity"] for row in kept if row["id"] not in taken]
        assert min(inside) >= max(outside)


def test_bytes_are_equal_twice_and_for_any_number_of_shards(run: Run, url: str) -> None:
    first = run.emit(url, budget_rows=60, shard_bytes=4_000)
    for shards in (1, 3, 7):
        again = run.emit(url, shards=shards, budget_rows=60, shard_bytes=4_000)
        assert again.files == first.files
        assert again.tables["emitted.parquet"].equals(first.tables["emitted.parquet"])
    assert sum(name.startswith("data/") for name in first.files) > 1


def test_order_depends_on_ids_alone(run: Run, url: str) -> None:
    first = [line["id"] for line in read(run.emit(url, budget_rows=60))]
    run.rows.reverse()
    assert [line["id"] for line in read(run.emit(url, budget_rows=60))] == first
    sources = [{row["id"]: row["source"] for row in run.rows}[name] for name in first]
    assert len(list(itertools.groupby(sources))) > 10


def test_emitted_table_finds_every_line(run: Run, url: str) -> None:
    outcome = run.emit(url, budget_rows=60, shard_bytes=4_000)
    tables = {
        name: pq.read_table(pa.BufferReader(data))
        for name, data in outcome.files.items()
        if name.startswith("data/")
    }
    emitted = outcome.tables["emitted.parquet"].to_pylist()
    assert len(emitted) == 60
    for line in emitted:
        assert tables[line["shard"]]["id"][line["position"]].as_py() == line["id"]
        assert tables[line["shard"]]["source"][line["position"]].as_py() == line["source"]


def test_rewritten_rows_carry_their_original_text(run: Run, url: str) -> None:
    originals = {row["id"]: row for row in run.rows}
    lines = read(run.emit(url, budget_rows=60))
    assert any(line["provenance"]["original"] for line in lines)
    for line in lines:
        row, original = originals[line["id"]], line["provenance"]["original"]
        assert line["messages"] == (row["messages_reflected"] or row["messages"])
        assert original == (row["messages"] if row["messages_reflected"] else None)
        assert line["provenance"]["ifd"] == pytest.approx(row["ifd"])
        assert line["provenance"]["reflection_outcome"] == row["reflection_outcome"]
    assert "provenance" not in read(run.emit(url, budget_rows=60, provenance=False))[0]


def test_answer_of_a_rewritten_question_is_left_out(run: Run, url: str) -> None:
    for row in run.rows:
        row["answer"] = "4"
        if row["messages_reflected"] and row["source"] == "sums":
            row["messages_reflected"] = [user("another question"), row["messages_reflected"][1]]
    for line in read(run.emit(url, budget_rows=60)):
        changed = line["provenance"]["original"] and line["source"] == "sums"
        assert line["provenance"]["answer"] == (None if changed else "4")


def test_null_fields_of_turns_are_left_out(run: Run, url: str) -> None:
    def fields(outcome: Outcome) -> set[tuple[str, ...]]:
        return {
            tuple(pq.read_schema(pa.BufferReader(data)).field("messages").type.value_type.names)
            for name, data in outcome.files.items()
            if name.startswith("data/")
        }

    plain = run.emit(url, budget_rows=60, shard_bytes=4_000)
    assert fields(plain) == {("role", "content")}
    assert not any(name == "tools" for name in read(plain)[0])
    chosen = read(plain)[0]["id"]
    for row in run.rows:
        if row["id"] == chosen:
            for turns in (row["messages"], row["messages_reflected"] or []):
                turns[-1:] = [{**turn, "reasoning": "because"} for turn in turns[-1:]]
            row["tools"] = "[]"
    mixed = run.emit(url, budget_rows=60, shard_bytes=4_000)
    assert fields(mixed) == {("role", "content", "reasoning")}
    told = {line["id"]: line for line in read(mixed)}
    assert told[chosen]["messages"][-1]["reasoning"] == "because"
    assert told[chosen]["tools"] == "[]"
    assert sum(line["tools"] is not None for line in told.values()) == 1


def multi_turn(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Give half of the rows a system turn and an earlier exchange; the texts by id."""
    texts = {}
    for i, row in enumerate(run.rows):
        turns = row["messages_reflected"] or row["messages"]
        if i % 2 and turns is row["messages"]:
            early = [{"role": "system", "content": "be brief"}, user("hi"), assistant("hello")]
            row["messages"] = turns = [*early, *row["messages"]]
        texts[row["id"]] = turns
    return texts


def test_prompt_and_completion_join_to_the_conversation(run: Run, url: str) -> None:
    texts = multi_turn(run)
    lines = read(run.emit(url, budget_rows=60, format="prompt_completion", shard_bytes=4_000))
    assert list(lines[0]) == ["prompt", "completion", "id", "source", "provenance"]
    for line in lines:
        assert len(line["completion"]) == 1
        assert line["prompt"] + line["completion"] == texts[line["id"]]


def test_alpaca_columns_hold_the_conversation(run: Run, url: str) -> None:
    plain = read(run.emit(url, budget_rows=60, format="alpaca"))
    assert list(plain[0])[:4] == ["instruction", "input", "output", "id"]
    texts = multi_turn(run)
    for line in read(run.emit(url, budget_rows=60, format="alpaca")):
        turns = [{"role": "system", "content": line["system"]}] if line["system"] else []
        for asked, said in line["history"] or []:
            turns += [user(asked), assistant(said)]
        turns += [user(line["instruction"] + line["input"]), assistant(line["output"])]
        assert turns == texts[line["id"]]


@pytest.mark.parametrize(
    "turns",
    [
        [user("a"), user("b"), assistant("c")],
        [user("a"), {"role": "assistant", "content": "c", "reasoning": "r"}],
        [user("a"), assistant("call"), {"role": "tool", "content": "t"}, assistant("c")],
    ],
)
def test_alpaca_refuses_what_it_would_lose(run: Run, url: str, turns: list[Any]) -> None:
    for row in run.rows:
        row["messages"], row["messages_reflected"] = turns, None
    with pytest.raises(StageError, match="Alpaca columns can't hold"):
        run.emit(url, budget_rows=60, format="alpaca")


@pytest.mark.parametrize("form", ["messages", "prompt_completion", "alpaca"])
def test_load_dataset_reads_the_folder(
    run: Run, url: str, tmp_path: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run.emit(url, budget_rows=60, shard_bytes=4_000, format=form)
    folder = Store(str(tmp_path / "dataset"))
    for name, data in outcome.files.items():
        folder.write_bytes(name, data)
    folder.write_json("manifest.json", {"stage": "emission"})
    code = (
        "import json, sys, datasets\n"
        "rows = datasets.load_dataset(sys.argv[1], split='train')\n"
        "print(json.dumps({'rows': list(rows)}))"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run(
        [sys.executable, "-c", code, folder.url], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == read(outcome)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_report_escapes_data_and_loads_nothing(run: Run, url: str) -> None:
    for row in run.rows:
        row["messages"] = [user(f"see https://example.org {NASTY}"), *row["messages"][1:]]
        row["reflection_outcome"] = NASTY
    run.sources[0]["license"] = NASTY
    outcome = run.emit(url, budget_rows=60)
    page = Page()
    html = outcome.files["report.html"].decode()
    page.feed(html)
    tags = [tag for tag, _ in page.tags]
    assert not set(tags) & {"img", "link", "iframe", "object", "image", "use", "a"}
    assert tags.count("script") == 1
    script = html[html.rindex("<script>") + 8 : html.rindex("</script>")]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    for _, attributes in page.tags:
        assert not set(attributes) & {"src", "href", "xlink:href", "srcset", "onerror"}
        assert not any("url(" in (value or "") for value in attributes.values())
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert page.text.count(NASTY) > 10


def test_report_tells_the_numbers_of_the_run(run: Run, url: str) -> None:
    page = Page()
    page.feed(run.emit(url, budget_rows=60).files["report.html"].decode())
    for words in ("records read", "136", "130", "104", "60", "25.0%", "cap 90%", "What changed",
                  "Emission isn't listed", "tamis status"):  # fmt: skip
        assert words in page.text
    assert "costs less than 0.4:" in page.text
    rewritten = sum(row["messages_reflected"] is not None for row in run.rows)
    assert f"{rewritten} rewritten rows" in page.text


def test_hardest_and_easiest_rows_are_of_all_rows_with_their_fate(run: Run, url: str) -> None:
    outcome = run.emit(url, budget_rows=60)
    html = outcome.files["report.html"].decode()
    section = html[html.index("Hardest and easiest rows") :]
    lists = re.split("<h3>Easiest", section)[:2]
    emitted = set(outcome.tables["emitted.parquet"]["id"].to_pylist())
    own = [row for row in run.rows if row["source"] != "owned"]
    scores = sorted(np.float32(row["ifd_effective"]) for row in own)
    for part, expected in zip(lists, (scores[::-1][:20], scores[:20]), strict=True):
        items = re.findall("<details>.*?</details>", part, re.S)
        shown = [float(re.search(r'class="score">([\d.]+)', item)[1]) for item in items]
        assert shown == pytest.approx([round(float(score), 3) for score in expected], abs=1e-3)
        for item in items:
            name = re.search(r'class="note">(\w+)', item)[1]
            row = next(row for row in run.rows if row["id"] == name)
            fate = "emitted" if name in emitted else "selected" if row["keep"] else "dropped"
            assert (f">{fate}<" in item) == (fate != "emitted")


def test_report_and_card_without_optional_stages(run: Run, url: str) -> None:
    run.present = ("id", "source", "messages", "license")
    run.mixture = None
    outcome = run.emit(url)
    html = outcome.files["report.html"].decode()
    for title in ("Difficulty", "Reflection", "Similarity", "Hardest", "Prefixes", "Windows"):
        assert f"<h2>{title}" not in html
    assert "No mixture was fitted" in html
    assert "No mixture was fitted" in outcome.files["README.md"].decode()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("transport", "weights that the certificate can't tell apart"),
        ("energy", "weights within two standard errors"),
        ("debiased", "least and greatest weight over the halves"),
    ],
)
def test_ranges_are_named_by_what_the_method_makes_them(
    run: Run, url: str, method: str, words: str
) -> None:
    assert run.mixture is not None
    run.mixture["method"] = method
    files = run.emit(url, budget_rows=60).files
    for name, words_of in (("report.html", "range: {}"), ("README.md", "Ranges are {}")):
        said = html.unescape(files[name].decode())
        assert words_of.format(words) in said
        assert said.count("certificate can't tell apart") == (method == "transport")


def test_methods_without_ranges_name_none(run: Run, url: str) -> None:
    assert run.mixture is not None
    run.mixture |= {"method": "uniform", "ranges": None}
    files = run.emit(url, budget_rows=60).files
    assert "range: " not in files["report.html"].decode()
    assert "Ranges are" not in files["README.md"].decode()


def test_card_front_matter_and_tables(run: Run, url: str) -> None:
    for row in run.rows[50:]:
        row["license"] = "a|b\n# <script>no heading"
    card = run.emit(url, budget_rows=60).files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "other"
    assert front["size_categories"] == ["n<1K"]
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert "| sums | mit | 53 | 50 | 40 | 15 | 0.2500 |" in card
    assert "a\\|b-#-\\<script\\>no-heading" in card
    assert "<script>" not in card


@pytest.mark.parametrize(
    ("declared", "tag"),
    [
        (("MIT", "mit"), "mit"),
        (("MIT", "apache-2.0"), "other"),
        (("mit", None), "other"),
        (("house rules", "house rules"), "other"),
    ],
)
def test_license_is_named_where_it_is_one_and_known(
    url: str, declared: tuple[str | None, str | None], tag: str
) -> None:
    run = Run()
    for i, name in enumerate(declared):
        run.add(f"s{i}", 10, license=name)
    card = run.emit(url).files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == tag


def test_lineage_agrees_with_the_files(run: Run, url: str) -> None:
    outcome = run.emit(url, budget_rows=60, shard_bytes=4_000)
    lineage = json.loads(outcome.files["lineage.json"])
    for shard in lineage["shards"]:
        data = outcome.files[shard["name"]]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert pq.read_metadata(pa.BufferReader(data)).num_rows == shard["rows"]
    counts = lineage["counts"]
    assert counts["records"] == counts["ingested"] + sum(counts["rejected"].values()) == 136
    assert counts["ingested"] == counts["selected"] + sum(counts["dropped"].values()) == 130
    assert counts["emitted"] == sum(shard["rows"] for shard in lineage["shards"]) == 60
    assert {stage["stage"]: stage.get("fingerprint") for stage in lineage["stages"]}[
        "selection"
    ] == "selection" * 3


def test_times_are_in_the_report_alone(run: Run, url: str) -> None:
    first = run.emit(url, budget_rows=60)
    artifacts = run.artifacts(url)
    manifest = artifacts["selection"].read_json("manifest.json")
    artifacts["selection"].write_json("manifest.json", {**manifest, "seconds": 777.0})
    again = run.stage(budget_rows=60).decide(run.table(3), run.targets(), artifacts)
    differing = {name for name in first.files if first.files[name] != again.files[name]}
    assert differing == {"report.html"}


def test_rows_that_selection_did_not_see_are_refused(run: Run, url: str) -> None:
    stores = run.artifacts(url)
    run.rows[0], run.rows[1] = run.rows[1], run.rows[0]
    stage = EmissionStage(EmissionSettings(), 5, {"sources": run.sources}, run.present)
    with pytest.raises(StageError, match="run again from selection"):
        stage.decide(run.table(2), Table([]), stores)


def test_settings_that_contradict_are_refused(run: Run) -> None:
    for wrong in (
        {"budget_rows": 1, "budget_tokens": 1},
        {"order": "best"},
        {"score": "ifd"},
        {"budget_rows": 0},
    ):
        with pytest.raises(ValidationError):
            EmissionSettings(**wrong)
    best = EmissionSettings(order="best", score="nothing")
    with pytest.raises(ConfigError, match="nothing"):
        EmissionStage(best, 5, {"sources": []}, run.present)


def test_vectors_are_not_read() -> None:
    present = (*SCHEMA.names, "embedding", "judge_score", "sae_indices", "file")
    needs = EmissionStage(EmissionSettings(), 5, {}, present).columns().needs
    assert "judge_score" in needs
    assert not {"embedding", "sae_indices", "file"} & set(needs)


def test_import_loads_no_model_library() -> None:
    code = (
        "import sys, stages.emission\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
