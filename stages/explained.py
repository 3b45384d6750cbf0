"""What is wrong with settings, in words."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explained(error: ValidationError, path: str, root: type[BaseModel]) -> str:
    """What is wrong with a recipe, in words; unknown keys answered with the nearest known one.

    Args:
        error: of the validation.
        path: the recipe file, or what else the values are of.
        root: what it was validated as.
    """
    lines = []
    for mistake in error.errors():
        place = ".".join(str(part) for part in mistake["loc"]) or "the recipe"
        if mistake["type"] == "extra_forbidden":
            known = _fields_at(root, mistake["loc"][:-1])
            near = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            lines.append(f"{place}: unknown key; {hint}")
        elif mistake["type"] == "missing":
            lines.append(f"{place}: missing; it has to be given")
        else:
            given = mistake["input"]
            shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
            lines.append(f"{place}: {mistake['msg'].removeprefix('Value error, ')}{shown}")
    return f"{path} can't be used: " + "; ".join(lines)


def _fields_at(root: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Field names of the model at a place of the recipe."""
    here: type[BaseModel] | None = root
    for part in location:
        field = here.model_fields.get(str(part)) if here else None
        # A number is a place in a list, a name in `models` a key: the model stays what it is.
        here = _model_in(field.annotation) if field else here
    return sorted(here.model_fields) if here else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _model_in(part)
        if found:
            return found
    return None
