"""Settings of the mixture stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.base import Settings
from stages.mixture.cost import Metric

Share = Annotated[float, Field(ge=0, le=1)]

Method = Literal[
    "transport", "debiased", "energy", "nearest", "chameleon", "uniform", "proportional"
]


class MixtureSettings(Settings):
    """The `mixture` section of a recipe: weights of sources that bring rows near the targets."""

    method: Method = Field(
        default="energy",
        description="What the weights minimise or count (docs/mixture.md). Whatever it is, the "
        "report says what the weights cost in transport, beside a bound that holds for all rows.",
    )
    metric: Metric = Field(default="euclidean", description="Cost between two vectors.")
    pca: int | None = Field(
        default=None,
        ge=1,
        description="Compare vectors by this many principal components of rows and targets; unset: "
        "as they are.",
    )
    serves: dict[str, list[str]] = Field(
        default_factory=dict,
        description="Tasks that a source's rows are for; other tasks cost them `task_cost` more.",
    )
    task_cost: float = Field(
        default=0.0, ge=0, description="What a task that a source doesn't serve adds to the cost."
    )
    rows_per_source: int = Field(
        default=400, ge=2, description="Rows of each source in the first sample that is solved."
    )
    max_rows_per_source: int = Field(
        default=6400,
        ge=2,
        description="The sample grows fourfold up to this while the gap is too large.",
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
    kl: float = Field(
        default=0.0,
        ge=0,
        description="Adds this times the KL divergence of the weights from the natural mixture "
        "(what there is of each source) to the transport. Needs `method: transport`; not with "
        "`keep`.",
    )
    keep: dict[str, Share] = Field(
        default_factory=dict,
        description="Weights of an earlier mixture: these sources keep their proportions, the rest "
        "is solved. Needs `method: transport`.",
    )
    task_weights: Literal["equal", "proportional"] = Field(
        default="equal", description="Mass of each target task: the same, or by its rows."
    )
    range_slack: float = Field(
        default=0.01,
        ge=0,
        description="Weights within this share of the optimum count as near-optimal.",
    )
    neighbours: int = Field(
        default=10, ge=1, description="`method: nearest`: rows that each target point votes for."
    )
    chameleon_ridge: float = Field(
        default=10.0, gt=0, description="`method: chameleon`: ridge of its kernel regression."
    )
    chameleon_temperature: float = Field(
        default=0.2, gt=0, description="`method: chameleon`: temperature of its softmax."
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.keep and self.method != "transport":
            raise ValueError(f"keep needs method: transport, not {self.method}")
        if self.kl and self.method != "transport":
            raise ValueError(f"kl needs method: transport, not {self.method}")
        if self.kl and self.keep:
            raise ValueError("kl and keep pull to different mixtures: give one of them")
        if self.keep and not any(self.keep.values()):
            raise ValueError("keep gives no source a weight above 0")
        if bool(self.serves) != bool(self.task_cost):
            raise ValueError("serves and task_cost go together: give both or neither")
        if self.max_rows_per_source < self.rows_per_source:
            raise ValueError(
                f"max_rows_per_source {self.max_rows_per_source} is below rows_per_source "
                f"{self.rows_per_source}"
            )
        return self
