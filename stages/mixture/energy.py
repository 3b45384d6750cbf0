"""Mixture of least energy distance to the target: K x K statistics, no curse of dimension.

It is the limit of the Sinkhorn divergence for infinite regularisation. Optimal transport on samples
in high dimension prefers sources of low variance; this distance, on independent pairs, does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import helmert
from scipy.optimize import minimize

from stages.mixture.cost import Metric, checked_rows, cost_matrix
from stages.mixture.simplex import (
    FloatArray,
    IntArray,
    Mixture,
    checked_bounds,
    distribution,
    least_dot,
    nearest_mixture,
    of_source,
    source_counts,
)
from stages.mixture.transport import TransportNotSolved

_GAP = 1e-8
_TILE = 1024


@dataclass(frozen=True)
class EnergySums:
    """Sums of costs between blocks of rows and of targets, from which means without a block follow.

    Rows are dealt into G blocks within each source, and targets into G blocks.

    Attributes:
        counts: rows of each source and block, int64 [K, G].
        squares: sum of b_j^2 of each target block, float64 [G].
        mass: sum of b_j of each target block, float64 [G].
        to_target: sum of b_j c(x, y_j), float64 [K, G, G].
        between: sum of c(x, x'), float64 [K, G, K, G].
        within: sum of b_i b_j c(y_i, y_j), float64 [G, G].
    """

    counts: IntArray
    squares: FloatArray
    mass: FloatArray
    to_target: FloatArray
    between: FloatArray
    within: FloatArray

    def statistics(self, without: int | None = None) -> tuple[FloatArray, FloatArray, float]:
        """Mean costs D_k = E c(x_k, y), E_kl = E c(x_k, x_l'), S = E c(y, y') over pairs.

        A row is never paired with itself: E_kk divides by n_k (n_k - 1), S by 1 - sum_j b_j^2.
        Source: U-statistics of the energy distance (Szekely and Rizzo 2013, Energy statistics).

        Args:
            without: a block of rows and of targets to leave out.

        Returns:
            D float64 [K], E float64 [K, K], S.

        Raises:
            ValueError: a source has fewer than two rows, or the target fewer than two atoms with
                mass.
        """
        blocks = [g for g in range(len(self.mass)) if g != without]
        counts = self.counts[:, blocks].sum(axis=1)
        if counts.min() < 2:
            few = int(np.argmin(counts))
            raise ValueError(f"source {few} has {counts[few]} rows: pairs need two")
        mass, squares = self.mass[blocks].sum(), self.squares[blocks].sum()
        if mass <= 0 or squares >= mass**2 * (1 - 1e-12):
            raise ValueError("the target has one atom with mass: pairs need two")
        to_target = self.to_target[:, blocks][:, :, blocks].sum(axis=(1, 2)) / (counts * mass)
        between = self.between[:, blocks][:, :, :, blocks].sum(axis=(1, 3))
        # The cost of a row to itself is 0, so leaving it out only changes the divisor.
        pairs = np.outer(counts, counts) - np.diag(counts)
        within = self.within[np.ix_(blocks, blocks)].sum() / (mass**2 - squares)
        return to_target, between / pairs, float(within)


def energy_sums(
    x: npt.ArrayLike,
    source: npt.ArrayLike,
    y: npt.ArrayLike,
    b: npt.ArrayLike,
    metric: Metric,
    n_sources: int,
    blocks: int = 1,
) -> EnergySums:
    """Sums of costs over all pairs, by source and block.

    Source: definition of the pairs' means.

    Args:
        x: [n, d].
        source: integers [n] in 0..n_sources-1.
        y: [m, d].
        b: [m], non-negative, scaled to sum 1.
        metric: the cost.
        n_sources: K.
        blocks: G; rows and targets are dealt in turn.

    Raises:
        ValueError: an argument is malformed.
    """
    rows, points = checked_rows(x, "x", metric), checked_rows(y, "y", metric)
    target = distribution(b, "b")
    members, _ = source_counts(source, n_sources)
    order = np.argsort(members, kind="stable")
    block = np.empty(len(members), dtype=np.int64)
    block[order] = np.arange(len(members)) - np.searchsorted(members[order], members[order])
    label = members * blocks + block % blocks
    deal = np.arange(len(points)) % blocks
    cells = n_sources * blocks
    in_cell, in_deal = of_source(label, cells), of_source(deal, blocks)
    to_target, between = np.zeros((cells, blocks)), np.zeros((cells, cells))
    for start in range(0, len(rows), _TILE):
        tile = rows[start : start + _TILE]
        mine = of_source(label[start : start + _TILE], cells)
        to_target += mine @ (in_deal @ (cost_matrix(tile, points, metric) * target).T).T
        between += mine @ (in_cell @ cost_matrix(tile, rows, metric).T).T
    own = cost_matrix(points, points, metric) * np.outer(target, target)
    return EnergySums(
        np.bincount(label, minlength=cells).reshape(n_sources, blocks),
        np.asarray(np.bincount(deal, weights=target**2, minlength=blocks), np.float64),
        np.asarray(np.bincount(deal, weights=target, minlength=blocks), np.float64),
        to_target.reshape(n_sources, blocks, blocks),
        between.reshape(n_sources, blocks, n_sources, blocks),
        np.asarray((in_deal @ (in_deal @ own).T).T),
    )


def energy_mixture(
    sums: EnergySums,
    lower: npt.ArrayLike,
    upper: npt.ArrayLike,
    penalty: npt.ArrayLike | None = None,
    without: int | None = None,
) -> Mixture:
    """Minimise ED(p) = 2 p . D - p^T E p - S with lower <= p <= upper, sum p = 1.

    -E is positive semi-definite along sum = 0 for the costs of this package, but its estimate need
    not be: negative curvature there is noise, and is set to 0 before minimising.
    Source: Szekely and Rizzo 2013; Schoenberg 1938 (costs of negative type).

    Args:
        sums: over a sample.
        lower: [K].
        upper: [K].
        penalty: added to D, [K], or None.
        without: a block to leave out.

    Returns:
        The mixture and its estimated energy distance, unbiased and so possibly below 0.

    Raises:
        ValueError: an argument is malformed or the bounds are infeasible.
        TransportNotSolved: the solver did not reach a proven optimum.
    """
    low, high = checked_bounds(lower, upper)
    to_target, between, within = sums.statistics(without)
    if low.size != to_target.size:
        raise ValueError(f"bounds of {low.size} sources, rows of {to_target.size}")
    if penalty is not None:
        to_target = to_target + np.asarray(penalty, dtype=np.float64)
    if low.size == 1:
        return Mixture(np.ones(1), float(2.0 * to_target[0] - between[0, 0]) - within)
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


def energy_ranges(
    sums: EnergySums,
    weights: FloatArray,
    lower: npt.ArrayLike,
    upper: npt.ArrayLike,
    penalty: npt.ArrayLike | None = None,
) -> FloatArray:
    r"""Weights within two standard errors, by leaving out one block of rows and targets at a time.

    .. math:: \mathrm{se}_k^2 = \frac{G - 1}{G} \sum_g (p_{k,-g} - \bar p_k)^2

    Source: the delete-a-group jackknife (Quenouille 1956, Tukey 1958).

    Args:
        sums: of G >= 2 blocks.
        weights: of all blocks, float64 [K].
        lower: [K].
        upper: [K].
        penalty: as in `energy_mixture`.

    Returns:
        float64 [K, 2], within the bounds.

    Raises:
        ValueError: a source or the target has too few rows for a block to be left out.
        TransportNotSolved: the solver did not reach a proven optimum.
    """
    low, high = checked_bounds(lower, upper)
    blocks = len(sums.mass)
    each = np.stack([energy_mixture(sums, low, high, penalty, g).weights for g in range(blocks)])
    error = np.sqrt((blocks - 1) / blocks * ((each - each.mean(axis=0)) ** 2).sum(axis=0))
    ranges = np.column_stack([weights - 2 * error, weights + 2 * error])
    return np.asarray(np.clip(ranges, low[:, None], high[:, None]), dtype=np.float64)
