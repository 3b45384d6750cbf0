"""Mixture and plan in one linear programme: the reference answer for small problems."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import linprog

from stages.mixture.cuts import HIGHS
from stages.mixture.simplex import (
    FloatArray,
    Mixture,
    checked_bounds,
    distribution,
    nearest_mixture,
    source_counts,
)
from stages.mixture.transport import TransportNotSolved


def optimal_mixture_by_lp(
    cost: FloatArray,
    source_of_row: npt.ArrayLike,
    b: npt.ArrayLike,
    lower: npt.ArrayLike,
    upper: npt.ArrayLike,
    *,
    max_plan_entries: int = 1_000_000,
) -> Mixture:
    """Solve min_{P >= 0, p} <C, P> with P 1 = A p, P^T 1 = b, sum p = 1, lower <= p <= upper.

    Source: LP duality (grouped semi-relaxed optimal transport); it equals
    max_g [<b, g> + min_p p . h(g)].

    Args:
        cost: float64 [n, m].
        source_of_row: integers [n] in 0..K-1; every source has rows.
        b: [m], non-negative, scaled to sum 1.
        lower: [K].
        upper: [K].
        max_plan_entries: largest n * m accepted.

    Returns:
        An optimal mixture and its value.

    Raises:
        ValueError: an argument is malformed, the bounds are infeasible, or the problem too large.
        TransportNotSolved: the LP solver failed.
    """
    low, high = checked_bounds(lower, upper)
    target = distribution(b, "b")
    source, counts = source_counts(source_of_row, low.size)
    n, m, n_sources = source.size, target.size, low.size
    if cost.shape != (n, m):
        raise ValueError(f"cost has shape {cost.shape}, weights {n} and {m}")
    if not counts.all():
        raise ValueError(f"source {int(np.argmin(counts))} has no rows")
    if n * m > max_plan_entries:
        raise ValueError(
            f"a plan of {n} x {m} entries is above the limit of {max_plan_entries}: "
            "use the bundle method"
        )
    share = sparse.csr_array((1.0 / counts[source], (np.arange(n), source)), (n, n_sources))
    rows = sparse.kron(sparse.eye_array(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye_array(m))
    constraints = sparse.block_array(
        [[rows, -share], [columns, None], [None, sparse.csr_array(np.ones((1, n_sources)))]]
    )
    size = float(np.abs(cost).max()) or 1.0
    answer = linprog(
        np.concatenate([cost.ravel() / size, np.zeros(n_sources)]),
        A_eq=constraints.tocsr(),
        b_eq=np.concatenate([np.zeros(n), target, [1.0]]),
        bounds=np.column_stack(
            [
                np.concatenate([np.zeros(n * m), low]),
                np.concatenate([np.full(n * m, np.inf), high]),
            ]
        ),
        method="highs",
        options=HIGHS,
    )
    if answer.status != 0:
        raise TransportNotSolved(f"joint LP of {n} x {m} and {n_sources} sources: {answer.message}")
    weights = nearest_mixture(np.asarray(answer.x[n * m :], dtype=np.float64), low, high)
    return Mixture(weights, float(answer.fun) * size)
