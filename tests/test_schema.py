"""The published schema: current, true of every shipped recipe, and as strict as the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config import read_config
from pipeline.schema import schema_text
from stages.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "docs" / "recipe.schema.json"
HINT = "# yaml-language-server: $schema="
RECIPES = [
    path
    for path in sorted([*(ROOT / "configs").glob("*.yaml"), ROOT / "tests/recipes/tiny.yaml"])
    if not path.stem.startswith(("pilot", "synthesis", "train-sae"))
]


def check(value: Any) -> None:
    jsonschema.validate(value, json.loads(PUBLISHED.read_text()))


def test_the_published_schema_is_current() -> None:
    assert PUBLISHED.read_text() == schema_text(), "run: tamis schema > docs/recipe.schema.json"
    jsonschema.Draft202012Validator.check_schema(json.loads(PUBLISHED.read_text()))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_meet_it(recipe: Path) -> None:
    check(yaml.safe_load(recipe.read_text()))


@pytest.mark.parametrize(
    "recipe",
    [path for path in RECIPES if path.parent.name == "configs"],
    ids=lambda path: path.stem,
)
def test_shipped_recipes_name_it_for_editors(recipe: Path) -> None:
    first = recipe.read_text().splitlines()[0]
    assert first.startswith(HINT)
    assert (recipe.parent / first.removeprefix(HINT)).resolve() == PUBLISHED


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("selection", "shares"), 1),
        (("selection", "share"), 1.5),
        (("emission", "budget_rows"), "many"),
        (("models", "student", "dtype"), "float8"),
        (("sources", 0, "role"), "spare"),
        (("execution", "backend"), "slurm"),
        (("seed",), -1),
    ],
)
def test_it_refuses_what_the_config_refuses(
    recipe: Any, place: tuple[str | int, ...], value: Any
) -> None:
    check(recipe.value)
    *path, last = place
    here = recipe.value
    for key in path:
        here = here[key]
    here[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check(recipe.value)
    with pytest.raises(ConfigError):
        read_config(recipe.save())


def test_it_asks_for_what_has_no_default(recipe: Any) -> None:
    for section in ("name", "sources", "execution"):
        lacking = {key: value for key, value in recipe.value.items() if key != section}
        with pytest.raises(jsonschema.ValidationError, match=section):
            check(lacking)
