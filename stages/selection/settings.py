"""Settings of the selection stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.base import Settings


class Filter(Settings):
    """A rule that a row must meet, and the name of the reason where it doesn't."""

    rule: str = Field(description='Over columns, such as "ifd_effective < 1".')
    reason: str | None = Field(default=None, description="Name of the reason; unset: the rule.")


RESPONSE_REWRITTEN = Filter(
    rule='reflection_outcome in ["response", "both"] or reflection_status == "not_requested"',
    reason="response_not_rewritten",
)
"""What `reflection.require_response_rewrite` asks of selection."""


class SelectionSettings(Settings):
    """The `selection` section of a recipe: filters, then the best rows by a method."""

    filters: list[Filter] = Field(default_factory=list, description="All must be met.")
    method: Literal["top", "round_robin", "coverage", "mixed"] = Field(
        default="top",
        description="top: the best by `score`. round_robin: target rows take turns, each its best "
        "row; `score` is a column of scores by target row. coverage: greedy coverage of active "
        "features. mixed: score and coverage together.",
    )
    score: str | None = Field(
        default=None, description="Column to rank by; unset: every row that passes is kept."
    )
    order: Literal["highest", "lowest"] = Field(default="highest", description="Which scores win.")
    diversity: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Weight of coverage against score in method mixed; unset there: 0.5.",
    )
    share: float | None = Field(
        default=None, gt=0, le=1, description="Share of the passing rows to keep."
    )
    rows: int | None = Field(default=None, ge=1, description="Number of rows to keep.")
    per_source: bool = Field(
        default=False, description="Rank and cut within each source instead of over all."
    )
    length_bins: int | None = Field(
        default=None,
        ge=2,
        description="Rank and cut within bins of equally many rows by tokens, each in proportion: "
        "kept rows are then as long as the rows that pass.",
    )
    missing: Literal["drop", "keep_last"] = Field(
        default="drop", description="What a null score means: dropped, or ranked behind all others."
    )
    duplicates: bool = Field(
        default=True,
        description="Drop rows whose effective text equals an earlier kept row's, and rewritten "
        "rows whose response does (in its words, 13 or more).",
    )
    semantic_duplicates: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Drop rows whose embedding has at least this cosine with an earlier kept row's "
        "or an anchor's; needs an embedding section.",
    )

    overrides: str | None = Field(
        default=None,
        min_length=1,
        description="File of what people decided: `id`, `decision` (keep or drop), and where you "
        "like `reviewer` and `reason`. It goes before filters, scores and the cut, and doesn't "
        "count in it; licences and anchors go before it.",
    )

    def with_filter(self, last: Filter) -> SelectionSettings:
        """The same, with one more filter."""
        return self.model_copy(update={"filters": [*self.filters, last]})

    @property
    def ranks(self) -> bool:
        """Whether rows are ranked at all."""
        return self.score is not None or self.method == "coverage"

    @model_validator(mode="after")
    def _one_size(self) -> SelectionSettings:
        if self.share is not None and self.rows is not None:
            raise ValueError("give share or rows, not both")
        sized = self.share is not None or self.rows is not None
        if not self.ranks and (sized or self.length_bins):
            raise ValueError("share, rows and length_bins need a score to rank by")
        if self.ranks and not sized:
            what = f"score {self.score}" if self.score else f"method {self.method}"
            raise ValueError(f"{what} needs share or rows: how much to keep")
        return self

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> SelectionSettings:
        if self.method in ("round_robin", "mixed") and self.score is None:
            raise ValueError(f"method {self.method} needs a score")
        if self.method == "coverage" and self.score is not None:
            raise ValueError("method coverage ranks by features alone; for a score too: mixed")
        if self.method in ("round_robin", "coverage") and self.order != "highest":
            raise ValueError(f"order: lowest has no meaning with method {self.method}")
        if self.diversity is not None and self.method != "mixed":
            raise ValueError("diversity belongs to method mixed")
        return self
