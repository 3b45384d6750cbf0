"""A budget cut into shares, and shares into whole rollouts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def capacity(weights: FloatArray, cap: int | None = None, floor: int = 0) -> int | None:
    """The most that can be allocated: `cap` by weight, else `floor`; None where there's no end."""
    weighted = int(np.count_nonzero(weights))
    if weighted and cap is None:
        return None
    return weighted * (cap or 0) + (len(weights) - weighted) * floor


def water_filled(
    weights: FloatArray, total: int, cap: int | None = None, floor: int = 0
) -> FloatArray:
    r"""Shares of a total that are proportional to the weights, within bounds.

    .. math:: n_i = \min(c, \max(f, \lambda w_i)), \qquad \sum_i n_i = N

    This minimises :math:`\sum_i w_i^2 / n_i` over the n within the bounds. What a cap or floor
    leaves or takes is spread over the others in proportion to their weights, until none is beyond
    its bound. A weight of 0 gets the floor.

    Args:
        weights: float64 [n], at least 0 and finite.
        total: N, to share out; beyond `capacity` the rest stays.
        cap: c, the most that one may get; None: no limit.
        floor: f, the least that each gets.

    Returns:
        float64 [n].

    Raises:
        ValueError: a weight is negative or not finite, the cap is below the floor, or the total
            can't pay the floors.

    Source: Bitran and Hax, Disaggregation and resource allocation using convex knapsack problems
    with bounded variables, Management Science 27(4), 1981.
    """
    _check(weights, total, cap, floor)
    most = capacity(weights, cap, floor)
    rest = total if most is None else min(total, most)
    shares = np.full(len(weights), float(floor))
    free = np.flatnonzero(weights > 0)
    rest -= floor * (len(weights) - len(free))
    highest = np.inf if cap is None else float(cap)
    while len(free):
        # Scaled first: the sum of large weights, or the ratio of tiny ones, may not be a float.
        scaled = weights[free] / weights[free].max()
        proportional = rest * (scaled / scaled.sum())
        over = np.maximum(proportional - highest, 0).sum()
        under = np.maximum(floor - proportional, 0).sum()
        if over >= under:
            bound, fixed = highest, proportional > highest
        else:
            bound, fixed = float(floor), proportional < floor
        shares[free] = np.clip(proportional, floor, highest)
        # Where as much is missing as is too much, every clipped share is right already.
        if over == under or not fixed.any():
            break
        shares[free[fixed]] = bound
        rest -= int(bound) * int(np.count_nonzero(fixed))
        free = free[~fixed]
    return shares


def allocated(weights: FloatArray, total: int, cap: int | None = None, floor: int = 0) -> IntArray:
    """Whole numbers proportional to the weights, by the method of largest remainders.

    Every share of `water_filled` is rounded down, and what is left goes, one each, to the largest
    fractions; of equal fractions the earlier ones get it.

    Args:
        weights: float64 [n], at least 0 and finite.
        total: to allocate.
        cap: the most that one may get; None: no limit.
        floor: the least that each gets.

    Returns:
        int64 [n] within the bounds, 0 or `floor` where the weight is 0; the sum is `total`, or
        `capacity` where that is less.

    Raises:
        ValueError: as `water_filled`.
    """
    shares = water_filled(weights, total, cap, floor)
    numbers = np.floor(shares).astype(np.int64)
    most = capacity(weights, cap, floor)
    left = (total if most is None else min(total, most)) - int(numbers.sum())
    if left:
        fractions = np.where(weights > 0, shares - numbers, -1.0)
        numbers[np.argsort(-fractions, kind="stable")[:left]] += 1
    return numbers


def _check(weights: FloatArray, total: int, cap: int | None, floor: int) -> None:
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        raise ValueError(f"weights[{bad[0]}] is {weights[bad[0]]}: need finite numbers, at least 0")
    if cap is not None and cap < floor:
        raise ValueError(f"the cap {cap} is below the floor {floor}")
    if total < floor * len(weights):
        raise ValueError(
            f"a total of {total} can't pay the floor of {floor} for each of {len(weights)} rows"
        )
