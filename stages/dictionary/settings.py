"""Settings of the dictionary stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from stages.base import Settings

Part = Literal["response", "prompt", "both"]
FormatName = Literal[
    "saelens", "sparsify", "gemma_scope", "gemma_scope_2", "llama_scope", "openai_gpt2"
]

TRAINING_FIELDS = (
    "expansion",
    "k",
    "training",
    "encoder_start",
    "steps",
    "batch",
    "learning_rate",
    "warmup_share",
    "rows",
    "tokens",
    "refit",
)
"""Settings without a meaning where an autoencoder is brought instead of trained."""
BROUGHT_FIELDS = ("format", "activation_scale")
"""Settings without a meaning where one is trained."""


class DictionarySettings(Settings):
    """The `dictionary` section: an autoencoder trained on the run's own rows, or brought along."""

    student: str = Field(default="student", description="Name of the model that is read.")
    layer: int = Field(
        ge=0,
        description="Block whose output is read, from 0 (Hugging Face: hidden_states[layer+1]).",
    )
    path: str | None = Field(
        default=None,
        description="Folder of a published autoencoder, a path or fsspec URL; unset: one is "
        "trained.",
    )
    format: Literal["auto"] | FormatName = Field(
        default="auto", description="Whose files they are; auto: told by their names."
    )
    activation_scale: float | None = Field(
        default=None,
        gt=0,
        description="What activations were multiplied by when it was trained, for SAELens files "
        "with normalize_activations: expected_average_only_in, which leave it out.",
    )
    expansion: int = Field(default=4, ge=1, description="Latents per activation dimension.")
    k: int = Field(default=32, ge=1, description="Active latents per token.")
    training: Literal["topk", "batchtopk"] = Field(
        default="batchtopk", description="batchtopk is saved as jumprelu, topk as topk."
    )
    encoder_start: Literal["transpose", "fitted"] = Field(
        default="transpose",
        description="What the encoder starts as: the decoder's transpose, or that fitted in scale "
        "to the first batch, which reconstructs better and leaves more latents unused.",
    )
    steps: int = Field(default=400, ge=1, description="Optimiser steps.")
    batch: int = Field(default=1024, ge=1, description="Tokens per step.")
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak rate; unset: 2e-4 / sqrt(latents / 2^14)."
    )
    warmup_share: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps over which the rate rises."
    )
    rows: int = Field(
        default=2000, ge=1, description="Rows read for training: those of lowest hash(id, seed)."
    )
    tokens: int = Field(
        default=200_000, ge=1, description="Activations kept for training, drawn from those rows."
    )
    part: Part = Field(
        default="both", description="Tokens that count; template and special tokens never do."
    )
    refit: bool = Field(
        default=False,
        description="Train again when rows were added. Off: a dictionary is a measuring instrument "
        "and stays what it was, so that old and new rows are measured alike.",
    )

    @model_validator(mode="after")
    def _trained_or_brought(self) -> Self:
        brought = self.path is not None
        idle = [
            name
            for name in (TRAINING_FIELDS if brought else BROUGHT_FIELDS)
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if idle and brought:
            raise ValueError(
                f"path brings an autoencoder, so nothing is trained: leave out {', '.join(idle)}"
            )
        if idle:
            raise ValueError(f"{', '.join(idle)} goes with path, which isn't given")
        return self
