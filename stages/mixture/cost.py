"""Ground costs between embeddings, accurate where rows (nearly) coincide.

Squared distances come from one matrix product, |x|^2 + |y|^2 - 2 x.y, which loses half of the
digits near zero: sqrt of a rounding error of 1e-16 is 1e-8. Pairs that close are recomputed from
their differences, so that a row is at distance exactly 0 from itself.
"""

from __future__ import annotations

from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt

from stages.mixture.simplex import FloatArray

Metric = Literal["euclidean", "squared_euclidean", "cosine"]

_CLOSE = 1e-6
_PAIRS_AT_ONCE = 4096


def checked_rows(values: npt.ArrayLike, name: str, metric: Metric) -> FloatArray:
    """Check that every row has a cost: finite and, for the cosine x / |x|, not zero.

    Source: definition.

    Args:
        values: [n, d].
        name: what to call them in errors.
        metric: the cost.

    Returns:
        float64 [n, d], unchanged in value.

    Raises:
        ValueError: not [n, d], or a row without a cost; says which.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"{name} must be [rows, dimensions], not shape {rows.shape}")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise ValueError(f"row {bad[0]} of {name} has a NaN or an infinity")
    zero = np.flatnonzero(~rows.any(axis=1))
    if metric == "cosine" and zero.size:
        raise ValueError(f"row {zero[0]} of {name} is the zero vector: its cosine is undefined")
    return rows


def _unit(rows: FloatArray) -> FloatArray:
    # Dividing by the largest entry first keeps the square of a tiny or huge entry representable.
    rows = rows / np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float64)


def _squared_distances(x: FloatArray, y: FloatArray) -> FloatArray:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"rows of x have {x.shape[1]} dimensions, those of y {y.shape[1]}")
    # Distances don't move with the origin; the products lose fewer digits near it.
    centre = y.mean(axis=0) if len(y) else np.zeros(y.shape[1])
    x, y = x - centre, y - centre
    own, other = np.einsum("id,id->i", x, x), np.einsum("jd,jd->j", y, y)
    squared: FloatArray = x @ y.T
    squared *= -2.0
    squared += own[:, None]
    squared += other
    np.maximum(squared, 0.0, out=squared)
    # Few rows have a close pair: one minimum a row spares a mask of the whole matrix.
    close = _CLOSE * (own + other.max(initial=0.0))
    near = np.flatnonzero(squared.min(axis=1, initial=np.inf) <= close)
    rows, columns = np.nonzero(squared[near] <= close[near, None])
    for start in range(0, rows.size, _PAIRS_AT_ONCE):
        i, j = near[rows[start : start + _PAIRS_AT_ONCE]], columns[start : start + _PAIRS_AT_ONCE]
        squared[i, j] = ((x[i] - y[j]) ** 2).sum(axis=1)
    return squared


def squared_euclidean_cost(x: npt.ArrayLike, y: npt.ArrayLike) -> FloatArray:
    """Squared Euclidean cost C_ij = |x_i - y_j|^2.

    Source: ground cost of the 2-Wasserstein distance.

    Args:
        x: [n, d].
        y: [m, d].

    Returns:
        float64 [n, m], at least 0.

    Raises:
        ValueError: shapes don't fit, or a row has a NaN or an infinity.
    """
    return _squared_distances(
        checked_rows(x, "x", "squared_euclidean"), checked_rows(y, "y", "squared_euclidean")
    )


def euclidean_cost(x: npt.ArrayLike, y: npt.ArrayLike) -> FloatArray:
    """Euclidean cost C_ij = |x_i - y_j|.

    Source: ground cost of the 1-Wasserstein distance.

    Args:
        x: [n, d].
        y: [m, d].

    Returns:
        float64 [n, m], at least 0.

    Raises:
        ValueError: shapes don't fit, or a row has a NaN or an infinity.
    """
    squared = squared_euclidean_cost(x, y)
    return np.sqrt(squared, out=squared)


def cosine_cost(x: npt.ArrayLike, y: npt.ArrayLike) -> FloatArray:
    """Cosine cost C_ij = 1 - cos(x_i, y_j) = |x_i / |x_i| - y_j / |y_j||^2 / 2.

    Source: expansion of the squared norm for unit vectors.

    Args:
        x: [n, d].
        y: [m, d].

    Returns:
        float64 [n, m], in [0, 2] up to rounding.

    Raises:
        ValueError: shapes don't fit, or a row has a NaN or an infinity or is zero.
    """
    squared = _squared_distances(
        _unit(checked_rows(x, "x", "cosine")), _unit(checked_rows(y, "y", "cosine"))
    )
    squared *= 0.5
    return squared


def cost_matrix(x: npt.ArrayLike, y: npt.ArrayLike, metric: Metric) -> FloatArray:
    """Cost between every row of x and every row of y.

    Source: `euclidean_cost`, `squared_euclidean_cost` and `cosine_cost`.

    Args:
        x: [n, d].
        y: [m, d].
        metric: which cost.

    Returns:
        float64 [n, m], at least 0.

    Raises:
        ValueError: as the cost named, or an unknown metric.
    """
    match metric:
        case "euclidean":
            return euclidean_cost(x, y)
        case "squared_euclidean":
            return squared_euclidean_cost(x, y)
        case "cosine":
            return cosine_cost(x, y)
        case unknown:
            if isinstance(unknown, str):
                raise ValueError(f"unknown metric {unknown!r}")
            assert_never(unknown)
