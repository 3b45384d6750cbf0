"""Values of rows by optimal transport: potentials of the targets, and what they say of any row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.mixture.cost import Metric, cost_matrix
from stages.mixture.simplex import FloatArray
from stages.mixture.transport import c_transform, transport

_TILE = 4096


@dataclass(frozen=True)
class Potentials:
    """What values are computed from.

    Attributes:
        targets: float64 [m, d].
        potentials: g of each target, float64 [m].
        level: potential of a row of value 0.
    """

    targets: FloatArray
    potentials: FloatArray
    level: float


@dataclass(frozen=True)
class Solved:
    """Potentials, the transport value that they belong to, and the values of the sample."""

    potentials: Potentials
    transport: float
    values: FloatArray


def calibrated_gradient(
    vectors: FloatArray, targets: FloatArray, mass: FloatArray, metric: Metric
) -> Solved:
    r"""Potentials by which a row's value is how fast transport falls as the pool moves to it.

    .. math:: v(x) = -\frac{d}{d\varepsilon} \mathrm{OT}\bigl((1 - \varepsilon) \mu
              + \varepsilon \delta_x, \nu\bigr) \Big|_{0^+} = \bar f - f(x), \qquad
              f(x) = \min_j (c(x, y_j) - g_j)

    f-bar is the mean of f over the pool mu. Values don't depend on the constant that potentials are
    known up to. A row of the sample has (N - 1) / N times LAVA's value, of opposite sign: here
    higher is better.

    Source: LAVA (arXiv 2305.00054), calibrated gradient; GOT-D (arXiv 2405.02774), Eq. 7, takes the
    rows where it is best.

    Args:
        vectors: a sample of the pool, each vector once, [n, d].
        targets: [m, d].
        mass: of the targets, [m].
        metric: the cost.

    Raises:
        ValueError: a row has no cost.
        TransportNotSolved: the solver did not reach a proven optimum.
    """
    cost = cost_matrix(vectors, targets, metric)
    solved = transport(cost, np.ones(len(vectors)), mass)
    f = solved.source_potential
    level = float(f.mean())
    return Solved(Potentials(targets, solved.target_potential, level), solved.value, level - f)


def selection_potentials(
    vectors: FloatArray, targets: FloatArray, mass: FloatArray, metric: Metric, share: float
) -> Solved:
    r"""Potentials by which rows of positive value are the selection nearest to the targets.

    .. math:: \min_{P \ge 0} \langle C, P \rangle \quad \text{with} \quad P \mathbf 1 \le
              \frac{1}{s n} \mathbf 1, \quad P^\top \mathbf 1 = b, \qquad
              v(x) = \tau - \min_j (c(x, y_j) - g_j)

    This is the linear relaxation of choosing s n of n rows, all of one weight, at least transport;
    tau is the price of a row's place. Only what one row among equals adds counts: where a target is
    served by enough rows its potential falls, and further rows near it lose their value. Choosing
    the best by single values, and solving again after each round, comes near to this; it is solved
    at once, as a transport problem with one more target, at no cost, for the rows that aren't
    chosen.

    Source: partial optimal transport as a balanced problem (Caffarelli and McCann 2010; Chapel,
    Alaya and Gasso 2020).

    Args:
        vectors: a sample of the pool, each vector once, [n, d].
        targets: [m, d].
        mass: of the targets, [m].
        metric: the cost.
        share: s, of the rows.

    Raises:
        ValueError: a row has no cost.
        TransportNotSolved: the solver did not reach a proven optimum.
    """
    cost = cost_matrix(vectors, targets, metric)
    n = len(vectors)
    extended = np.column_stack([cost, np.zeros(n)])
    solved = transport(extended, np.ones(n), np.append(share * mass / mass.sum(), 1.0 - share))
    *potentials, unused = solved.target_potential
    found = np.array(potentials)
    values = -unused - c_transform(cost, found)
    return Solved(Potentials(targets, found, -float(unused)), solved.value / share, values)


def row_values(vectors: FloatArray, potentials: Potentials, metric: Metric) -> FloatArray:
    r"""Values of any rows: :math:`v(x) = \tau - \min_j (c(x, y_j) - g_j)`; higher is better.

    Source: the hard c-transform (Kantorovich duality) extends potentials to rows that weren't in
    the sample.

    Args:
        vectors: [n, d].
        potentials: of a sample.
        metric: the cost that they were solved with.

    Returns:
        float64 [n], in units of the cost.

    Raises:
        ValueError: a row has no cost.
    """
    tiles = [
        c_transform(
            cost_matrix(vectors[start : start + _TILE], potentials.targets, metric),
            potentials.potentials,
        )
        for start in range(0, len(vectors), _TILE)
    ]
    return potentials.level - np.concatenate([np.zeros(0), *tiles])
