"""Settings of the dictionary stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import Settings

Part = Literal["response", "prompt", "both"]


class DictionarySettings(Settings):
    """The `dictionary` section of a recipe: a sparse autoencoder trained on the run's own rows."""

    student: str = Field(default="student", description="Name of the model that is read.")
    layer: int = Field(
        ge=0,
        description="Block whose output is read, from 0 (Hugging Face: hidden_states[layer+1]).",
    )
    expansion: int = Field(default=4, ge=1, description="Latents per activation dimension.")
    k: int = Field(default=32, ge=1, description="Active latents per token.")
    training: Literal["topk", "batchtopk"] = Field(
        default="batchtopk", description="batchtopk is saved as jumprelu, topk as topk."
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
