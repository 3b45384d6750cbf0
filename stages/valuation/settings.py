"""Settings of valuation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import RowSettings, Settings
from stages.mixture.cost import Metric


class PotentialsSettings(Settings):
    """What the potentials depend on."""

    metric: Metric = Field(default="euclidean", description="Cost between two vectors.")
    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the rows that will be kept: values are those of the best selection "
        "of that size. Unset: values of single rows in the whole pool (LAVA, GOT-D).",
    )
    sample_rows: int = Field(
        default=2000, ge=2, description="Rows that the transport is solved on: of lowest hash."
    )
    target_rows: int = Field(
        default=1000, ge=1, description="Target rows in the transport: those of lowest hash."
    )
    task_weights: Literal["equal", "proportional"] = Field(
        default="equal", description="Mass of each target task: the same, or by its rows."
    )


class ValuationSettings(PotentialsSettings, RowSettings):
    """The `valuation` section of a recipe."""
