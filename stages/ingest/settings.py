"""What a recipe says about ingest."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from stages.base import Settings


class IngestSettings(Settings):
    """Sizes of shards, and limits on what is taken."""

    rows_per_shard: int = Field(default=512, ge=1, description="Rows in a shard, at most.")
    max_chars_per_shard: int = Field(
        default=4_000_000,
        ge=1,
        description="Characters in a shard, at most: it stands for tokens, which only a model's "
        "tokenizer could count. A longer row has a shard of its own.",
    )
    max_chars: int | None = Field(
        default=200_000,
        ge=1,
        description="Characters in a row's turns and tools, at most; longer rows are rejected.",
    )
    max_reject_rate: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Share of a source's records that may be rejected (duplicates not counted).",
    )

    @model_validator(mode="after")
    def _row_fits(self) -> Self:
        if self.max_chars is not None and self.max_chars > self.max_chars_per_shard:
            raise ValueError(
                f"max_chars {self.max_chars} is more than max_chars_per_shard "
                f"{self.max_chars_per_shard}: lower the one or raise the other"
            )
        return self
