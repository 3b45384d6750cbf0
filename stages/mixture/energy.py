"""Mixture of least energy distance to the target: K x K statistics, no curse of dimension.

It is the limit of the Sinkhorn divergence for infinite regularisation. Optimal transport on samples
in high dimension prefers sources of low variance; this distance, on independent pairs, does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import helmert

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
_AIM = 1e-12
_STEPS = 20_000
_CHECKED_EVERY = 50
_TILE = 1024
_FEWEST = 4
"""Rows from which a source's rows are dealt into blocks: fewer stay together in all samples."""


@dataclass(frozen=True)
class EnergySums:
    """Sums of costs between blocks of rows and of targets, from which means without a block follow.

    Rows are dealt into G blocks within each source, and targets into G blocks. The rows of a source
    of fewer than four stay together in one more block, which is never left out.

    Attributes:
        counts: rows of each source and block, int64 [K, G + 1].
        squares: sum of b_j^2 of each target block, float64 [G].
        mass: sum of b_j of each target block, float64 [G].
        to_target: sum of b_j c(x, y_j), float64 [K, G + 1, G].
        between: sum of c(x, x'), x in a block and x' in any, float64 [G + 1, K, K].
        inside: the same with x and x' in one block, float64 [G + 1, K, K].
        within: sum of b_i b_j c(y_i, y_j), float64 [G, G].
    """

    counts: IntArray
    squares: FloatArray
    mass: FloatArray
    to_target: FloatArray
    between: FloatArray
    inside: FloatArray
    within: FloatArray

    def statistics(self, without: int | None = None) -> tuple[FloatArray, FloatArray, float]:
        """Mean costs D_k = E c(x_k, y), E_kl = E c(x_k, x_l'), S = E c(y, y') over pairs.

        A row is never paired with itself: E_kk divides by n_k (n_k - 1), S by 1 - sum_j b_j^2. A
        source of one row, or a target of one point, is that point: its spread is 0.
        Source: U-statistics of the energy distance (Szekely and Rizzo 2013, Energy statistics).

        Args:
            without: a block of rows and of targets to leave out.

        Returns:
            D float64 [K], E float64 [K, K], S.

        Raises:
            ValueError: a source has no rows, or the target no mass.
        """
        kept = [g for g in range(self.counts.shape[1]) if g != without]
        points = [g for g in range(len(self.mass)) if g != without]
        counts = self.counts[:, kept].sum(axis=1)
        if counts.min() < 1:
            raise ValueError(f"source {int(np.argmin(counts))} has no rows")
        mass, squares = self.mass[points].sum(), self.squares[points].sum()
        if mass <= 0:
            raise ValueError("the target has no mass")
        to_target = self.to_target[:, kept][:, :, points].sum(axis=(1, 2)) / (counts * mass)
        between = self.between.sum(axis=0)
        if without is not None:
            left = self.between[without]
            between -= left + left.T - self.inside[without]
        # The cost of a row to itself is 0, so leaving it out only changes the divisor.
        pairs = np.outer(counts, counts) - np.diag(np.where(counts > 1, counts, 0))
        others = mass**2 - squares
        within = self.within[np.ix_(points, points)].sum()
        spread = float(within / others) if others > 1e-12 * mass**2 else 0.0
        return to_target, between / pairs, spread


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

    Memory is 16 K^2 (G + 1) bytes, and 8 K (G + 1) for each of 1,024 rows at a time.
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
    members, counts = source_counts(source, n_sources)
    order = np.argsort(members, kind="stable")
    rank = np.empty(len(members), dtype=np.int64)
    rank[order] = np.arange(len(members)) - np.searchsorted(members[order], members[order])
    block = np.where(counts[members] < _FEWEST, blocks, rank % blocks)
    deal = np.arange(len(points)) % blocks
    parts = blocks + 1
    label = block * n_sources + members
    cells = parts * n_sources
    in_cell, in_deal = of_source(label, cells), of_source(deal, blocks)
    to_target = np.zeros((cells, blocks))
    between, inside = np.zeros((cells, n_sources)), np.zeros((parts, n_sources, n_sources))
    for start in range(0, len(rows), _TILE):
        tile = rows[start : start + _TILE]
        mine = of_source(label[start : start + _TILE], cells)
        to_target += mine @ (in_deal @ (cost_matrix(tile, points, metric) * target).T).T
        # Of each row of the tile, its cost to every cell: [G + 1, K, tile].
        costs = (in_cell @ cost_matrix(tile, rows, metric).T).reshape(parts, n_sources, len(tile))
        between += mine @ costs.sum(axis=0).T
        for part in range(parts):
            here = mine[part * n_sources : (part + 1) * n_sources]
            inside[part] += here @ costs[part].T
    own = cost_matrix(points, points, metric) * np.outer(target, target)
    return EnergySums(
        np.bincount(label, minlength=cells).reshape(parts, n_sources).T,
        np.asarray(np.bincount(deal, weights=target**2, minlength=blocks), np.float64),
        np.asarray(np.bincount(deal, weights=target, minlength=blocks), np.float64),
        to_target.reshape(parts, n_sources, blocks).swapaxes(0, 1),
        between.reshape(parts, n_sources, n_sources),
        inside,
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
    bent = curvature > 0
    root = np.sqrt(curvature[bent])[:, None] * (basis @ directions[:, bent]).T
    steepest = 2.0 * float(curvature[-1])
    problem = _Quadratic(start, 2.0 * (to_target - between @ start) / size, root, steepest)
    p = _least_by_projected_gradient(problem, low, high)
    gap = problem.gap(p, low, high)
    if not gap <= _GAP:
        raise TransportNotSolved(f"energy mixture of {low.size} sources: optimality gap {gap:.2g}")
    return Mixture(p, float(2.0 * p @ to_target - p @ between @ p) - within)


@dataclass(frozen=True)
class _Quadratic:
    r"""A convex quadratic, :math:`s \cdot (p - p_0) + |R (p - p_0)|^2`, of curvature up to L."""

    start: FloatArray
    slope: FloatArray
    root: FloatArray
    steepest: float

    def value(self, p: FloatArray) -> float:
        step = p - self.start
        return float(self.slope @ step + np.sum((self.root @ step) ** 2))

    def gradient(self, p: FloatArray) -> FloatArray:
        return np.asarray(
            self.slope + 2.0 * self.root.T @ (self.root @ (p - self.start)), dtype=np.float64
        )

    def gap(self, p: FloatArray, low: FloatArray, high: FloatArray) -> float:
        """Frank-Wolfe gap: it bounds value(p) - min, whatever a solver reports."""
        gradient = self.gradient(p)
        return float(gradient @ (p - least_dot(gradient, low, high)))


def _least_by_projected_gradient(
    problem: _Quadratic, low: FloatArray, high: FloatArray
) -> FloatArray:
    r"""Accelerated projected gradient, begun again where its momentum turns uphill.

    .. math:: p_{t+1} = \mathrm{proj}\bigl(z_t - \tfrac1L \nabla f(z_t)\bigr), \qquad
              z_{t+1} = p_{t+1} + \beta_t (p_{t+1} - p_t)

    Source: Beck and Teboulle 2009; restarts of O'Donoghue and Candes 2015.
    """
    rate = 1.0 / max(problem.steepest, 1e-12)
    p = ahead = problem.start
    momentum = 1.0
    for step in range(_STEPS):
        if step % _CHECKED_EVERY == 0 and problem.gap(p, low, high) <= _AIM:
            break
        new = nearest_mixture(ahead - rate * problem.gradient(ahead), low, high)
        if (ahead - new) @ (new - p) > 0:
            momentum = 1.0
        following = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
        ahead = new + (momentum - 1.0) / following * (new - p)
        p, momentum = new, following
    return p


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
