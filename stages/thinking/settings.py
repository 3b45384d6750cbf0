"""Settings of the thinking stage."""

from __future__ import annotations

from pydantic import Field

from stages.base import RowSettings


class ThinkingSettings(RowSettings):
    """The `thinking` section of a recipe."""

    model: str = Field(
        description="Entry of `models` that chooses whether to think (AdaptThink and its like)."
    )
    nothinking: str = Field(
        default="</think>",
        min_length=1,
        description="The token that ends thinking before it began; one id of the tokenizer.",
    )
    opening: str = Field(
        default="<think>\n",
        description="What the prompt ends with, so that thinking is open; added where the model's "
        "own chat template doesn't end with it.",
    )
