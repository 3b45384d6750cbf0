"""Settings of the mixture stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.base import Settings
from stages.mixture.cost import Metric

Share = Annotated[float, Field(ge=0, le=1)]


class MixtureSettings(Settings):
    """The `mixture` section of a recipe: weights of sources by optimal transport to the targets."""

    metric: Metric = Field(default="euclidean", description="Cost between two vectors.")
    rows_per_source: int = Field(
        default=400, ge=2, description="Rows of each source in the first sample that is solved."
    )
    max_rows_per_source: int = Field(
        default=1600, ge=2, description="The sample doubles up to this while the gap is too large."
    )
    target_rows: int = Field(
        default=1000, ge=1, description="Target rows in the transport: those of lowest hash."
    )
    tolerance: float = Field(
        default=0.01, gt=0, description="Relative gap between estimate and certified bound."
    )
    bundle_tolerance: float = Field(
        default=1e-4, gt=0, description="Relative gap at which the sample counts as solved."
    )
    floors: dict[str, Share] = Field(default_factory=dict, description="Least weight of a source.")
    caps: dict[str, Share] = Field(
        default_factory=dict,
        description="Largest weight of a source, beside what its rows and the budget allow.",
    )
    task_weights: Literal["equal", "proportional"] = Field(
        default="equal", description="Mass of each target task: the same, or by its rows."
    )
    range_slack: float = Field(
        default=0.01,
        ge=0,
        description="Weights within this share of the optimum count as near-optimal.",
    )
