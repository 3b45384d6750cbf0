"""How many rows or tokens every source gives."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from stages.errors import StageError


def shares(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Weights as exact fractions that sum to 1.

    A float is read as the decimal that it prints as, so that 0.1 means one tenth.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """
    exact = {name: Fraction(repr(float(weight))) for name, weight in weights.items()}
    total = sum(exact.values())
    if total <= 0 or min(exact.values()) < 0:
        raise ValueError(f"weights must be at least 0, and one of them above 0: {dict(weights)}")
    return {name: weight / total for name, weight in exact.items()}


def largest_remainder(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Split `total` in proportion to the weights, in whole numbers (Hamilton's method).

    Every part is the exact share rounded down, and what is left goes, one each, to the largest
    fractions; ties go to the name that sorts first.

    Args:
        weights: by name, at least 0; they need not sum to 1.
        total: units to give away.

    Returns:
        Units by name, in the order of `weights`; they sum to `total`.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """
    exact = {name: share * total for name, share in shares(weights).items()}
    parts = {name: int(value) for name, value in exact.items()}
    left = total - sum(parts.values())
    for name in sorted(exact, key=lambda name: (parts[name] - exact[name], name))[:left]:
        parts[name] += 1
    return parts


def largest_total(weights: Mapping[str, float], available: Mapping[str, int]) -> int:
    """The largest total whose shares are all available: floor(min_k available_k / weight_k)."""
    return int(
        min(available.get(name, 0) / share for name, share in shares(weights).items() if share > 0)
    )


def plan_quotas(
    weights: Mapping[str, float], available: Mapping[str, int], budget: int | None, unit: str
) -> dict[str, int]:
    """Quotas by source.

    Args:
        weights: shares of the budget, by source.
        available: rows or tokens that each source can give, repeats included.
        budget: total in `unit`; None takes the largest that meets the weights.
        unit: `rows` or `tokens`, for messages.

    Raises:
        StageError: a quota exceeds what its source has, or nothing can be emitted.
    """
    most = largest_total(weights, available)
    if budget is None and most == 0:
        empty = [name for name, weight in weights.items() if weight > 0 and not available.get(name)]
        raise StageError(
            f"emission: source {', '.join(empty)} has a weight but no selected {unit}, so no data "
            "set meets the weights; loosen selection for it or leave the source out",
            stage="emission",
        )
    quotas = largest_remainder(weights, most if budget is None else budget)
    short = [name for name, quota in quotas.items() if quota > available.get(name, 0)]
    if short:
        wants = "; ".join(
            f"source {name} should give {quotas[name]:,} {unit} "
            f"but {available.get(name, 0):,} are available"
            for name in short
        )
        raise StageError(
            f"emission: {wants}. Lower emission.budget_{unit} from {budget:,} to at most {most:,}, "
            "cap the source's weight, loosen selection, or set `repeats` above 1 for the source",
            stage="emission",
        )
    return quotas
