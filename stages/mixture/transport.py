"""Exact optimal transport between two discrete measures, with potentials fit for use as cuts."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.mixture.simplex import FloatArray, distribution, source_counts

MAX_ITERATIONS = 10**8
"""Pivots allowed: POT's default, 1e5, stops short of the optimum from 2000 x 2000 on."""

_GAP = 1e-9
_ROWS_IN_CACHE = 128


class TransportNotSolved(Exception):
    """A solver stopped without a proven optimum, so its numbers must not be used."""


@dataclass(frozen=True)
class Transport:
    """Optimal transport from a to b.

    Attributes:
        value: <C, P> of the optimal plan P.
        source_potential: f, float64 [n], equal to min_j (C_ij - g_j) for every row, massless or
            not.
        target_potential: g, float64 [m]; <a, f> + <b, g> = value.
    """

    value: float
    source_potential: FloatArray
    target_potential: FloatArray


def c_transform(cost: FloatArray, g: FloatArray) -> FloatArray:
    """Largest f that g allows: f_i = min_j (C_ij - g_j).

    Source: Kantorovich duality (Villani 2009, Optimal Transport, Definition 5.2).

    Args:
        cost: float64 [n, m].
        g: float64 [m].

    Returns:
        float64 [n].
    """
    return np.asarray((cost - g).min(axis=1), dtype=np.float64)


def c_transforms(cost: FloatArray, potentials: FloatArray) -> FloatArray:
    r"""The c-transforms of several potentials: :math:`f_{ij} = \min_l (C_{il} - g_{jl})`.

    A few rows at a time, so that they stay in the processor's cache while each potential is taken.
    Source: Kantorovich duality (Villani 2009, Optimal Transport, Definition 5.2).

    Args:
        cost: float64 [n, m].
        potentials: float64 [J, m].

    Returns:
        float64 [n, J].
    """
    lowest = np.empty((len(cost), len(potentials)))
    room = np.empty((_ROWS_IN_CACHE, cost.shape[1]))
    for start in range(0, len(cost), _ROWS_IN_CACHE):
        rows = cost[start : start + _ROWS_IN_CACHE]
        differences = room[: len(rows)]
        for j, g in enumerate(potentials):
            np.subtract(rows, g, out=differences)
            differences.min(axis=1, out=lowest[start : start + len(rows), j])
    return lowest


def mean_potential_per_source(
    f: FloatArray,
    source: npt.ArrayLike,
    n_sources: int,
    weights: npt.ArrayLike | None = None,
) -> FloatArray:
    """Mean potential per source: h_k = sum_{i in k} w_i f_i / sum_{i in k} w_i.

    With f the c-transform of optimal g, h is a subgradient of p -> OT(sum_k p_k mu_k, nu).
    Source: LP duality (Danskin's theorem on the semi-dual).

    Args:
        f: float64 [n].
        source: integers [n] in 0..n_sources-1.
        n_sources: K.
        weights: [n], non-negative; equal weights if None.

    Returns:
        float64 [K].

    Raises:
        ValueError: a source has no mass, or an argument is malformed.
    """
    s, counts = source_counts(source, n_sources)
    w = np.ones(f.size) if weights is None else distribution(weights)
    if not f.shape == w.shape == s.shape:
        raise ValueError(f"shapes differ: f {f.shape}, source {s.shape}, weights {w.shape}")
    mass = np.bincount(s, weights=w, minlength=counts.size)
    for k in np.flatnonzero(mass == 0):
        raise ValueError(f"source {k} has no rows, or only rows of weight 0")
    return np.asarray(np.bincount(s, weights=w * f, minlength=counts.size) / mass)


def transport(
    cost: FloatArray,
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    warm_start: Transport | None = None,
    *,
    max_iterations: int = MAX_ITERATIONS,
) -> Transport:
    """Solve min_{P >= 0} <C, P> with P 1 = a, P^T 1 = b, exactly.

    The plan's marginals and the duality gap <C, P> - <a, f> - <b, g> are checked, which proves the
    optimum whatever the solver says of itself.
    Source: Kantorovich's LP; network simplex of POT (Bonneel et al. 2011).

    Args:
        cost: float64 [n, m], finite.
        a: [n], non-negative, scaled to sum 1.
        b: [m], non-negative, scaled to sum 1.
        warm_start: a solution for the same cost and other weights.
        max_iterations: pivots allowed.

    Returns:
        The value and potentials.

    Raises:
        ValueError: an argument is malformed.
        TransportNotSolved: the solver did not reach a proven optimum.
    """
    # POT loads every array library that it finds, torch included: only when it is used.
    import ot

    cost = np.ascontiguousarray(cost, dtype=np.float64)
    a, b = distribution(a, "a"), distribution(b, "b")
    if cost.shape != (a.size, b.size):
        raise ValueError(f"cost has shape {cost.shape}, weights {a.size} and {b.size}")
    size = float(np.abs(cost).max())
    if not np.isfinite(size):
        raise ValueError("cost has a NaN or an infinity")
    # POT's tolerances are absolute: at costs of 1e-9 it calls a wrong plan optimal. A power of two
    # as the unit changes no digit.
    unit = 2.0 ** np.floor(np.log2(size)) if size > 0 else 1.0
    # Rows without mass have a potential and no part in the plan, which is much smaller for it.
    used = a > 0
    init = None
    if warm_start is not None:
        f, g = warm_start.source_potential, warm_start.target_potential
        if (f.size, g.size) != cost.shape:
            raise ValueError(f"warm start is for {f.size} x {g.size}, not {cost.shape}")
        init = (f[used] / unit, g / unit)
    with warnings.catch_warnings():
        # POT only warns when it gives up; its result code is turned into an exception below.
        warnings.simplefilter("ignore", UserWarning)
        plan, log = ot.emd(
            a[used], b, cost[used] / unit, numItermax=max_iterations, log=True, potentials_init=init
        )
    if log["warning"] is not None:
        raise TransportNotSolved(f"{a.size} x {b.size} transport: {log['warning']}")
    # A massless target atom must never be the nearest one: POT leaves its potential too high.
    g = np.asarray(log["v"], dtype=np.float64) * unit
    g = np.where(b > 0, g, g[b > 0].min() - size)
    f = c_transform(cost, g)
    value = float(log["cost"]) * unit
    off = max(np.abs(plan.sum(axis=1) - a[used]).max(), np.abs(plan.sum(axis=0) - b).max())
    gap = abs(value - float(a @ f + b @ g))
    if off > _GAP or gap > _GAP * size:
        raise TransportNotSolved(
            f"{a.size} x {b.size} transport: marginals off by {off:.2g}, duality gap {gap:.2g}"
        )
    return Transport(value, f, g)
