"""A recipe file, read and checked.

A config has two parts: the *recipe* determines the bytes produced; `execution` says where and how
(backend, GPUs, replicas, paths) and bears on no byte. Everything that can be wrong is found here or
in `pipeline.checks`, before a model loads.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from stages.allocation.settings import AllocationSettings, RolloutsSettings
from stages.base import Settings
from stages.dictionary.settings import DictionarySettings
from stages.difficulty.settings import DifficultySettings
from stages.embedding.settings import EmbeddingSettings
from stages.emission.settings import EmissionSettings
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError
from stages.features.settings import FeaturesSettings
from stages.ingest.settings import IngestSettings
from stages.mixture.settings import MixtureSettings
from stages.pass_rate.settings import PassRateSettings
from stages.reasoning.settings import ReasoningSettings
from stages.reflection.settings import ReflectionSettings
from stages.selection.settings import SelectionSettings
from stages.sources.settings import Source, Target
from stages.storage import Store, read_file
from stages.thinking.settings import ThinkingSettings


class Placement(Settings):
    """Where one engine runs."""

    replicas: int = Field(default=1, ge=1, description="Copies of the model, each its own process.")
    gpus: float = Field(default=0, ge=0, description="GPUs of one replica.")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that share one vLLM model.")
    cpus: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Cores reserved for one replica. Unset on a CPU: engines take the cores in turn."
        ),
    )

    @model_validator(mode="after")
    def _gpus_suffice(self) -> Self:
        if self.tensor_parallel > 1 and self.gpus < self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel: {self.tensor_parallel} needs gpus: {self.tensor_parallel}"
            )
        return self


class Execution(Settings):
    """The part of a config that bears on no byte of the result."""

    backend: Literal["local", "ray"] = Field(
        default="ray", description="local: this process; ray: engine pools as Ray actors."
    )
    run: str = Field(description="Run directory: a path or an fsspec URL.")
    cache: str = Field(
        default="~/.cache/tamis/generations", description="Where generations are kept between runs."
    )
    engines: dict[str, Placement] = Field(
        default_factory=dict, description="Placement of the recipe's models, by name."
    )
    shards_in_flight: int = Field(default=4, ge=1, description="Shards processed at once.")
    place_timeout_s: float = Field(
        default=120, gt=0, description="How long to wait for a cluster to place an engine."
    )


class Recipe(BaseModel):
    """What determines the bytes of a run."""

    model_config = {"extra": "forbid", "frozen": True}

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    sources: list[Source] = Field(min_length=1)
    targets: list[Target] = Field(default_factory=list)
    models: dict[str, ModelSettings] = Field(default_factory=dict)
    max_failed_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of a stage's rows that may fail before it stops.",
    )
    ingest: IngestSettings = IngestSettings()
    difficulty: DifficultySettings | None = None
    thinking: ThinkingSettings | None = None
    pass_rate: PassRateSettings | None = None
    allocation: AllocationSettings | None = None
    rollouts: RolloutsSettings | None = None
    reasoning: ReasoningSettings | None = None
    reflection: ReflectionSettings | None = None
    dictionary: DictionarySettings | None = None
    features: FeaturesSettings | None = None
    embedding: EmbeddingSettings | None = None
    selection: SelectionSettings = SelectionSettings()
    mixture: MixtureSettings | None = None
    emission: EmissionSettings = EmissionSettings()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        for kind, items in (("source", self.sources), ("target", self.targets)):
            names = [item.name for item in items]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two {kind}s are called {twice[0]}")
        if all(source.role == "anchor" for source in self.sources):
            raise ValueError("every source is an anchor, so nothing could be emitted")
        if self.features and not self.dictionary:
            raise ValueError("features needs a dictionary section")
        if self.pass_rate:
            unknown = sorted(set(self.pass_rate.checks) - {source.name for source in self.sources})
            if unknown:
                raise ValueError(
                    f"pass_rate.checks names the source {unknown[0]!r}; there are "
                    f"{', '.join(sorted(source.name for source in self.sources))}"
                )
        if self.allocation and not self.pass_rate:
            raise ValueError("allocation needs a pass_rate section: the pilot that it learns from")
        if bool(self.rollouts) != bool(self.allocation):
            raise ValueError(
                "allocation and rollouts go together: one shares the budget, the other spends it"
            )
        if self.mixture and not self.embedding:
            raise ValueError("mixture needs an embedding section")
        for section in ("dictionary", "features", "mixture"):
            if getattr(self, section) and not self.targets:
                raise ValueError(f"{section} needs targets: name at least one")
        for section, role in _MODEL_ROLES:
            settings = getattr(self, section)
            if settings and getattr(settings, role) not in self.models:
                known = ", ".join(sorted(self.models)) or "none"
                raise ValueError(
                    f"{section}.{role} names the model {getattr(settings, role)!r}, which `models` "
                    f"doesn't declare (declared: {known})"
                )
        return self


_MODEL_ROLES = (
    ("difficulty", "student"),
    ("thinking", "model"),
    ("pass_rate", "model"),
    ("reasoning", "judge"),
    ("reflection", "teacher"),
    ("reflection", "student"),
    ("dictionary", "student"),
    ("features", "student"),
    ("embedding", "encoder"),
)


class Config(Recipe):
    """A whole recipe file: the recipe, and how to execute it."""

    execution: Execution

    @model_validator(mode="after")
    def _placed_engines_exist(self) -> Self:
        unknown = sorted(set(self.execution.engines) - set(self.models))
        if unknown:
            raise ValueError(
                f"execution.engines places {unknown[0]!r}, which `models` doesn't declare "
                f"(declared: {', '.join(sorted(self.models)) or 'none'})"
            )
        return self

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe alone, resolved, as plain values in canonical order."""
        return self.model_dump(mode="json", exclude={"execution"})

    @property
    def portable_recipe(self) -> dict[str, Any]:
        """The recipe with files called by their own names: the same wherever a project lies."""
        recipe = self.recipe
        for item in [*recipe["sources"], *recipe["targets"]]:
            paths = [item["path"]] if isinstance(item["path"], str) else item["path"]
            names = [
                path if "://" in path else os.path.basename(path.rstrip("/")) for path in paths
            ]
            item["path"] = names[0] if isinstance(item["path"], str) else names
        for model in recipe["models"].values():
            if os.path.isabs(model["model"]) or model["model"].startswith("."):
                model["model"] = os.path.basename(model["model"].rstrip("/"))
        return recipe


def read_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """A recipe file as a checked config.

    Relative paths of sources, targets and models are taken from the recipe file's folder; the run
    and the cache from the working directory.

    Args:
        path: a YAML file, by path or fsspec URL.
        overrides: `a.b.c=value` texts; the value is read as YAML.

    Raises:
        ConfigError: the file is absent or no YAML, or a field is unknown, missing or out of range.
    """
    raw = _yaml(path)
    for text in overrides:
        _override(raw, text)
    folder = path.rpartition("/")[0] if "://" in path else os.path.dirname(path)
    _resolve_paths(raw, folder)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explained(error, path)) from error


def _yaml(path: str) -> dict[str, Any]:
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


def _resolve_paths(raw: dict[str, Any], folder: str) -> None:
    """Environment variables, and the recipe's folder, in the fields that are paths."""
    for section in ("sources", "targets"):
        for item in raw.get(section) or []:
            if isinstance(item, dict) and isinstance(item.get("path"), str):
                item["path"] = _located(_expanded(item["path"]), folder)
            elif isinstance(item, dict) and isinstance(item.get("path"), list):
                item["path"] = [_located(_expanded(str(one)), folder) for one in item["path"]]
    models = raw.get("models")
    for model in models.values() if isinstance(models, dict) else ():
        if isinstance(model, dict) and isinstance(model.get("model"), str):
            reference = _expanded(model["model"])
            local = reference.startswith((".", "~")) or reference.endswith(".gguf")
            model["model"] = _located(reference, folder) if local else reference
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


def _explained(error: ValidationError, path: str) -> str:
    """One line a mistake, unknown keys answered with the nearest known one."""
    lines = []
    for mistake in error.errors():
        place = ".".join(str(part) for part in mistake["loc"]) or "the recipe"
        if mistake["type"] == "extra_forbidden":
            known = _fields_at(mistake["loc"][:-1])
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


def _fields_at(location: Sequence[int | str]) -> list[str]:
    """Field names of the model at a place of the config."""
    here: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        if isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get(str(part))
            here = field.annotation if field else None
        here = _model_in(here)
    return sorted(here.model_fields) if here else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _model_in(part)
        if found:
            return found
    return None


def changed_fields(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two plain values differ: `place: old → new`, one text a field."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{place}.{key}" if place else str(key)
            found += changed_fields(old.get(key), new.get(key), inner)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            text
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for text in changed_fields(a, b, f"{place}.{i}")
        ]
    return [] if old == new else [f"{place}: {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def recipe_yaml(config: Config) -> str:
    """The recipe as run, every default filled in."""
    return str(yaml.safe_dump(config.recipe, sort_keys=False, allow_unicode=True))


def run_store(config: Config) -> Store:
    """The run directory's store."""
    return Store(config.execution.run)
