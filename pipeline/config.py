"""A recipe file, read and checked.

A config has two parts: the *recipe* determines the bytes produced; `execution` says where and how
(backend, GPUs, replicas, paths) and bears on no byte. Everything that can be wrong is found here or
in `pipeline.checks`, before a model loads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, JsonValue, model_validator

from pipeline.budget import Budgets
from pipeline.recipe_file import read_recipe
from stages.allocation.settings import AllocationSettings, RolloutsSettings
from stages.base import Settings
from stages.baselines.settings import BaselinesSettings
from stages.concepts.settings import ConceptsSettings
from stages.dictionary.settings import DictionarySettings
from stages.difficulty.settings import DifficultySettings
from stages.embedding.settings import EmbeddingSettings
from stages.emission.settings import EmissionSettings
from stages.engines.local import CALLS_IN_FLIGHT
from stages.engines.settings import ModelSettings
from stages.explanation.settings import ExplanationSettings
from stages.features.settings import FeaturesSettings
from stages.ingest.settings import ContaminationSettings, IngestSettings
from stages.licenses import WRITERS, LicensePolicy
from stages.mixture.settings import MixtureSettings
from stages.pass_rate.settings import PassRateSettings
from stages.prefixes.settings import PrefixesSettings
from stages.reasoning.settings import ReasoningSettings
from stages.reflection.settings import ReflectionSettings
from stages.selection.settings import SelectionSettings
from stages.sources.settings import Source, Target
from stages.storage import Store
from stages.thinking.settings import ThinkingSettings
from stages.valuation.settings import ValuationSettings

StageName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


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
    chunks_in_flight: int = Field(
        default=CALLS_IN_FLIGHT,
        ge=1,
        description="Chunks of `generation_chunk` prompts that one vLLM replica generates at once, "
        "over all shards; those are asked again after a kill. Other engines take one at a time.",
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
    budgets: Budgets = Field(
        default=Budgets(), description="What the run may spend before it stops."
    )
    place_timeout_s: float = Field(
        default=120, gt=0, description="How long to wait for a cluster to place an engine."
    )
    pass_gpus: float = Field(
        default=0,
        ge=0,
        le=1,
        description="GPUs of each task of the mixture's pass over all rows; 0: processor cores.",
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
    license_policy: LicensePolicy | None = Field(
        default=None, description="Which licences rows may have; others are never emitted."
    )
    ingest: IngestSettings = IngestSettings()
    contamination: ContaminationSettings = ContaminationSettings()
    difficulty: DifficultySettings | None = None
    thinking: ThinkingSettings | None = None
    pass_rate: PassRateSettings | None = None
    allocation: AllocationSettings | None = None
    rollouts: RolloutsSettings | None = None
    reasoning: ReasoningSettings | None = None
    reflection: ReflectionSettings | None = None
    prefixes: PrefixesSettings | None = None
    dictionary: DictionarySettings | None = None
    features: FeaturesSettings | None = None
    concepts: ConceptsSettings | None = None
    embedding: EmbeddingSettings | None = None
    baselines: BaselinesSettings | None = None
    valuation: ValuationSettings | None = None
    stages: dict[StageName, dict[str, JsonValue]] = Field(
        default_factory=dict,
        # Recipes without any keep the bytes that they had before there were any.
        exclude_if=lambda value: not value,
        description="Row stages of other packages, by name; each with its own settings.",
    )
    selection: SelectionSettings = SelectionSettings()
    explanation: ExplanationSettings | None = None
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
        near = self.ingest.near_duplicates
        unknown = sorted(
            set(near.prefer if near else ()) - {source.name for source in self.sources}
        )
        if unknown:
            raise ValueError(f"ingest.near_duplicates.prefer names {unknown[0]!r}, no source")
        if self.features and not self.dictionary:
            raise ValueError("features needs a dictionary section")
        if self.concepts and not self.dictionary:
            raise ValueError("concepts needs a dictionary section: concepts are its latents")
        if self.explanation and not self.features:
            raise ValueError("explanation needs a features section: it explains similarities")
        for section in ("pass_rate", "reflection"):
            settings = getattr(self, section)
            named = set(settings.checks) if settings else set()
            unknown = sorted(named - {source.name for source in self.sources})
            if unknown:
                raise ValueError(
                    f"{section}.checks names the source {unknown[0]!r}; there are "
                    f"{', '.join(sorted(source.name for source in self.sources))}"
                )
        if self.allocation and not self.pass_rate:
            raise ValueError("allocation needs a pass_rate section: the pilot that it learns from")
        if bool(self.rollouts) != bool(self.allocation):
            raise ValueError(
                "allocation and rollouts go together: one shares the budget, the other spends it"
            )
        for section in ("mixture", "valuation"):
            if getattr(self, section) and not self.embedding:
                raise ValueError(f"{section} needs an embedding section")
        for section in ("dictionary", "features", "mixture", "valuation"):
            if getattr(self, section) and not self.targets:
                raise ValueError(f"{section} needs targets: name at least one")
        if self.baselines and self.baselines.to_targets and not self.targets:
            raise ValueError(
                f"baselines.scores: {self.baselines.to_targets[0]} compares rows with the targets: "
                "name at least one"
            )
        for section, role in _MODEL_ROLES:
            settings = getattr(self, section)
            if settings and getattr(settings, role) not in self.models:
                known = ", ".join(sorted(self.models)) or "none"
                raise ValueError(
                    f"{section}.{role} names the model {getattr(settings, role)!r}, which `models` "
                    f"doesn't declare (declared: {known})"
                )
        return self

    @model_validator(mode="after")
    def _writers_may_write(self) -> Self:
        """Text that a model writes may be published under its terms."""
        for section, role in WRITERS:
            settings = getattr(self, section)
            if settings is None or self.license_policy is None:
                continue
            name = getattr(settings, role)
            model = self.models.get(name)
            if model is not None and not self.license_policy.allows_terms(model.terms):
                said = f"the terms {model.terms!r}" if model.terms else "no terms"
                raise ValueError(
                    f"{section}.{role} writes text into the data set, and models.{name} states "
                    f"{said}, which license_policy doesn't allow; state models.{name}.terms "
                    "(`unrestricted` where its maker claims nothing), allow them, or name another "
                    "model"
                )
        return self


_MODEL_ROLES = (
    ("difficulty", "student"),
    ("thinking", "model"),
    ("pass_rate", "model"),
    ("reasoning", "judge"),
    ("reflection", "teacher"),
    ("reflection", "student"),
    ("prefixes", "model"),
    ("dictionary", "student"),
    ("features", "student"),
    ("concepts", "student"),
    ("embedding", "encoder"),
)


class Config(Recipe):
    """A whole recipe file: the recipe, and how to execute it."""

    execution: Execution

    @model_validator(mode="after")
    def _costs_are_known(self) -> Self:
        if self.execution.budgets.max_cost is None:
            return self
        for name, model in self.models.items():
            if model.endpoint is not None and model.endpoint.cost(0, 0) is None:
                raise ValueError(
                    f"execution.budgets.max_cost needs models.{name}.endpoint.price_in and "
                    "price_out, which say what its tokens cost"
                )
        return self

    @model_validator(mode="after")
    def _placed_engines_exist(self) -> Self:
        unknown = sorted(set(self.execution.engines) - set(self.models))
        if unknown:
            raise ValueError(
                f"execution.engines places {unknown[0]!r}, which `models` doesn't declare "
                f"(declared: {', '.join(sorted(self.models)) or 'none'})"
            )
        for name in self.execution.engines:
            if self.models[name].endpoint is not None:
                raise ValueError(f"execution.engines places {name!r}, which is behind an endpoint")
        return self

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe alone, resolved, as plain values in canonical order."""
        return self.model_dump(mode="json", exclude={"execution"})

    @property
    def blocked_sources(self) -> list[str]:
        """Sources that state a licence whose rows may not be emitted, or none where that blocks."""
        policy = self.license_policy
        return [one.name for one in self.sources if policy and not policy.allows(one.license)]

    @property
    def portable_recipe(self) -> dict[str, Any]:
        """The recipe with files called by their own names: the same wherever a project lies."""
        recipe = self.recipe
        for item in [*recipe["sources"], *recipe["targets"], *recipe["contamination"]["sets"]]:
            paths = [item["path"]] if isinstance(item["path"], str) else item["path"]
            names = [
                path if "://" in path else os.path.basename(path.rstrip("/")) for path in paths
            ]
            item["path"] = names[0] if isinstance(item["path"], str) else names
        recipe["models"] = {name: model.portable() for name, model in self.models.items()}
        if self.reflection and self.reflection.prompts:
            recipe["reflection"]["prompts"] = os.path.basename(self.reflection.prompts)
        if self.selection.overrides:
            recipe["selection"]["overrides"] = os.path.basename(self.selection.overrides)
        brought = recipe["dictionary"]
        if brought and brought["path"] and "://" not in brought["path"]:
            brought["path"] = os.path.basename(brought["path"].rstrip("/"))
        return recipe


def read_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """A recipe file as a checked config.

    Relative paths of sources, targets, models and a dictionary are taken from the recipe file's
    folder; the run and the cache from the working directory.

    Args:
        path: a YAML file, by path or fsspec URL.
        overrides: `a.b.c=value` texts; the value is read as YAML.

    Raises:
        ConfigError: the file is absent or no YAML, or a field is unknown, missing or out of range.
    """
    return read_recipe(Config, path, overrides)


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
