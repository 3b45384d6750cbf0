"""Recipe files: YAML, overrides, paths, and what is wrong with them in words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from stages.errors import ConfigError
from stages.explained import explained
from stages.storage import read_file

_FILES = (("reflection", "prompts"), ("selection", "overrides"), ("dictionary", "path"))
"""Fields of sections that name a file, taken from the recipe's folder."""

RecipeT = TypeVar("RecipeT", bound=BaseModel)


def read_recipe(
    kind: type[RecipeT], path: str, overrides: Sequence[str] = (), *, within: Sequence[str] = ()
) -> RecipeT:
    """A recipe file as a checked config.

    Relative paths of what the recipe reads are taken from its own folder; those of what it writes
    from the working directory.

    Args:
        kind: what the recipe has to be.
        path: a YAML file, by path or fsspec URL.
        overrides: `a.b.c=value` texts; the value is read as YAML.
        within: sections that have sources or targets of their own.

    Raises:
        ConfigError: the file is absent or no YAML, or a field is unknown, missing or out of range.
    """
    raw = raw_values(path, overrides)
    for part in (raw, *(raw.get(name) for name in within)):
        if isinstance(part, dict):
            resolve_paths(part, path)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explained(error, path, kind)) from error


def raw_values(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping that a YAML file holds, with overrides.

    Args:
        path: by path or fsspec URL.
        overrides: `a.b.c=value` texts; the value is read as YAML.

    Raises:
        ConfigError: the file is absent, can't be read, or holds no mapping.
    """
    try:
        raw = yaml.safe_load(read_file(path))
    except FileNotFoundError as error:
        raise ConfigError(f"no recipe at {path}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no recipe (a mapping of sections)")
    for text in overrides:
        _override(raw, text)
    return raw


def _override(raw: dict[str, Any], text: str) -> None:
    place, equals, value = text.partition("=")
    if not equals or not place:
        raise ConfigError(f"--set {text!r} isn't of the form a.b.c=value")
    *path, last = place.split(".")
    here: Any = raw
    for key in path:
        if isinstance(here, list) and key.isdigit() and int(key) < len(here):
            here = here[int(key)]
        elif isinstance(here, dict):
            if here.get(key) is None:
                here[key] = {}
            here = here[key]
        else:
            raise ConfigError(f"--set {place}: there is no {key!r} to set a field of")
    parsed = yaml.safe_load(value)
    if isinstance(here, list) and last.isdigit() and int(last) < len(here):
        here[int(last)] = parsed
    elif isinstance(here, dict):
        here[last] = parsed
    else:
        raise ConfigError(f"--set {place}: there is no {last!r} to set")


def resolve_paths(raw: dict[str, Any], path: str) -> None:
    """Put environment variables, and the recipe file's folder, into paths and addresses."""
    folder = path.rpartition("/")[0] if "://" in path else os.path.dirname(path)
    contamination = raw.get("contamination")
    sets = contamination.get("sets") if isinstance(contamination, dict) else None
    for items in (raw.get("sources"), raw.get("targets"), sets):
        for item in items or []:
            if isinstance(item, dict) and isinstance(item.get("path"), str):
                item["path"] = _located(_expanded(item["path"]), folder)
            elif isinstance(item, dict) and isinstance(item.get("path"), list):
                item["path"] = [_located(_expanded(str(one)), folder) for one in item["path"]]
    models = raw.get("models")
    for model in models.values() if isinstance(models, dict) else ():
        if isinstance(model, dict) and isinstance(endpoint := model.get("endpoint"), dict):
            if isinstance(endpoint.get("base_url"), str):
                endpoint["base_url"] = _expanded(endpoint["base_url"])
        elif isinstance(model, dict) and isinstance(model.get("model"), str):
            reference = _expanded(model["model"])
            local = reference.startswith((".", "~")) or reference.endswith(".gguf")
            model["model"] = _located(reference, folder) if local else reference
    for name, field in _FILES:
        section = raw.get(name)
        if isinstance(section, dict) and isinstance(section.get(field), str):
            section[field] = _located(_expanded(section[field]), folder)
    execution = raw.get("execution")
    for key in ("run", "cache"):
        if isinstance(execution, dict) and isinstance(execution.get(key), str):
            execution[key] = os.path.expanduser(_expanded(execution[key]))


def _expanded(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(f"{text}: the environment variable {name} isn't set")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _located(path: str, folder: str) -> str:
    if "://" in path or os.path.isabs(path) or not folder:
        return path
    path = os.path.expanduser(path)
    return path if os.path.isabs(path) else os.path.normpath(os.path.join(folder, path))


def own_name(path: str) -> str:
    """What a path is called wherever a project lies; a URL's name is the whole of it."""
    return path if "://" in path else os.path.basename(path.rstrip("/"))


def name_files(items: Iterable[dict[str, Any]]) -> None:
    """Call the files of sources and targets by their own names, wherever they lie."""
    for item in items:
        paths = [item["path"]] if isinstance(item["path"], str) else item["path"]
        item["path"] = [own_name(path) for path in paths]
