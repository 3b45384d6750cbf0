"""Settings of the embedding stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import RowSettings
from stages.dictionary.settings import Part


class EmbeddingSettings(RowSettings):
    """The `embedding` section of a recipe."""

    encoder: str = Field(default="encoder", description="Name of the sentence encoder in `models`.")
    part: Part | Literal["apart"] = Field(
        default="both",
        description="Text that is embedded: the prompt, the response, both as one text, or both "
        "apart, as two vectors end to end.",
    )
    prompt_weight: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="`part: apart`: the prompt's share of a squared distance or a cosine.",
    )
