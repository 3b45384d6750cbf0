"""Settings of the embedding stage."""

from __future__ import annotations

from pydantic import Field

from stages.base import RowSettings
from stages.dictionary.settings import Part


class EmbeddingSettings(RowSettings):
    """The `embedding` section of a recipe."""

    encoder: str = Field(default="encoder", description="Name of the sentence encoder in `models`.")
    part: Part = Field(
        default="both", description="Text that is embedded: the prompt, the response, or both."
    )
