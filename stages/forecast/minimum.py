"""The mixture of least forecast loss, by projected gradient from several starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from stages.mixture.simplex import FloatArray, Mixture, nearest_mixture

Objective = Callable[[FloatArray], tuple[float, FloatArray]]
"""Value and gradient at a mixture."""

_DECREASE = 1e-4
_SHORTEST = 1e-7


def projected_descent(
    objective: Objective, start: FloatArray, lower: FloatArray, upper: FloatArray, steps: int
) -> Mixture:
    r"""Descend from one start until no step along the projected gradient lowers the value.

    .. math:: p \leftarrow \Pi(p - s\, g), \qquad
              f(p') \le f(p) + c\, \langle g, p' - p \rangle

    The step s is halved until the second holds, and doubled after it did. Value and gradient are
    computed anew at every trial, transport included. Where the objective has a kink the descent can
    end there; other starts are what helps.

    Source: Bertsekas 1976, On the Goldstein-Levitin-Polyak gradient projection method.

    Args:
        objective: value and gradient.
        start: float64 [K], within the bounds.
        lower: least weights.
        upper: largest weights.
        steps: at most.
    """
    p = start
    value, slopes = objective(p)
    size = 0.5
    for _ in range(steps):
        slopes = slopes - slopes.mean()
        length = float(np.linalg.norm(slopes))
        if length == 0:
            break
        moved = None
        while size > _SHORTEST:
            candidate = nearest_mixture(p - size * slopes / length, lower, upper)
            if np.abs(candidate - p).max() < _SHORTEST:
                break
            found = objective(candidate)
            if found[0] <= value + _DECREASE * float(slopes @ (candidate - p)):
                moved = candidate
                break
            size /= 2
        if moved is None:
            break
        p, (value, slopes) = moved, found
        size = min(2 * size, 0.5)
    return Mixture(p, value)


def least_mixture(
    objective: Objective,
    starts: Iterable[FloatArray],
    lower: FloatArray,
    upper: FloatArray,
    steps: int,
) -> Mixture:
    """The best that descents from several starts find.

    Args:
        objective: value and gradient.
        starts: float64 [K] each; the nearest mixtures within the bounds are taken.
        lower: least weights.
        upper: largest weights.
        steps: of one descent, at most.
    """
    found = [
        projected_descent(objective, nearest_mixture(start, lower, upper), lower, upper, steps)
        for start in starts
    ]
    return min(found, key=lambda mixture: mixture.value)
