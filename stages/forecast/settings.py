"""Settings of forecasts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.base import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class ForecastSettings(Settings):
    """How losses are projected, and which mixtures may be recommended."""

    project: Literal["loss", "log_loss"] = Field(
        default="log_loss",
        description="What goes straight over the logarithm of rows: the loss, or its logarithm (a "
        "power law).",
    )
    starts: int = Field(
        default=5, ge=1, description="Mixtures from which the projected loss is minimised."
    )
    steps: int = Field(default=60, ge=1, description="Gradient steps from one start, at most.")
    floors: dict[str, Share] = Field(
        default_factory=dict, description="Least weight of a source in a recommended mixture."
    )
    caps: dict[str, Share] = Field(
        default_factory=dict,
        description="Largest weight of a source, beside what its rows and the budget allow.",
    )
    interval: float = Field(
        default=0.95, gt=0, lt=1, description="Coverage that intervals are made for."
    )
