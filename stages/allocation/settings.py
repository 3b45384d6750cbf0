"""Settings of the allocation of further rollouts, and of the stage that draws them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.base import RowSettings, Settings


class AllocationSettings(Settings):
    """The `allocation` section of a recipe."""

    total: int = Field(ge=1, description="Further rollouts, over all rows.")
    gradient: Literal["measured", "one"] = Field(
        default="measured",
        description="G of the rule: gradient_norm of pass_rate (which needs gradient: true there), "
        "or 1 for every row.",
    )
    alpha: float = Field(
        default=1e-3, ge=0, description="Turns the budget away from rows hardly ever solved."
    )
    beta: float = Field(default=2.0, ge=2, description="How sharply alpha does.")
    cap: int | None = Field(
        default=None, ge=1, description="Most further rollouts of one row; unset: no limit."
    )
    floor: int = Field(
        default=0,
        ge=0,
        description="Least further rollouts of each row with a pass rate up to max_pass_rate, "
        "those never solved included.",
    )
    max_pass_rate: float = Field(
        default=1.0, gt=0, le=1, description="Rows whose pass rate is higher get none."
    )

    @model_validator(mode="after")
    def _bounds(self) -> AllocationSettings:
        if self.cap is not None and self.cap < self.floor:
            raise ValueError(f"cap {self.cap} is below floor {self.floor}")
        return self


class RolloutsSettings(RowSettings):
    """The `rollouts` section of a recipe: which rows draw what they were allocated."""
