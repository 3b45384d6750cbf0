"""The JSON schema of a recipe file, which editors check and complete recipes by."""

from __future__ import annotations

import json
from typing import Any

from pipeline.config import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a whole recipe file, in the dialect of 2020-12.

    It holds what one field says by itself: names, types, ranges and choices. What fields must agree
    on is checked by `tamis plan`.
    """
    return {"$schema": DIALECT, **Config.model_json_schema(), "title": "tamis recipe"}


def schema_text() -> str:
    """The schema as the text of `docs/recipe.schema.json`."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
