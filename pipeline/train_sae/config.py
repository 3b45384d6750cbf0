"""A recipe that trains a sparse autoencoder, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from pipeline.recipe_file import name_files, read_recipe
from stages.base import Settings
from stages.dictionary.settings import Part
from stages.engines.settings import ModelSettings
from stages.sources.settings import Source


class AutoencoderSettings(Settings):
    """What is trained, and on what part of the student."""

    student: str = Field(default="student", description="Name of the model that is read.")
    layer: int = Field(
        ge=0,
        description="Block whose output is read, from 0 (Hugging Face: hidden_states[layer+1]).",
    )
    part: Part = Field(
        default="both", description="Tokens that count; template and special tokens never do."
    )
    expansion: int | None = Field(
        default=None, ge=1, description="Latents per activation dimension; or give latents."
    )
    latents: int | None = Field(default=None, ge=1, description="Latents; or give expansion.")
    k: int = Field(default=32, ge=1, description="Active latents per token.")
    training: Literal["topk", "batchtopk"] = Field(
        default="batchtopk", description="batchtopk is saved as jumprelu, topk as topk."
    )
    encoder_start: Literal["transpose", "fitted"] = Field(
        default="transpose",
        description="What the encoder starts as: the decoder's transpose, or that fitted in scale "
        "to the first batch, which reconstructs better and leaves more latents unused.",
    )

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.expansion is None) == (self.latents is None):
            raise ValueError("give one of expansion and latents")
        return self

    def latents_for(self, width: int) -> int:
        """How many latents there are over activations of a width."""
        return self.latents if self.latents is not None else width * (self.expansion or 1)


class TrainingSettings(Settings):
    """How it is trained."""

    tokens: int = Field(ge=1, description="Activations trained on, rounded down to whole batches.")
    passes: int = Field(
        default=1, ge=1, description="How often the rows may be read, each time in another order."
    )
    batch: int = Field(default=2048, ge=2, description="Tokens per step.")
    buffer: int = Field(
        default=65_536, ge=2, description="Tokens that are mixed with each other, held in memory."
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak rate; unset: 2e-4 / sqrt(latents / 2^14)."
    )
    warmup_share: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the steps over which the rate rises."
    )
    decay_share: float = Field(
        default=0.2, ge=0, le=1, description="Share of the steps over which it falls at the end."
    )
    dead_after_tokens: int | None = Field(
        default=None,
        ge=1,
        description="A latent silent for so long is revived by AuxK; unset: a twentieth of the "
        "tokens, at most 10 million.",
    )
    held_out_share: float = Field(
        default=0.01, gt=0, lt=1, description="Share of the rows that is never trained on."
    )
    evaluation_tokens: int = Field(
        default=20_000, ge=1, description="Tokens of held-out rows measured at the end."
    )

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.batch > self.tokens:
            raise ValueError(f"tokens: {self.tokens} is less than one batch of {self.batch}")
        if self.buffer > self.tokens:
            raise ValueError(
                f"buffer: {self.buffer} holds more than all {self.tokens} tokens; lower it, or "
                "raise tokens"
            )
        if self.buffer < 2 * self.batch:
            raise ValueError(
                f"buffer: {self.buffer} is filled again when half is gone, so that it needs room "
                f"for two batches of {self.batch}"
            )
        if int(self.warmup_share * self.steps) >= self.steps:
            raise ValueError("warmup_share leaves no step after the warm-up; lower it")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.batch


class TrainSaeExecution(Settings):
    """The part that bears on no weight."""

    run: str = Field(description="Folder of the result: a path or an fsspec URL.")
    checkpoint_every: int = Field(
        default=100, ge=1, description="Steps after which an interrupted training goes on."
    )


class TrainSaeConfig(BaseModel):
    """A whole recipe."""

    model_config = {"extra": "forbid", "frozen": True}

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    sources: list[Source] = Field(min_length=1, description="As in a recipe of a run.")
    models: dict[str, ModelSettings]
    autoencoder: AutoencoderSettings
    training: TrainingSettings
    execution: TrainSaeExecution

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]}")
        if self.autoencoder.student not in self.models:
            raise ValueError(
                f"autoencoder.student names the model {self.autoencoder.student!r}, which `models` "
                f"doesn't declare (declared: {', '.join(sorted(self.models)) or 'none'})"
            )
        if self.student.engine != "transformers":
            raise ValueError(
                f"autoencoder.student names the model {self.autoencoder.student!r} of engine "
                f"{self.student.engine}, which gives no activations: set its engine to transformers"
            )
        return self

    @property
    def student(self) -> ModelSettings:
        """The model that is read."""
        return self.models[self.autoencoder.student]

    @property
    def portable_recipe(self) -> dict[str, Any]:
        """The recipe without `execution`, files called by their own names."""
        recipe = self.model_dump(mode="json", exclude={"execution"})
        name_files(recipe["sources"])
        recipe["models"] = {name: model.portable() for name, model in self.models.items()}
        return recipe


def read_train_sae(path: str, overrides: Sequence[str] = ()) -> TrainSaeConfig:
    """A recipe as a checked config.

    Relative paths of sources and models are taken from the recipe file's folder; the output folder
    from the working directory.

    Args:
        path: a YAML file, by path or fsspec URL.
        overrides: `a.b.c=value` texts; the value is read as YAML.

    Raises:
        ConfigError: the file is absent or no YAML, or a field is unknown, missing or out of range.
    """
    return read_recipe(TrainSaeConfig, path, overrides)
