r"""Transport without its preference for sources of little spread.

Between samples, :math:`\mathrm{OT}(\mu_p, \nu)` contains the spread of the sources themselves, so
that its minimum prefers narrow ones. Half the transport between two independent halves A and B of
the sources has the same excess:

.. math:: D(p) = \mathrm{OT}(\mu_p^A, \nu) - \tfrac12 \mathrm{OT}(\mu_p^A, \mu_p^B)

Source: split-sample debiasing of a transport divergence. The same sample on both sides would give 0
and correct nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.mixture.bundle import optimal_mixture
from stages.mixture.cost import cost_matrix
from stages.mixture.simplex import (
    FloatArray,
    IntArray,
    checked_bounds,
    means_per_source,
    row_weights,
    source_counts,
)
from stages.mixture.space import Space
from stages.mixture.transport import TransportNotSolved, c_transform, transport

_STEPS = 60
_DECREASE = 1e-5


@dataclass(frozen=True)
class Half:
    """Half of a sample: vectors float64 [n, r], sources int64 [n], rows of each source [K]."""

    vectors: FloatArray
    source: IntArray
    counts: IntArray


@dataclass(frozen=True)
class Debiased:
    """A mixture of low D.

    Attributes:
        weights: float64 [K].
        value: D at `weights`, comparable between mixtures of one sample only.
        starts: D reached from each start, float64 [starts]; they differ, D isn't convex.
    """

    weights: FloatArray
    value: float
    starts: FloatArray


def halves(vectors: FloatArray, source: IntArray, n_sources: int) -> tuple[Half, Half]:
    """Every other row of each source; a source of one row is that row, and is in both halves.

    Raises:
        ValueError: a source has no rows.
    """
    members, rows = source_counts(source, n_sources)
    order = np.argsort(source, kind="stable")
    ranks = np.empty(len(source), dtype=np.int64)
    ranks[order] = np.arange(len(source)) - np.searchsorted(source[order], source[order])
    found = []
    for side in (0, 1):
        mine = (ranks % 2 == side) | (rows[members] == 1)
        of, counts = source_counts(source[mine], n_sources)
        for number in np.flatnonzero(counts == 0):
            raise ValueError(f"source {number} has no rows")
        found.append(Half(vectors[mine], of, counts))
    return found[0], found[1]


def self_transport(p: FloatArray, cost: FloatArray, a: Half, b: Half) -> tuple[float, FloatArray]:
    r"""Transport between the halves, and a subgradient in the weights.

    .. math:: S(p) = \mathrm{OT}(\mu_p^A, \mu_p^B), \qquad
              \partial_k S = \mathbb{E}_{A_k} f + \mathbb{E}_{B_k} g

    Potentials are feasible for rows without mass too, so that the subgradient holds at weight 0.
    Source: LP duality; S is jointly convex in its marginals, which are linear in p.

    Args:
        p: float64 [K].
        cost: between the halves, float64 [n_a, n_b].
        a: the one half.
        b: the other.

    Returns:
        S(p), and float64 [K].
    """
    mass = row_weights(p, b.source)
    solved = transport(cost, row_weights(p, a.source), mass)
    there = mass > 0
    f = c_transform(cost[:, there], solved.target_potential[there])
    g = c_transform(cost.T, f)
    slope = means_per_source(f[:, None], a.source, a.counts)[0]
    return solved.value, slope + means_per_source(g[:, None], b.source, b.counts)[0]


def debiased_mixture(
    sample: tuple[Half, Half],
    y: FloatArray,
    b: FloatArray,
    lower: FloatArray,
    upper: FloatArray,
    space: Space,
    starts: Sequence[FloatArray],
    tolerance: float,
) -> Debiased:
    r"""Descend D from several starts, with lower <= p <= upper, sum p = 1.

    D is a difference of convex functions. At each step the subtracted one is replaced by its
    tangent, which lies above D after the sign, and

    .. math:: p_{t+1} = \arg\min_p\; \mathrm{OT}(\mu_p^A, \nu) - p \cdot \tfrac12 \partial S(p_t)

    is solved to optimality, so that D never rises; the best end is kept. It is a local minimum: no
    bound comes with it.
    Source: the convex-concave procedure (Yuille and Rangarajan 2003).

    Args:
        sample: independent halves of every source.
        y: targets, float64 [m, r].
        b: their mass, float64 [m].
        lower: float64 [K].
        upper: float64 [K].
        space: how vectors are compared.
        starts: mixtures within the bounds, float64 [K] each.
        tolerance: relative gap of each convex problem.

    Raises:
        ValueError: the bounds are infeasible.
        TransportNotSolved: a solver stopped early, or the descent doesn't end.
    """
    low, high = checked_bounds(lower, upper)
    one, other = sample
    cost = space.cost(one.vectors, one.source, y)
    between = cost_matrix(one.vectors, other.vectors, space.metric)
    size = float(np.abs(cost).max()) or 1.0
    potentials: FloatArray | None = None
    ends = []
    for start in starts:
        p = start
        own, slope = self_transport(p, between, one, other)
        value = transport(cost, row_weights(p, one.source), b).value - own / 2
        for _ in range(_STEPS):
            # Costs must not be negative for the relative gap to mean something.
            tilt = (slope.max() - slope) / 2
            solved = optimal_mixture(
                cost + tilt[one.source][:, None], one.source, b, low, high, tolerance,
                known=potentials,
            )  # fmt: skip
            potentials = solved.potentials[-2 * low.size - 10 :]
            own, slope = self_transport(solved.weights, between, one, other)
            new = solved.value - float(tilt @ solved.weights) - own / 2
            if new >= value - _DECREASE * size:
                break
            p, value = solved.weights, new
        else:
            raise TransportNotSolved(f"debiased mixture: D still falls after {_STEPS} steps")
        ends.append((value, p))
    value, p = min(ends, key=lambda end: end[0])
    return Debiased(p, value, np.array([end[0] for end in ends]))
