"""What a recipe may say about emission."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.base import Settings

Form = Literal["messages", "prompt_completion", "alpaca"]


class EmissionSettings(Settings):
    """The `emission` section of a recipe.

    Raises:
        ValueError: both budgets are given, or order and score don't go together.
    """

    budget_rows: int | None = Field(default=None, ge=1, description="Rows to emit.")
    budget_tokens: int | None = Field(
        default=None, ge=1, description="Tokens to emit, as selection counted them."
    )
    order: Literal["random", "best"] = Field(
        default="random", description="How a source fills its quota: a seeded sample, or by score."
    )
    score: str | None = Field(
        default=None, description="Column that `order: best` takes from the highest value down."
    )
    format: Form = Field(default="messages", description="The one form in which rows are written.")
    shard_bytes: int = Field(
        default=256_000_000, ge=1, description="Target size of a file, in uncompressed bytes."
    )
    validation: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Share of the prompts to hold out, by hash: all rows of one prompt are on one "
        "side, whatever else is emitted.",
    )
    provenance: bool = Field(
        default=True, description="Write scores, outcomes and the original text of rewritten rows."
    )

    @model_validator(mode="after")
    def _consistent(self) -> EmissionSettings:
        if self.budget_rows is not None and self.budget_tokens is not None:
            raise ValueError("give budget_rows or budget_tokens, not both")
        if (self.order == "best") != (self.score is not None):
            raise ValueError("`order: best` and `score: COLUMN` go together: give both or neither")
        return self

    @property
    def unit(self) -> Literal["rows", "tokens"]:
        """What quotas count."""
        return "tokens" if self.budget_tokens is not None else "rows"

    @property
    def budget(self) -> int | None:
        """The budget in its unit, or None: as much as the weights allow."""
        return self.budget_tokens if self.budget_tokens is not None else self.budget_rows
