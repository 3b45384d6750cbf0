"""Reflection in a run: what it reads of other stages, and that no hostile teacher gets through."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reflection_fakes import TOKENIZER, tagged

from pipeline.backend import LocalBackend
from pipeline.config import read_config
from pipeline.flow import flow_of
from pipeline.runner import Run
from stages.engines import Completion, GenerationRequest, LogLikelihoods, Sampling, ScoreRequest
from stages.errors import ConfigError

ONLY_MODELS = ("dictionary", "features", "embedding", "mixture")


def reflection(run: Path) -> pa.Table:
    files = sorted((run / "reflection").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).unify_dictionaries()


def without_models(recipe: Any) -> None:
    for section in ONLY_MODELS:
        recipe.value[section] = None
    recipe.value["selection"] = {}
    recipe.value["emission"] = {}


class TestReuseOfLosses:
    """Losses that difficulty has are read; they and computed ones give the same shard."""

    @pytest.mark.parametrize("settings", [{}, {"mode": "grid"}, {"phases": "response"}])
    def test_columns_are_equal_to_computed_ones(
        self, recipe: Any, execute: Any, settings: dict[str, Any]
    ) -> None:
        without_models(recipe)
        recipe.value["reflection"] |= settings
        shards, asked = {}, {}
        for name, difficulty in {
            "computed": None,
            "read": {},
            "read in part": {"limit": 11},
            "of another variant": {"variant": "loss_ratio"},
        }.items():
            recipe.value["difficulty"] = difficulty
            recipe.value["execution"]["run"] = str(recipe.path.parent / name.replace(" ", "-"))
            asked[name] = execute().asked["scorer"]
            shards[name] = reflection(recipe.run_folder)
            # What difficulty asks for reflection is spared.
            assert asked[name] == asked["computed"], name
        first, *others = shards.values()
        assert first["ifd_before"].null_count == 0
        assert "messages_reflected" in first.column_names
        assert all(table.equals(first) for table in others)

    def test_losses_of_another_kind_are_not_read(self, recipe: Any) -> None:
        def reads(**difficulty: Any) -> bool:
            recipe.value["difficulty"] = difficulty
            needs = flow_of(read_config(recipe.save())).rows["reflection"].columns().needs
            return "loss_conditional" in needs

        recipe.value["models"]["other"] = recipe.value["models"]["student"] | {"max_length": 99}
        recipe.value["models"]["alias"] = recipe.value["models"]["student"]
        assert reads()
        assert reads(student="alias", rifd=True)
        assert not reads(student="other")
        assert not reads(template="alpaca")
        assert not reads(variant="loss_ratio_prefixed")
        assert not reads(mode="compat", template="alpaca")


def test_rows_without_a_new_response_are_dropped_where_that_is_required(
    recipe: Any, execute: Any
) -> None:
    without_models(recipe)
    recipe.value["reflection"] |= {"require_response_rewrite": True, "limit": 14}
    execute()
    outcomes = reflection(recipe.run_folder)["reflection_outcome"].to_pylist()
    kinds = Counter(outcomes)
    assert kinds.keys() >= {None, "none", "response"}
    decisions = pq.read_table(recipe.run_folder / "selection" / "decisions.parquet").to_pylist()
    for outcome, decision in zip(outcomes, decisions, strict=True):
        # Rows that reflection wasn't asked for are none of its business.
        if outcome in (None, "response", "both"):
            assert decision["keep"]
        else:
            assert decision["reason"] == "filter: response_not_rewritten"


def test_other_unseen_texts_make_every_rewrite_be_checked_again(recipe: Any, execute: Any) -> None:
    without_models(recipe)
    first = execute()
    recipe.write_rows("plums", 0, 5)
    done = execute()
    assert first.asked["generator"] > 0
    assert "shard" in done.kinds("reflection")
    # What the teacher said is in the cache.
    assert done.asked["generator"] == 0
    again = execute()
    assert again.kinds("reflection") == ["kept"]
    recipe.write_rows("quinces", 0, 2)
    quinces = str(recipe.path.parent / "quinces.jsonl")
    recipe.value["contamination"] = {"sets": [{"name": "quinces", "path": quinces}]}
    assert "shard" in execute(restart_from="ingest").kinds("reflection")
    recipe.write_rows("quinces", 0, 3)
    assert "shard" in execute().kinds("reflection")
    # Where targets may be overlapped by rows, they may be by rewrites.
    recipe.value["contamination"] = {"targets": False}
    assert flow_of(read_config(recipe.save())).rows["reflection"].artifacts() == ()


def test_changed_wording_is_refused_and_a_moved_file_is_nothing_new(
    recipe: Any, execute: Any
) -> None:
    from stages.reflection.prompts import default_prompts_file

    folder = recipe.path.parent
    without_models(recipe)
    (folder / "mine.yaml").write_text(default_prompts_file())
    recipe.value["reflection"]["prompts"] = "mine.yaml"
    execute()
    (folder / "mine.yaml").rename(folder / "moved.yaml")
    recipe.value["reflection"]["prompts"] = "moved.yaml"
    assert {event.kind for event in execute().events} == {"kept"}
    text = (folder / "moved.yaml").read_text()
    (folder / "moved.yaml").write_text(text.replace("Improve your answer", "Mend your answer"))
    with pytest.raises(ConfigError, match=r"reflection\.settings\.prompts: .* → "):
        execute()
    done = execute(restart_from="reflection")
    # Phase 1 is asked in the old words, phase 2 in new ones.
    assert 0 < done.asked["generator"] <= 19


UNSEEN = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast and bakes muffins with four. "
    "How much does she earn at the market every day?"
)
SOLUTION = (
    "She sells 16 - 3 - 4 = 9 eggs a day, and at 2 dollars for each of them that makes 9 times 2, "
    "which is 18 dollars every day."
)
SAME = ("What is the best advice of all?", "Always be kind.")


class HostileTeacher:
    """Gives away the targets, wrong final numbers, and the same text for every row."""

    def generate(self, requests: list[GenerationRequest], sampling: Sampling) -> list[Completion]:
        replies = [self.reply(TOKENIZER.decode(request.prompt)) for request in requests]
        return [Completion((1, 2), reply, "stop", -1.0) for reply in replies]

    def reply(self, prompt: str) -> str:
        asks_for_instruction = "<new_instruction>" in prompt
        shown = prompt.rsplit("<instruction>\n", 1)[1].split("\n</instruction>")[0]
        if shown == SAME[0]:
            return tagged(response=SAME[1] + " Always.")
        number = int(shown.split()[-1].rstrip("?"))
        if "apples" in shown:
            if asks_for_instruction:
                asked = [UNSEEN, UNSEEN.upper(), f"Riddle: {UNSEEN}", "What about plums number 3"]
                return tagged(asked[number % 4], f"An answer of its own, {number}.")
            return tagged(response=[SOLUTION, f"As known: {SOLUTION.lower()}"][number % 2])
        if "pears" in shown:
            return tagged(*SAME) if asks_for_instruction else tagged(response=SAME[1] + " Always.")
        if asks_for_instruction:
            # The same question but for its punctuation would no longer have to give the answer.
            asked = [f"{shown}?", f"{shown[:-1]} !", f"**{shown}**", shown.replace("m", "m\u200b")]
            return tagged(asked[number % 4], f"It is {number}, so that makes 987 in all.")
        # Where the source keeps its answers a wrong number, and the right one behind it.
        hidden = f"#### 987 \n(the key says {2 * number})"
        wrong = [f"It is {number}, so that makes 987 in all.", hidden]
        return tagged(response=wrong[number % 2])

    def close(self) -> None: ...


class CredulousStudent:
    """Scores everything that wasn't in the sources as harder, and longer texts as telling more."""

    def __init__(self, originals: set[str]) -> None:
        self.originals = originals

    def score(self, requests: list[ScoreRequest]) -> LogLikelihoods:
        losses = [
            self.loss(TOKENIZER.decode(request.prompt), TOKENIZER.decode(request.target))
            for request in requests
        ]
        counts = np.array([len(request.target) for request in requests], np.int64)
        return LogLikelihoods(-np.array(losses) * counts, counts)

    def loss(self, prompt: str, target: str) -> float:
        if "user" not in prompt:
            return 3.0
        if "Write the request that this reply answers" in prompt:
            old = any(f"\n\n{text}\n\n" in prompt for text in self.originals)
            return 2.0 if old else 1.0 / len(prompt)
        return 1.0 if target in self.originals else 2.0

    def close(self) -> None: ...


class RepeatingTeacher(HostileTeacher):
    """Answers every instruction alike, but for what the comparison leaves out."""

    def reply(self, prompt: str) -> str:
        shown = prompt.rsplit("<instruction>\n", 1)[1].split("\n</instruction>")[0]
        number = int(shown.split()[-1].rstrip("?"))
        if "pears" in shown:
            return tagged(response="Yes, do.")
        emphasis = "*" * (number % 3)
        return tagged(response=f"{emphasis}{SOLUTION}{emphasis}")


def responses_of(folder: Path, *names: str) -> set[str]:
    """The responses in sources' files."""
    return {
        json.loads(line)["answer"]
        for name in names
        for line in (folder / f"{name}.jsonl").read_text().splitlines()
    }


def test_one_response_to_every_instruction_gets_in_once(recipe: Any, tmp_path: Path) -> None:
    without_models(recipe)
    recipe.value["difficulty"] = None
    recipe.value["reflection"] = {"phases": "response", "reply": "tagged"}
    student = CredulousStudent(responses_of(tmp_path, "apples", "pears"))
    engines = {"generator": RepeatingTeacher(), "scorer": student}
    Run(
        read_config(recipe.save()),
        lambda _: None,
        backend=LocalBackend(lambda kind, settings: engines[kind]),
    ).execute()
    assert Counter(reflection(recipe.run_folder)["reflection_outcome"].to_pylist()) == {
        "response": 19
    }
    decisions = pq.read_table(recipe.run_folder / "selection" / "decisions.parquet").to_pylist()
    reasons = Counter((row["source"], row["reason"].split(":")[0]) for row in decisions)
    assert reasons == {
        ("apples", "kept"): 1,
        ("apples", "duplicate_response"): 9,
        # A short answer may be right for many.
        ("pears", "kept"): 9,
    }


@pytest.mark.parametrize(("mode", "kind"), [("sequential", "target"), ("grid", "evaluation set")])
def test_hostile_teacher_gets_nothing_into_the_data_set(
    recipe: Any, tmp_path: Path, mode: str, kind: str
) -> None:
    """No target, no evaluation set, no wrong answer; of one text for many rows one row's."""
    without_models(recipe)
    sums = [
        {"question": f"What about sums number {i}?", "answer": f"It is {i} and {i}.\n#### {2 * i}"}
        for i in range(6)
    ]
    target = {"question": UNSEEN, "answer": SOLUTION}
    for name, rows in (("sums", sums), ("ducks", [target])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe.value["sources"].append(
        {"name": "sums", "path": "sums.jsonl", "answer_pattern": r"####\s*(.+)$"}
    )
    ducks = {"name": "ducks", "path": "ducks.jsonl"}
    if kind == "target":
        recipe.value["targets"].append(ducks)
    else:
        recipe.value["contamination"] = {"sets": [ducks]}
    recipe.value["difficulty"] = None
    recipe.value["reflection"] = {"mode": mode, "reply": "tagged"}
    config = read_config(recipe.save())
    originals = responses_of(tmp_path, "apples", "pears", "sums")
    engines = {"generator": HostileTeacher(), "scorer": CredulousStudent(originals)}
    Run(
        config, lambda _: None, backend=LocalBackend(lambda kind, settings: engines[kind])
    ).execute()

    run = recipe.run_folder
    ingested = [
        row
        for file in sorted((run / "ingest").glob("part-*.parquet"))
        for row in pq.read_table(file, columns=["id", "source"]).to_pylist()
    ]
    sources = [row["source"] for row in ingested]
    table = reflection(run)
    assert table["id"].to_pylist() == [row["id"] for row in ingested]
    found: dict[str, Counter[Any]] = {name: Counter() for name in sources}
    for source, row in zip(sources, table.to_pylist(), strict=True):
        results = (row["reflection_instruction_result"], row["reflection_response_result"])
        found[source][row["reflection_outcome"], *results] += 1
    assert found == {
        "apples": {
            ("none", "overlaps: ducks", "overlaps: ducks"): 8,
            ("none", "overlaps: plums", "overlaps: ducks"): 2,
        },
        # The student takes all of it: only the checks stand in the way.
        "pears": {("both", "accepted", "accepted"): 9},
        "sums": {("none", "unchanged", "answer_missing"): 6},
    }
    decisions = pq.read_table(run / "selection" / "decisions.parquet").to_pylist()
    reasons = Counter(row["reason"].split(":")[0] for row in decisions if row["source"] == "pears")
    assert reasons == {"kept": 1, "duplicate_text": 8}
    emitted = [
        row
        for file in (run / "dataset" / "data").glob("*.parquet")
        for row in pq.read_table(file).to_pylist()
    ]
    texts = [turn["content"] for row in emitted for turn in row["messages"]]
    assert Counter(row["source"] for row in emitted) == {"apples": 10, "sums": 6, "pears": 1}
    lowered = " ".join(texts).lower()
    assert "ducks lay" not in lowered
    assert "16 - 3 - 4" not in lowered
    assert "plums" not in lowered
    assert "987" not in lowered
    assert texts.count(SAME[0]) == 1
    for row in emitted:
        if row["source"] == "sums":
            assert row["messages"][1]["content"].endswith(row["provenance"]["answer"])
