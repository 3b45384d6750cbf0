"""Least transport cost over mixtures by a level bundle method, with a certified gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import helmert
from scipy.optimize import minimize, nnls

from stages.mixture.cuts import Cuts, lowest_point
from stages.mixture.pull import Pull, stacked
from stages.mixture.simplex import (
    FloatArray,
    checked_bounds,
    distribution,
    means_per_source,
    nearest_mixture,
    row_weights,
    source_counts,
)
from stages.mixture.transport import (
    Transport,
    TransportNotSolved,
    c_transforms,
    transport,
)

_LEVEL = 0.3
_ZERO = 1e-12
_ROUNDING = 1e-14
_ABOVE = 0.1
"""How much of the way down to the level may be left: the level is a rule of thumb."""
_DENSE_SOURCES = 200
"""Sources up to which projections are solved by a dense factorisation, which is exact."""


@dataclass(frozen=True)
class BundleResult:
    """An optimal mixture, and the cuts that prove it.

    Attributes:
        weights: p, float64 [K].
        value: F(p), with the pull if there is one: an upper bound of the minimum.
        lower_bound: lower bound of the minimum.
        potentials: g that was known or found, float64 [J, m].
        cuts: h [J, K] and <b, g> [J] of every potential, without the pull.
        solves: how many transport problems were solved.
    """

    weights: FloatArray
    value: float
    lower_bound: float
    potentials: FloatArray
    cuts: Cuts
    solves: int

    @property
    def gap(self) -> float:
        """How far F(p) can be above the minimum: UB - LB, in units of the cost."""
        return self.value - self.lower_bound


def nearest_below_level(
    point: FloatArray, cuts: Cuts, level: float, lower: FloatArray, upper: FloatArray
) -> FloatArray | None:
    """Project on a level set: argmin |p - point|^2 with M p <= level, lower <= p <= upper, sum 1.

    With p = point + Z x (Z an orthonormal basis of sum = 0) it is least-distance programming,
    min |x| with G x >= h, solved by the non-negative least squares problem
    min_{u >= 0} |[G^T; h^T] u - e|; r being its residual, x = -r_{1..K-1} / r_K.
    Source: Lawson and Hanson 1974, Solving Least Squares Problems, chapter 23.

    Args:
        point: float64 [K], on the simplex.
        cuts: J cuts.
        level: height of the level set.
        lower: float64 [K].
        upper: float64 [K].

    Returns:
        float64 [K], or None where the set is empty up to rounding.
    """
    values = cuts.vertex_values() - level
    values /= float(np.abs(values).max()) or 1.0
    if point.size > _DENSE_SOURCES:
        return _nearest_by_multipliers(point, values, lower, upper)
    basis = np.asarray(helmert(point.size), dtype=np.float64).T
    sides = np.vstack([-values @ basis, basis, -basis])
    offsets = np.concatenate([values @ point, lower - point, point - upper])
    system = np.vstack([sides.T, offsets])
    wanted = np.append(np.zeros(point.size - 1), 1.0)
    try:
        duals, _ = nnls(system, wanted)
    except RuntimeError:
        return None
    residual = system @ duals - wanted
    # Mixtures are at most sqrt(2) apart, so that r_K = -1 / (1 + |x|^2) can't exceed -1/3.
    if residual[-1] > -0.25:
        return None
    return nearest_mixture(point - basis @ (residual[:-1] / residual[-1]), lower, upper)


def _nearest_by_multipliers(
    point: FloatArray, values: FloatArray, lower: FloatArray, upper: FloatArray
) -> FloatArray | None:
    r"""The same projection through its dual, which has one variable a cut: for many sources.

    .. math:: \max_{u \ge 0}\; \min_p \tfrac12 |p - x|^2 + u \cdot V p, \qquad
              p(u) = \mathrm{proj}(x - V^\top u)

    Source: Lagrange duality; the inner minimum is `nearest_mixture`.
    """

    def negated(u: FloatArray) -> tuple[float, FloatArray]:
        p = nearest_mixture(point - u @ values, lower, upper)
        above = values @ p
        return -float(0.5 * np.sum((p - point) ** 2) + u @ above), -above

    above = float((values @ point).max())
    if above <= 0:
        return point
    values = values / above
    answer = minimize(
        negated,
        np.zeros(len(values)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, None)] * len(values),
        options={"maxiter": 500, "ftol": 1e-14, "gtol": _ABOVE / 10},
    )
    p = nearest_mixture(point - np.asarray(answer.x) @ values, lower, upper)
    # Where the dual had not ended, the caller has a point that is surely below the level.
    return p if float((values @ p).max()) <= _ABOVE else None


def optimal_mixture(
    cost: FloatArray,
    source_of_row: npt.ArrayLike,
    b: npt.ArrayLike,
    lower: npt.ArrayLike,
    upper: npt.ArrayLike,
    tolerance: float = 1e-4,
    max_solves: int = 200,
    *,
    known: FloatArray | None = None,
    groups: FloatArray | None = None,
    pull: Pull | None = None,
) -> BundleResult:
    """Solve min_p F(p), F(p) = OT(sum_k p_k mu_k, nu), with lower <= p <= upper, sum p = 1.

    Each solve adds the cut F(q) >= q . h + <b, g>. LB is the least value of the highest cut, UB the
    least F seen; the next p is nearest to the best one among those where no cut exceeds
    LB + 0.3 (UB - LB). It ends when UB - LB <= tolerance * UB (or UB - LB is 1e-12 of the largest
    cost, for a minimum of 0).
    Source: LP duality; Lemarechal, Nemirovskii and Nesterov 1995, New variants of bundle methods.

    Args:
        cost: float64 [n, m].
        source_of_row: integers [n] in 0..K-1; every source has rows.
        b: [m], non-negative, scaled to sum 1.
        lower: [K].
        upper: [K].
        tolerance: relative gap to reach.
        max_solves: transport problems allowed.
        known: potentials of a sample of the same problem, float64 [J0, m]; their cuts are taken
            over these rows, so that few solves remain.
        groups: W float64 [K, G], columns summing to 1: only mixtures p = W q are allowed, with q on
            the simplex; `lower` and `upper` are then those of q, [G].
        pull: added to F, or None.

    Returns:
        The best mixture, bounds, potentials and cuts.

    Raises:
        ValueError: an argument is malformed or the bounds are infeasible.
        TransportNotSolved: a solve failed, or `max_solves` did not suffice.
    """
    low, high = checked_bounds(lower, upper)
    share = np.eye(low.size) if groups is None else groups
    target = distribution(b, "b")
    source, counts = source_counts(source_of_row, len(share))
    if not counts.all():
        raise ValueError(f"source {int(np.argmin(counts))} has no rows")
    negligible = _ZERO * float(np.abs(cost).max(initial=0.0))
    q = best = nearest_mixture(np.full(low.size, 1.0 / low.size), low, high)
    upper_bound, lower_bound = np.inf, -np.inf
    potentials = np.empty((0, target.size)) if known is None else known
    slopes = means_per_source(c_transforms(cost, potentials), source, counts)
    # Where a tangent of the pull is taken with each cut: at the natural mixture it is 0.
    points = np.repeat((share @ best if pull is None else pull.natural)[None], len(slopes), 0)

    def planes() -> Cuts:
        cuts = Cuts(slopes, potentials @ target)
        if pull is not None:
            here = (share @ best)[None]
            cuts = stacked(pull.joined(cuts, points), pull.joined(cuts, here))
        return Cuts(cuts.slopes @ share, cuts.constants)

    if len(potentials):
        lower_bound, q = lowest_point(planes(), low, high)
    last: Transport | None = None
    for solves in range(1, max_solves + 1):
        # A source of weight 1e-17 is rounding, and would bring all its rows into the plan.
        q = np.where((q < _ROUNDING) & (low <= 0), 0.0, q)
        last = transport(cost, row_weights(share @ q, source), target, last)
        slopes = np.vstack(
            [slopes, means_per_source(last.source_potential[:, None], source, counts)]
        )
        potentials = np.vstack([potentials, last.target_potential])
        points = np.vstack([points, share @ q])
        value = last.value if pull is None else last.value + pull.value(share @ q)
        if value < upper_bound:
            best, upper_bound = q, value
        cuts = planes()
        bound, lowest = lowest_point(cuts, low, high)
        lower_bound = max(lower_bound, bound)
        gap = upper_bound - lower_bound
        if gap <= max(tolerance * upper_bound, negligible):
            own = Cuts(slopes, potentials @ target)
            return BundleResult(share @ best, upper_bound, lower_bound, potentials, own, solves)
        nearest = nearest_below_level(best, cuts, lower_bound + _LEVEL * gap, low, high)
        # Where rounding hides the level set, the lowest point of the cuts is still inside it.
        q = lowest if nearest is None else nearest
    raise TransportNotSolved(
        f"best mixture after {max_solves} solves: value {upper_bound:.6g}, "
        f"lower bound {lower_bound:.6g}, wanted relative gap {tolerance:g}"
    )
