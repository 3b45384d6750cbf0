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
        verdict = "certified" if mixture.get("certified") else "NOT within the tolerance asked for"
        said.append(
            f"So its cost is estimated to be within {gap:.2%} of the least possible "
            f"({verdict}: the tolerance is {mixture.get('tolerance', 0):.2%})."
        )
    emitted = mixture.get("value_emitted")
    if emitted is not None:
        said.append(
            f"The rows that were emitted cost {emitted:.4g}, computed over "
            f"{mixture['value_emitted_lines']:,} lines."
        )
    outside = _beyond_ranges(mixture)
    if outside:
        said.append(
            "By energy distance, which does not favour sources for having little spread, the "
            f"weights of {', '.join(outside)} would lie outside the near-optimal ranges: with few "
            "targets in many dimensions, transport may be shrinking the mixture."
        )
    return said


def _beyond_ranges(mixture: Mapping[str, Any]) -> list[str]:
    """Sources whose weight by energy distance is outside transport's near-optimal range."""
    energy, ranges = mixture.get("energy_weights") or {}, mixture.get("ranges") or {}
    return [
        f"{name} ({energy[name]:.2f})"
        for name in sorted(energy)
        if name in ranges and not ranges[name][0] - 0.02 <= energy[name] <= ranges[name][1] + 0.02
    ]
