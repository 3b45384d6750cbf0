"""Weights of sources: points of the simplex within per-source bounds.

Notation of this package: source k has n_k rows, mu_k is the uniform measure on them, and a mixture
p (p >= 0, sum p = 1) stands for the measure sum_k p_k mu_k. The target is nu = sum_j b_j delta_yj.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

ROUNDING = 1e-12
"""Slack on sums of weights: ten caps of 0.1 add up to 1 - 1e-16 and are feasible."""


@dataclass(frozen=True)
class Mixture:
    """A mixture and what it costs.

    Attributes:
        weights: float64 [K], on the simplex.
        value: objective at `weights`.
    """

    weights: FloatArray
    value: float


def distribution(weights: npt.ArrayLike, name: str = "weights") -> FloatArray:
    """Scale weights to sum 1: w / sum(w).

    Source: definition of a probability vector.

    Args:
        weights: [n], non-negative.
        name: what to call them in errors.

    Returns:
        float64 [n].

    Raises:
        ValueError: not one-dimensional, an entry negative or not finite, or no mass at all.
    """
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {w.shape}")
    bad = np.flatnonzero(~(np.isfinite(w) & (w >= 0)))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] is {w[bad[0]]}: need finite numbers, at least 0")
    total = float(w.sum())
    if not 0 < total < np.inf:
        raise ValueError(f"{name} sum to {total}: there is no mass to distribute")
    return w / total


def checked_bounds(lower: npt.ArrayLike, upper: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Check that {p : lower <= p <= upper, sum p = 1} has a point; upper bounds are cut at 1.

    Nonempty iff 0 <= lower_k <= upper_k for all k and sum lower <= 1 <= sum upper.
    Source: intermediate value theorem along the segment from lower to upper.

    Args:
        lower: [K].
        upper: [K], may be infinite.

    Returns:
        Both as float64 [K].

    Raises:
        ValueError: shapes differ or no mixture satisfies the bounds; names the bounds.
    """
    low = np.asarray(lower, dtype=np.float64)
    high = np.asarray(upper, dtype=np.float64)
    if low.ndim != 1 or low.shape != high.shape or not low.size:
        raise ValueError(f"bounds need one shape [K], not {low.shape} and {high.shape}")
    for k in np.flatnonzero(~((low >= 0) & (low <= high))):
        raise ValueError(f"bounds of source {k}: need 0 <= {low[k]} <= {high[k]}")
    high = np.minimum(high, 1.0)
    if low.sum() > 1 + ROUNDING:
        raise ValueError(f"lower bounds {low.tolist()} sum to {low.sum():.6g}, above 1")
    if high.sum() < 1 - ROUNDING:
        raise ValueError(f"upper bounds {high.tolist()} sum to {high.sum():.6g}, below 1")
    return low, high


def nearest_mixture(point: FloatArray, lower: FloatArray, upper: FloatArray) -> FloatArray:
    """Euclidean projection on the bounded simplex: clip(point + tau, lower, upper), sum = 1.

    The sum is piecewise linear and non-decreasing in tau with kinks at lower - point and
    upper - point, so tau comes from one interpolation.
    Source: Karush-Kuhn-Tucker conditions of min |p - point|^2.

    Args:
        point: float64 [K].
        lower: float64 [K], feasible with `upper` (see `checked_bounds`).
        upper: float64 [K].

    Returns:
        float64 [K].
    """
    kinks = np.concatenate([lower - point, upper - point])
    order = np.argsort(kinks, kind="stable")
    kinks = kinks[order]
    slopes = np.cumsum(np.repeat([1.0, -1.0], point.size)[order])
    sums = lower.sum() + np.append(0.0, np.cumsum(slopes[:-1] * np.diff(kinks)))
    tau = float(np.interp(1.0, sums, kinks))
    return np.asarray(np.clip(point + tau, lower, upper), dtype=np.float64)


def least_dot(slope: FloatArray, lower: FloatArray, upper: FloatArray) -> FloatArray:
    """Minimise p . slope over the bounded simplex: fill the cheapest sources to their caps first.

    Source: exchange argument of the fractional knapsack (Dantzig 1957).

    Args:
        slope: float64 [K].
        lower: float64 [K], feasible with `upper`.
        upper: float64 [K].

    Returns:
        float64 [K], a minimiser.
    """
    order = np.argsort(slope, kind="stable")
    room = np.cumsum((upper - lower)[order])
    filled = np.minimum(room, max(0.0, 1.0 - float(lower.sum())))
    p = lower.copy()
    p[order] += np.diff(filled, prepend=0.0)
    return p


def source_counts(source: npt.ArrayLike, n_sources: int) -> tuple[IntArray, IntArray]:
    """Check the source of every row and count n_k = #{i : source_i = k}.

    Source: definition.

    Args:
        source: integers [n] in 0..n_sources-1.
        n_sources: K.

    Returns:
        source as int64 [n], counts as int64 [K].

    Raises:
        ValueError: not integers [n], or one out of range.
    """
    s = np.asarray(source)
    if s.ndim != 1 or (s.size and not np.issubdtype(s.dtype, np.integer)):
        raise ValueError(f"sources of rows must be integers [n], not {s.dtype} {s.shape}")
    s = s.astype(np.int64)
    bad = np.flatnonzero((s < 0) | (s >= n_sources))
    if bad.size:
        raise ValueError(f"row {bad[0]} has source {s[bad[0]]}, outside 0..{n_sources - 1}")
    return s, np.bincount(s, minlength=n_sources)


def row_weights(p: npt.ArrayLike, source: npt.ArrayLike) -> FloatArray:
    """Weights of rows in the mixture: a_i = p_k / n_k with k = source_i, that is a = A p.

    Source: definition of sum_k p_k mu_k.

    Args:
        p: [K], non-negative, scaled to sum 1.
        source: integers [n].

    Returns:
        float64 [n], sum 1.

    Raises:
        ValueError: a source with p_k > 0 has no rows, or an argument is malformed.
    """
    weights = distribution(p, "mixture weights")
    s, counts = source_counts(source, weights.size)
    for k in np.flatnonzero((counts == 0) & (weights > 0)):
        raise ValueError(f"source {k} has weight {weights[k]} and no rows")
    return distribution((weights / np.maximum(counts, 1))[s], "row weights")


def means_per_source(values: FloatArray, source: IntArray, counts: IntArray) -> FloatArray:
    r"""Means over the rows of each source: :math:`\frac{1}{n_k} \sum_{i \in S_k} v_{ij}`.

    Source: definition of the expectation under mu_k.

    Args:
        values: float64 [n, J].
        source: int64 [n].
        counts: int64 [K], n_k, none 0.

    Returns:
        float64 [J, K].
    """
    return np.asarray((of_source(source, counts.size) @ values / counts[:, None]).T)


def of_source(source: IntArray, n_sources: int) -> csr_array:
    """Which rows a source has: [K, n], 1 where row i is of source k; times values it sums them."""
    places = (source, np.arange(source.size))
    return csr_array((np.ones(source.size), places), (n_sources, source.size))
