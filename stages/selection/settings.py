"""Settings of the selection stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.base import Settings


class Filter(Settings):
    """A rule that a row must meet, and the name of the reason where it doesn't."""

    rule: str = Field(description='Over columns, such as "ifd_effective < 1".')
    reason: str | None = Field(default=None, description="Name of the reason; unset: the rule.")


class SelectionSettings(Settings):
    """The `selection` section of a recipe: filters, then the best by one score."""

    filters: list[Filter] = Field(default_factory=list, description="All must be met.")
    score: str | None = Field(
        default=None, description="Column to rank by; unset: every row that passes is kept."
    )
    order: Literal["highest", "lowest"] = Field(default="highest", description="Which scores win.")
    share: float | None = Field(
        default=None, gt=0, le=1, description="Share of the passing rows to keep."
    )
    rows: int | None = Field(default=None, ge=1, description="Number of rows to keep.")
    per_source: bool = Field(
        default=False, description="Rank and cut within each source instead of over all."
    )
    missing: Literal["drop", "keep_last"] = Field(
        default="drop", description="What a null score means: dropped, or ranked behind all others."
    )
    duplicates: bool = Field(
        default=True, description="Drop rows whose effective text equals an earlier kept row's."
    )
    semantic_duplicates: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Drop rows whose embedding has at least this cosine with an earlier kept row's "
        "or an anchor's; needs an embedding section.",
    )

    @model_validator(mode="after")
    def _one_size(self) -> SelectionSettings:
        if self.share is not None and self.rows is not None:
            raise ValueError("give share or rows, not both")
        if self.score is None and (self.share is not None or self.rows is not None):
            raise ValueError("share and rows need a score to rank by")
        if self.score is not None and self.share is None and self.rows is None:
            raise ValueError(f"score {self.score} needs share or rows: how much to keep")
        return self
