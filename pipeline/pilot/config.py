"""A recipe of pilots, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from pipeline.recipe_file import name_files, read_recipe
from stages.base import Settings
from stages.engines.settings import ModelSettings
from stages.forecast.projection import error_amplification
from stages.forecast.settings import ForecastSettings
from stages.pilots.settings import (
    DesignSettings,
    ProxySettings,
    ProxyTrainingSettings,
    TransportSettings,
)
from stages.sources.settings import Source, Target


class PilotExecution(Settings):
    """The part that bears on no loss."""

    run: str = Field(description="Folder of the result: a path or an fsspec URL.")
    backend: Literal["local", "ray"] = Field(
        default="local", description="local: this machine; ray: one task a training."
    )
    workers: int = Field(
        default=1, ge=1, description="Processes that train at once; with backend local."
    )
    place_timeout_s: float = Field(
        default=120, gt=0, description="How long to wait for a cluster; with backend ray."
    )


class PilotConfig(BaseModel):
    """A whole recipe."""

    model_config = {"extra": "forbid", "frozen": True}

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    sources: list[Source] = Field(min_length=2, description="As in a recipe of a run.")
    targets: list[Target] = Field(min_length=1, description="As in a recipe of a run.")
    target_rows: int = Field(
        default=300,
        ge=2,
        description="Target rows that the loss is measured on, and that the transport goes to.",
    )
    models: dict[str, ModelSettings] = Field(default_factory=dict)
    design: DesignSettings
    proxy: ProxySettings = ProxySettings()
    training: ProxyTrainingSettings = ProxyTrainingSettings()
    transport: TransportSettings | None = None
    forecast: ForecastSettings = ForecastSettings()
    execution: PilotExecution

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        for kind, items in (("source", self.sources), ("target", self.targets)):
            names = [item.name for item in items]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two {kind}s are called {twice[0]}")
        if self.design.mixtures < len(self.sources):
            raise ValueError(
                f"design.mixtures: {self.design.mixtures} can't hold each of "
                f"{len(self.sources)} sources alone"
            )
        asked = {"proxy.model": self.proxy.model}
        if self.transport:
            asked["transport.encoder"] = self.transport.encoder
        for place, name in asked.items():
            if name is not None and name not in self.models:
                raise ValueError(
                    f"{place} names the model {name!r}, which `models` doesn't declare "
                    f"(declared: {', '.join(sorted(self.models)) or 'none'})"
                )
        if self.proxy.model and self.models[self.proxy.model].dtype != "float32":
            raise ValueError(f"models.{self.proxy.model}: training needs dtype: float32")
        names = [source.name for source in self.sources]
        for side in ("floors", "caps"):
            unknown = sorted(set(getattr(self.forecast, side)) - set(names))
            if unknown:
                raise ValueError(
                    f"forecast.{side} names the source {unknown[0]!r}; there are {', '.join(names)}"
                )
        return self

    @model_validator(mode="after")
    def _budget_within_reach(self) -> Self:
        small, large = self.design.scales
        grows = error_amplification(small, large, self.design.budget)
        if grows > self.design.max_amplification:
            raise ValueError(
                f"design.budget: projecting from {small} and {large} rows to {self.design.budget} "
                f"multiplies the error of the fits by {grows:.2f}, more than "
                f"max_amplification: {self.design.max_amplification:g}; lower the budget, move the "
                "scales up or further apart, or raise max_amplification"
            )
        return self

    @property
    def student(self) -> ModelSettings | None:
        """The model that pilots start from; None where they start from scratch."""
        return self.models[self.proxy.model] if self.proxy.model else None

    @property
    def portable_recipe(self) -> dict[str, Any]:
        """The recipe without `execution`, files called by their own names."""
        recipe = self.model_dump(mode="json", exclude={"execution"})
        name_files([*recipe["sources"], *recipe["targets"]])
        recipe["models"] = {name: model.portable() for name, model in self.models.items()}
        return recipe


def read_pilot(path: str, overrides: Sequence[str] = ()) -> PilotConfig:
    """A recipe as a checked config.

    Relative paths of sources, targets and models are taken from the recipe file's folder; the
    output folder from the working directory.

    Args:
        path: a YAML file, by path or fsspec URL.
        overrides: `a.b.c=value` texts; the value is read as YAML.

    Raises:
        ConfigError: the file is absent or no YAML, or a field is unknown, missing or out of range.
    """
    return read_recipe(PilotConfig, path, overrides)
