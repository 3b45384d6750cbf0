"""What a recipe says about ingest."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from stages.base import Settings
from stages.dictionary.settings import Part
from stages.ingest.bands import bands_of
from stages.sources.settings import Target


class NearDuplicateSettings(Settings):
    """What counts as a near duplicate, and which row of a cluster stays."""

    part: Part = Field(default="both", description="Turns that are compared; never the system's.")
    threshold: float = Field(
        default=0.8, gt=0, le=1, description="Jaccard similarity of shingles from which on."
    )
    shingle: int = Field(
        default=5,
        ge=1,
        description="Words in a shingle; in scripts without spaces each character is a word.",
    )
    permutations: int = Field(
        default=128, ge=1, le=1024, description="Hashes in a row's MinHash signature."
    )
    recall: float = Field(
        default=0.99,
        gt=0,
        lt=1,
        description="Probability of finding a pair at the threshold; likelier for closer pairs.",
    )
    keep: Literal["first", "longest"] = Field(
        default="first",
        description="The row of a cluster that stays: first in the recipe's order, or longest.",
    )
    prefer: list[str] = Field(
        default_factory=list,
        description="Sources whose rows stay before others', exact duplicates too; best first.",
    )

    @model_validator(mode="after")
    def _recall_in_reach(self) -> Self:
        bands_of(self.threshold, self.permutations, self.recall)
        return self


class ContaminationSettings(Settings):
    """Which texts training must not see, and when a row counts as holding one."""

    targets: bool = Field(default=True, description="Reject rows that overlap a target.")
    sets: list[Target] = Field(
        default_factory=list,
        description="Evaluation sets, with a target's fields; only compared with.",
    )
    part: Part = Field(
        default="prompt",
        description="Turns of theirs that rows must not hold; responses only of 13 words or more.",
    )
    ngram: int = Field(
        default=13, ge=2, description="Words in a run that a row may not share with them."
    )
    short: int = Field(
        default=6,
        ge=1,
        description="Fewest words of a turn of theirs that may not stand inside a longer text; a "
        "shorter one is matched with whole turns only.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [one.name for one in self.sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two evaluation sets are called {twice[0]}")
        return self


class IngestSettings(Settings):
    """Sizes of shards, limits on what is taken, and near duplicates."""

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
        description="Share of a source's records that may be rejected (duplicates and rows that "
        "overlap targets or evaluation sets not counted).",
    )
    allow_empty_sources: bool = Field(
        default=False,
        description="Go on where a source has no row left because all are duplicates of others' or "
        "overlap targets or evaluation sets.",
    )
    near_duplicates: NearDuplicateSettings | None = Field(
        default=None, description="Reject near duplicates; unset: exact ones only."
    )

    @model_validator(mode="after")
    def _row_fits(self) -> Self:
        if self.max_chars is not None and self.max_chars > self.max_chars_per_shard:
            raise ValueError(
                f"max_chars {self.max_chars} is more than max_chars_per_shard "
                f"{self.max_chars_per_shard}: lower the one or raise the other"
            )
        return self
