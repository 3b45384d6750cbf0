"""Cutting planes: affine functions of the mixture that lie below the transport cost everywhere.

For any potential g, F(q) = OT(sum_k q_k mu_k, nu) >= sum_k q_k h_k(g) + <b, g> for all q, where
h_k(g) is the mean over source k of min_j (c(x, y_j) - g_j). Optimality of g is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from stages.mixture.simplex import FloatArray, checked_bounds, least_dot, nearest_mixture
from stages.mixture.transport import TransportNotSolved

HIGHS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


@dataclass(frozen=True)
class Cuts:
    """J cuts of a function of K weights.

    Attributes:
        slopes: h, float64 [J, K].
        constants: <b, g>, float64 [J].
    """

    slopes: FloatArray
    constants: FloatArray

    def vertex_values(self) -> FloatArray:
        """Values of every cut at every pure source: M_jk = h_jk + c_j, so that cut j is (M p)_j.

        Source: sum p = 1. Constant shifts of g between h and c cancel here.

        Returns:
            float64 [J, K].
        """
        return self.slopes + self.constants[:, None]

    def value_at(self, p: FloatArray) -> float:
        """Highest cut at p: max_j (h_j . p + c_j), a lower bound of F(p).

        Source: LP duality.

        Args:
            p: float64 [K], on the simplex.

        Returns:
            The bound.
        """
        return float((self.vertex_values() @ p).max())


def lowest_point(
    cuts: Cuts, lower: npt.ArrayLike, upper: npt.ArrayLike
) -> tuple[float, FloatArray]:
    """Minimise the highest cut: min_p max_j (M p)_j, the master LP, with lower <= p <= upper.

    The bound returned is min_p (lambda^T M) p for the LP's multipliers lambda: valid for any lambda
    on the simplex, hence whatever the tolerance of the LP solver.
    Source: LP duality; Kelley 1960, The cutting-plane method.

    Args:
        cuts: J cuts over K weights.
        lower: [K].
        upper: [K].

    Returns:
        A lower bound of min_p F(p), and a float64 [K] minimiser of the highest cut.

    Raises:
        ValueError: infeasible bounds.
        TransportNotSolved: the LP solver failed.
    """
    bound, point, _ = lowest_blend(cuts, lower, upper)
    return bound, point


def lowest_blend(
    cuts: Cuts, lower: npt.ArrayLike, upper: npt.ArrayLike
) -> tuple[float, FloatArray, FloatArray]:
    r"""As `lowest_point`, with the blend of cuts that proves the bound.

    .. math:: c = M^\top \lambda, \qquad c \cdot p \le \max_j (M p)_j
              \;\text{for all}\; p, \qquad \mathrm{LB} = \min_p c \cdot p

    Source: LP duality.

    Returns:
        The bound, the minimiser float64 [K], and c float64 [K].

    Raises:
        ValueError: infeasible bounds.
        TransportNotSolved: the LP solver failed.
    """
    low, high = checked_bounds(lower, upper)
    values = cuts.vertex_values()
    n_cuts, n_sources = values.shape
    size = float(np.abs(values).max()) or 1.0
    answer = linprog(
        np.append(np.zeros(n_sources), 1.0),
        A_ub=np.hstack([values / size, -np.ones((n_cuts, 1))]),
        b_ub=np.zeros(n_cuts),
        A_eq=np.append(np.ones(n_sources), 0.0)[None, :],
        b_eq=np.ones(1),
        bounds=[*zip(low, high, strict=True), (None, None)],
        method="highs",
        options=HIGHS,
    )
    if answer.status != 0:
        raise TransportNotSolved(f"master LP over {n_cuts} cuts: {answer.message}")
    multipliers = np.maximum(-np.asarray(answer.ineqlin.marginals, dtype=np.float64), 0.0)
    blended = multipliers @ values / multipliers.sum()
    bound = float(blended @ least_dot(blended, low, high))
    point = nearest_mixture(np.asarray(answer.x[:n_sources], dtype=np.float64), low, high)
    return bound, point, blended
