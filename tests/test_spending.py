"""Budgets of a run: where it stops, what is kept, and that it then goes on to the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import read_config
from pipeline.verify import verified_files
from stages.errors import BudgetSpent, ConfigError

TOKENS_A_REPLY = 3
"""Of the fake generator."""


def spent(recipe: Any) -> dict[str, float]:
    found: dict[str, float] = json.loads((recipe.run_folder / "spent.json").read_text())
    return found


def tables(run: Path) -> dict[str, str]:
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in run.rglob("*.parquet")
    }


def shards(recipe: Any) -> int:
    return len(list((recipe.run_folder / "reflection").glob("part-*.parquet")))


def test_a_run_stops_at_its_tokens_and_goes_on_to_the_same_bytes(
    recipe: Any, execute: Any, tmp_path: Path
) -> None:
    whole = execute()
    asked = whole.asked["generator"]
    assert spent(recipe)["generated_tokens"] == TOKENS_A_REPLY * asked
    undisturbed = tables(recipe.run_folder)

    execution = recipe.value["execution"]
    execution |= {"run": str(tmp_path / "second"), "cache": str(tmp_path / "other")}
    execution |= {"shards_in_flight": 1, "budgets": {"max_generated_tokens": 1}}
    with pytest.raises(BudgetSpent, match=r"reflection: execution\.budgets\.max_generated_tokens"):
        execute()
    assert shards(recipe) == 1
    first = spent(recipe)["generated_tokens"]
    assert 0 < first < TOKENS_A_REPLY * asked
    # What the first execution spent counts in the next.
    with pytest.raises(BudgetSpent, match=f"{first:,} were generated"):
        execute()
    assert shards(recipe) == 1
    execution["budgets"] = {"max_generated_tokens": TOKENS_A_REPLY * asked + 1}
    again = execute()
    assert again.asked["generator"] * TOKENS_A_REPLY == TOKENS_A_REPLY * asked - first
    assert again.kinds("difficulty") == ["kept"]
    assert spent(recipe)["generated_tokens"] == TOKENS_A_REPLY * asked
    assert tables(recipe.run_folder) == undisturbed
    assert verified_files(str(recipe.run_folder))


def test_hours_of_earlier_executions_count(recipe: Any, execute: Any) -> None:
    execute("ingest")
    noted = {"seconds": 2 * 3600.0, "generated_tokens": 0, "cost": 0.0}
    (recipe.run_folder / "spent.json").write_text(json.dumps(noted))
    recipe.value["execution"]["budgets"] = {"max_hours": 1.5}
    with pytest.raises(BudgetSpent, match=r"difficulty: .*max_hours 1\.5: 2\.00 hours are spent"):
        execute()
    recipe.value["execution"]["budgets"] = {"max_hours": 3}
    execute()
    assert spent(recipe)["seconds"] > noted["seconds"]


def test_what_generates_nothing_goes_on_without_tokens(recipe: Any, execute: Any) -> None:
    del recipe.value["reflection"]
    execute("ingest")
    noted = {"seconds": 0.0, "generated_tokens": 100, "cost": 9.0}
    (recipe.run_folder / "spent.json").write_text(json.dumps(noted))
    recipe.value["execution"]["budgets"] = {"max_generated_tokens": 10, "max_cost": 1}
    assert execute().kinds("emission")[-1] == "done"


def test_a_cost_without_prices_is_refused(recipe: Any) -> None:
    recipe.value["execution"]["budgets"] = {"max_cost": 5}
    recipe.value["models"]["teacher"] = {
        "model": "m", "engine": "openai", "endpoint": {"base_url": "http://localhost:1/v1"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"models\.teacher\.endpoint\.price_in"):
        read_config(recipe.save())
