"""Settings of the features stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import RowSettings
from stages.dictionary.settings import Part

Pooling = Literal["mean", "max"]
Metric = Literal["jaccard", "cosine", "euclidean"]


class FeaturesSettings(RowSettings):
    """The `features` section of a recipe: similarity of each row to the targets."""

    student: str = Field(default="student", description="Name of the model that is read.")
    part: Part = Field(
        default="both", description="Tokens that count; template and special tokens never do."
    )
    pooling: Pooling = Field(
        default="mean", description="How the codes of a row's tokens make its code."
    )
    metric: Metric = Field(
        default="jaccard",
        description="Similarity of two codes: generalised Jaccard, cosine, or minus the Euclidean "
        "distance.",
    )
    target_rows: Literal["prototype", "mean", "max"] = Field(
        default="prototype",
        description="A task's similarity. prototype: to the mean code of its rows; mean, max: of "
        "the similarities to each of its rows.",
    )
    aggregate: Literal["max", "mean"] = Field(
        default="max", description="How the similarities to several tasks make one score."
    )
    by_target: bool = Field(
        default=False,
        description="Write similarity_by_target, the similarity to every target row, which "
        "selection's round robin ranks by: 4 bytes a row and target row.",
    )
    active_above: float | None = Field(
        default=None,
        ge=0,
        description="Write active_features, the latents whose largest activation in the row is "
        "above this, which selection's coverage needs; unset: no such column.",
    )
    mask_dead: bool = Field(
        default=False, description="Leave out latents that no token of a sample of rows activates."
    )
    max_frequency: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Leave out latents that more than this share of a sample's tokens activates.",
    )
    idf: bool = Field(
        default=False,
        description="Weight latents by ln((1 + rows) / (1 + rows with the latent)) of a sample.",
    )
    frequency_rows: int = Field(
        default=1000, ge=1, description="Rows of that sample: those of lowest hash(id, seed)."
    )

    @property
    def needs_frequencies(self) -> bool:
        """Whether latents are weighted by how often they are active."""
        return self.mask_dead or self.max_frequency is not None or self.idf

    @property
    def needs_target_rows(self) -> bool:
        """Whether rows are compared with every target row."""
        return self.by_target or self.target_rows != "prototype"
