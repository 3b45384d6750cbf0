"""Settings of the baselines stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from stages.base import RowSettings, Settings
from stages.dictionary.settings import Part

Score = Literal["random", "longest", "bm25", "embedding", "hidden", "gradient"]

TO_TARGETS: tuple[Score, ...] = ("bm25", "embedding", "hidden", "gradient")
"""Scores against the target rows."""
OF_STUDENT: tuple[Score, ...] = ("longest", "hidden", "gradient")
"""Scores that need the student, or its tokenizer."""


class BaselinesSettings(RowSettings):
    """The `baselines` section of a recipe: cheap and published scores to select by."""

    scores: tuple[Score, ...] = Field(
        min_length=1,
        description="random: a seeded hash; longest: response tokens; bm25, embedding, hidden, "
        "gradient: similarity to the target rows by words, sentence vectors, mean hidden states, "
        "or projected gradients.",
    )
    student: str = Field(default="student", description="Name of the model that is read.")
    layer: int | None = Field(
        default=None, ge=0, description="Block whose output `hidden` averages; unset: the last."
    )
    part: Part = Field(
        default="both", description="Text that bm25 and hidden read: prompt, response or both."
    )
    target_rows: Literal["max", "mean"] = Field(
        default="max",
        description="A task's score: the largest or the mean over its rows. A row's score is that "
        "of its best task.",
    )
    by_target: bool = Field(
        default=False,
        description="Write the scores against every target row too, which selection's round robin "
        "ranks by: 4 bytes a row and target row.",
    )
    rank: int = Field(
        default=8, ge=1, description="Of the low-rank adapters whose gradients are taken."
    )
    dimensions: int = Field(default=4096, ge=1, description="Of the projected gradients.")

    @field_validator("scores")
    @classmethod
    def _each_once(cls, scores: tuple[Score, ...]) -> tuple[Score, ...]:
        twice = sorted({score for score in scores if scores.count(score) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is named twice")
        return scores

    @property
    def to_targets(self) -> tuple[Score, ...]:
        """The chosen scores that compare rows with target rows."""
        return tuple(score for score in TO_TARGETS if score in self.scores)

    @property
    def of_student(self) -> tuple[Score, ...]:
        """The chosen scores that need the student."""
        return tuple(score for score in OF_STUDENT if score in self.scores)


class BaselineTargetSettings(Settings):
    """What the targets' side of the baselines is a function of.

    Attributes:
        scores: those against the target rows.
        student, layer, part, rank, dimensions: of the baselines section; None where no score reads
            them.
        embedded_part: text that the embedding section embeds.
        refit: false: word counts are of the rows that were there first, so that rows which come
            later are measured alike.
    """

    scores: tuple[Score, ...]
    student: str | None
    layer: int | None
    part: Part | None
    rank: int | None
    dimensions: int | None
    embedded_part: Part | None
    refit: bool = False
