"""Settings of pilots: which mixtures are tried, what is trained, and how."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from stages.base import Settings
from stages.dictionary.settings import Part
from stages.mixture.cost import Metric

Rows = Annotated[int, Field(ge=1)]


class DesignSettings(Settings):
    """Which mixtures are trained on, and on how many rows."""

    mixtures: int = Field(
        default=24, ge=3, description="Mixtures that forecasts are fitted to, at both scales."
    )
    held_out: int = Field(
        default=6, ge=1, description="Mixtures that forecasts are measured on, at both scales."
    )
    budget_mixtures: int = Field(
        default=0,
        ge=0,
        description="How many of the held-out mixtures are trained on the whole budget too, to "
        "measure the projection.",
    )
    scales: tuple[Rows, Rows] = Field(description="Rows of the smaller and of the larger pilots.")
    budget: Rows = Field(description="Rows that the loss is projected to.")
    max_amplification: float = Field(
        default=2.5,
        ge=1,
        description="A budget is refused where projecting to it multiplies the fits' errors more.",
    )

    @model_validator(mode="after")
    def _scales_rise(self) -> Self:
        small, large = self.scales
        if small >= large:
            raise ValueError(f"scales: {small} must be below {large}")
        if self.budget < large:
            raise ValueError(f"budget: {self.budget} is below the larger scale, {large}")
        if self.budget_mixtures > self.held_out:
            raise ValueError(
                f"budget_mixtures: {self.budget_mixtures} of held_out: {self.held_out} mixtures"
            )
        return self


class ProxySettings(Settings):
    """What is trained: a small Llama from scratch, or a model of the recipe."""

    model: str | None = Field(
        default=None,
        description="Name of the model in `models` that every pilot starts from; unset: a small "
        "Llama from scratch, with a tokenizer trained on the rows.",
    )
    vocabulary: int = Field(
        default=2048, ge=300, description="Tokens of the tokenizer that is trained (byte BPE)."
    )
    width: int = Field(default=64, ge=8, description="Width of the Llama.")
    layers: int = Field(default=2, ge=1, description="Its blocks.")
    heads: int = Field(default=4, ge=1, description="Its attention heads.")
    max_length: int = Field(
        default=256, ge=8, description="Longest row in tokens; what lies beyond is cut."
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width: {self.width} must be a multiple of 2 x heads ({self.heads})")
        scratch = {"vocabulary", "width", "layers", "heads", "max_length"} & self.model_fields_set
        if self.model is not None and scratch:
            raise ValueError(f"{sorted(scratch)[0]} has no meaning where proxy.model names a model")
        return self


class ProxyTrainingSettings(Settings):
    """How every pilot is trained: the same steps at one scale, whatever the mixture."""

    batch: int = Field(default=8, ge=1, description="Rows per step.")
    passes: int = Field(default=1, ge=1, description="How often a pilot sees its rows.")
    learning_rate: float = Field(default=2e-3, gt=0, description="Peak rate of AdamW.")
    weight_decay: float = Field(default=0.01, ge=0, description="Of AdamW, on matrices.")
    warmup_share: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps over which the rate rises."
    )
    seeds: int = Field(
        default=1,
        ge=1,
        description="Trainings of one mixture at one scale, from different starts; their losses "
        "are averaged.",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of one training.")


class TransportSettings(Settings):
    """The transport value that some forecasts use."""

    encoder: str = Field(default="encoder", description="Name of the sentence encoder in `models`.")
    part: Part = Field(
        default="both", description="Text that is embedded: the prompt, the response, or both."
    )
    metric: Metric = Field(default="euclidean", description="Cost between two vectors.")
    rows_per_source: int = Field(
        default=200, ge=2, description="Rows of each source in the transport: those of lowest hash."
    )
