"""Mixture of least energy distance to the target: K x K statistics, no curse of dimension.

It is the limit of the Sinkhorn divergence for infinite regularisation. Optimal transport on samples
in high dimension prefers sources of low variance; this distance, on independent pairs, does not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import helmert
from scipy.optimize import minimize

from stages.mixture.cost import Metric, checked_rows, cost_matrix
from stages.mixture.simplex import (
    FloatArray,
    Mixture,
    checked_bounds,
    distribution,
    least_dot,
    nearest_mixture,
    source_counts,
)
from stages.mixture.transport import TransportNotSolved

_GAP = 1e-8


def energy_statistics(
    x: npt.ArrayLike,
    source: npt.ArrayLike,
    y: npt.ArrayLike,
    b: npt.ArrayLike,
    metric: Metric,
    n_sources: int,
) -> tuple[FloatArray, FloatArray, float]:
    """Mean costs D_k = E c(x_k, y), E_kl = E c(x_k, x_l'), S = E c(y, y') over independent pairs.

    A row is never paired with itself: E_kk divides by n_k (n_k - 1), S by 1 - sum_j b_j^2.
    Source: U-statistics of the energy distance (Szekely and Rizzo 2013, Energy statistics).

    Args:
        x: [n, d].
        source: integers [n] in 0..n_sources-1.
        y: [m, d].
        b: [m], non-negative, scaled to sum 1.
        metric: the cost.
        n_sources: K.

    Returns:
        D float64 [K], E float64 [K, K], S.

    Raises:
        ValueError: a source has fewer than two rows, or the target fewer than two atoms with mass.
    """
    rows = checked_rows(x, "x", metric)
    target = distribution(b, "b")
    members, counts = source_counts(source, n_sources)
    if counts.min() < 2:
        few = int(np.argmin(counts))
        raise ValueError(f"source {few} has {counts[few]} rows: pairs need two")
    if np.count_nonzero(target) < 2:
        raise ValueError("the target has one atom with mass: pairs need two")
    groups = [rows[members == k] for k in range(n_sources)]
    to_target = np.array([(cost_matrix(group, y, metric) @ target).mean() for group in groups])
    between = np.zeros((n_sources, n_sources))
    for k, group in enumerate(groups):
        for other in range(k):
            mean = cost_matrix(group, groups[other], metric).mean()
            between[k, other] = between[other, k] = mean
        # The cost of a row to itself is 0, so leaving it out only changes the divisor.
        between[k, k] = cost_matrix(group, group, metric).sum() / (counts[k] * (counts[k] - 1.0))
    within = target @ cost_matrix(y, y, metric) @ target / (1.0 - target @ target)
    return to_target, between, float(within)


def energy_mixture(
    x: npt.ArrayLike,
    source: npt.ArrayLike,
    y: npt.ArrayLike,
    b: npt.ArrayLike,
    lower: npt.ArrayLike,
    upper: npt.ArrayLike,
    metric: Metric,
) -> Mixture:
    """Minimise ED(p) = 2 p . D - p^T E p - S with lower <= p <= upper, sum p = 1.

    -E is positive semi-definite along sum = 0 for the costs of this package, but its estimate need
    not be: negative curvature there is noise, and is set to 0 before minimising.
    Source: Szekely and Rizzo 2013; Schoenberg 1938 (costs of negative type).

    Args:
        x: [n, d].
        source: integers [n] in 0..K-1; every source has at least two rows.
        y: [m, d].
        b: [m], non-negative, scaled to sum 1.
        lower: [K].
        upper: [K].
        metric: the cost.

    Returns:
        The mixture and its estimated energy distance, unbiased and so possibly below 0.

    Raises:
        ValueError: an argument is malformed or the bounds are infeasible.
        TransportNotSolved: the solver did not reach a proven optimum.
    """
    low, high = checked_bounds(lower, upper)
    to_target, between, within = energy_statistics(x, source, y, b, metric, low.size)
    size = float(max(np.abs(to_target).max(), np.abs(between).max())) or 1.0
    start = nearest_mixture(np.full(low.size, 1.0 / low.size), low, high)
    basis = np.asarray(helmert(low.size), dtype=np.float64).T
    curvature, directions = np.linalg.eigh(-basis.T @ between @ basis / size)
    root = np.sqrt(np.maximum(curvature, 0.0))[:, None] * (basis @ directions).T
    slope = 2.0 * (to_target - between @ start) / size

    def gradient(p: FloatArray) -> FloatArray:
        return np.asarray(slope + 2.0 * root.T @ (root @ (p - start)), dtype=np.float64)

    def objective(p: FloatArray) -> float:
        step = p - start
        return float(slope @ step + np.sum((root @ step) ** 2))

    answer = minimize(
        objective,
        start,
        jac=gradient,
        method="SLSQP",
        bounds=list(zip(low, high, strict=True)),
        constraints={
            "type": "eq",
            "fun": lambda p: p.sum() - 1.0,
            "jac": lambda p: np.ones_like(p),
        },
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    p = nearest_mixture(np.asarray(answer.x, dtype=np.float64), low, high)
    # Frank-Wolfe gap: it bounds objective(p) - min for a convex objective, whatever SLSQP reports.
    gap = float(gradient(p) @ (p - least_dot(gradient(p), low, high)))
    if not gap <= _GAP:
        raise TransportNotSolved(f"energy mixture: optimality gap {gap:.2g}, {answer.message}")
    return Mixture(p, float(2.0 * p @ to_target - p @ between @ p) - within)
