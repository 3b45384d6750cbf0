"""The mixture's certificate in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def certificate_sentences(mixture: Mapping[str, Any]) -> list[str]:
    """What the numbers mean, for those that are there; values are in units of transport cost.

    Args:
        mixture: the report of the mixture stage.
    """
    said = []
    value, lower = mixture.get("value_sample"), mixture.get("lower_bound")
    upper, gap = mixture.get("upper_estimate"), mixture.get("gap")
    if value is not None:
        said.append(
            "On the sample that was solved, carrying this mixture onto the targets costs "
            f"{value:.4g}."
        )
    if lower is not None:
        said.append(
            f"No mixture of these rows, of all that the bounds on weights allow, costs less than "
            f"{lower:.4g}: this bound holds for all selected rows, however the sample fell."
        )
    if upper is not None:
        interval = mixture.get("upper_interval")
        range_ = f" (interval {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
        said.append(
            f"Over all selected rows this mixture is estimated to cost {upper:.4g}{range_}."
        )
    if gap is not None:
        share = f", {gap / upper:.1%} of the estimate" if upper else ""
        said.append(
            f"So its cost is estimated to be within {gap:.4g} of the least possible{share}."
        )
    return said
