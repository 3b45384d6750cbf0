"""Settings of the reasoning stage."""

from __future__ import annotations

from pydantic import Field

from stages.base import RowSettings


class ReasoningSettings(RowSettings):
    """The `reasoning` section of a recipe."""

    judge: str = Field(default="judge", description="Entry of `models` that judges steps.")
    min_characters: int = Field(
        default=1000,
        ge=1,
        description="A shorter chain of thought gets its length and isn't judged.",
    )
    min_steps: int = Field(
        default=3, ge=1, description="One of fewer steps gets its length and isn't judged."
    )
    min_step_characters: int = Field(
        default=40, ge=1, description="Shorter pieces are joined with what is beside them."
    )
    window_steps: int = Field(
        default=32,
        ge=1,
        description="Most steps that one request shows in full and asks about; a longer chain of "
        "thought takes several.",
    )
    opening_characters: int = Field(
        default=80,
        ge=1,
        description="How much a request shows of each step that it doesn't ask about.",
    )
    max_new_tokens: int = Field(
        default=1024, ge=1, description="Longest reply to one request; one that reaches it fails."
    )
    temperature: float = Field(default=0.0, ge=0, description="Of the judge; 0 is greedy.")
