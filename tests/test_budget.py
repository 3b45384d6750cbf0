"""Pass rates through a run: pilot, allocation, further rollouts, and what new rows change."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
import pytest
from engine_fakes import CountedEngines, FakeGenerator, unit

from pipeline.backend import LocalBackend
from pipeline.config import read_config
from pipeline.runner import Run
from stages.engines import Completion
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError


class Solver(FakeGenerator):
    """Squares the number in the question, right or wrong by the rollout's own seed."""

    def __init__(self, asked: Counter[str], tokenizer: Any) -> None:
        super().__init__(asked)
        self.tokenizer = tokenizer

    def generate(self, requests: Any, sampling: Any) -> list[Any]:
        self.asked["generator"] += len(requests)
        completions = []
        for prompt, seed in requests:
            match = re.search(r"number (\d+)\?", self.tokenizer.decode(prompt))
            assert match
            number = int(match[1])
            right = unit("solve", seed) < (number % 5) / 4
            text = f"The answer is {number * number + (not right)}."
            completions.append(Completion((5, 6), text, "stop", -1.0))
        return completions


@pytest.fixture
def solve(recipe: Any, student_tokenizer: Any) -> Any:
    recipe.value["sources"] = [
        {"name": name, "path": f"{name}.jsonl", "answer_pattern": r"is (\d+)\."}
        for name in ("apples", "pears")
    ]
    recipe.value["pass_rate"] = {"rollouts": 4, "max_new_tokens": 8, "check": "normalised"}
    recipe.value["allocation"] = {"total": 40, "gradient": "one", "cap": 6}
    recipe.value["rollouts"] = {}

    def run(**options: Any) -> Counter[str]:
        engines = CountedEngines()

        def make(kind: str, settings: ModelSettings) -> Any:
            if kind == "generator":
                return Solver(engines.asked, student_tokenizer)
            return engines(kind, settings)

        for stage in ("ingest", "difficulty", "pass_rate", "allocation", "rollouts"):
            config = read_config(recipe.save())
            Run(config, lambda _: None, backend=LocalBackend(make), **options).execute(stage)
            options = {}
        return engines.asked

    return run


def table(recipe: Any, stage: str) -> dict[str, dict[str, Any]]:
    files = sorted((recipe.run_folder / stage).glob("*.parquet"))
    return {row["id"]: row for file in files for row in pq.read_table(file).to_pylist()}


def test_budget_is_spent_as_allocated_and_again_when_rows_are_added(
    recipe: Any, solve: Any
) -> None:
    asked = solve()
    allocated = {i: row["rollouts"] for i, row in table(recipe, "allocation").items()}
    pilot, spent = table(recipe, "pass_rate"), table(recipe, "rollouts")
    assert sum(allocated.values()) == 40
    assert asked["generator"] == 4 * len(pilot) + 40
    for i, row in spent.items():
        assert row["budgeted_rollouts"] == 4 + allocated.get(i, 0)
        assert row["budgeted_verdicts"][:4] == pilot[i]["rollout_verdicts"]
        assert row["budgeted_correct"] == row["budgeted_verdicts"].count("correct")
        if not pilot[i]["correct"]:
            assert i not in allocated
    assert {row["pass_rate"] for row in pilot.values()} >= {0.0, 1.0}

    # New rows take part of the same budget: shares of old rows fall, and what is shown follows.
    recipe.write_rows("pears", 0, 19)
    asked = solve()
    allocated = {i: row["rollouts"] for i, row in table(recipe, "allocation").items()}
    assert sum(allocated.values()) == 40
    after = table(recipe, "rollouts")
    assert len(after) == len(spent) + 10
    for i, row in after.items():
        assert row["budgeted_rollouts"] == 4 + allocated.get(i, 0)
    # The pilot of old rows is kept, and rollouts drawn before come from the cache.
    assert asked["generator"] <= 4 * 10 + 40
    assert any(after[i]["budgeted_rollouts"] < row["budgeted_rollouts"] for i, row in spent.items())


def test_changed_answer_is_checked_again(recipe: Any, solve: Any) -> None:
    solve()
    before = table(recipe, "pass_rate")
    for source in recipe.value["sources"]:
        source["answer_pattern"] = r"The \w+ (\d+) is"
    solve(restart_from="ingest")
    after = table(recipe, "pass_rate")
    assert before.keys() == after.keys()
    # 0 and 1 are their own squares.
    changed = [i for i in after if after[i]["correct"] != before[i]["correct"]]
    assert len(changed) >= 8


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"allocation": {"total": 9}}, "allocation needs a pass_rate section"),
        ({"pass_rate": {}, "allocation": {"total": 9}}, "allocation and rollouts go together"),
        ({"pass_rate": {"checks": {"plums": "exact"}}}, "names the source 'plums'"),
        ({"pass_rate": {"model": "nobody"}}, "'nobody', which `models` doesn't declare"),
    ],
)
def test_sections_that_do_not_fit_are_refused(recipe: Any, sections: Any, message: str) -> None:
    recipe.value |= sections
    with pytest.raises(ConfigError, match=message):
        read_config(recipe.save())
