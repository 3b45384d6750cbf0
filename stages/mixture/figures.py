"""What the report draws of a mixture: bound against each weight, and a map of rows and targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from stages.mixture.cuts import Cuts, lowest_point
from stages.mixture.simplex import ROUNDING, FloatArray, IntArray
from stages.mixture.space import principal_projection

_POINTS = 13
_SOURCES = 12
_ROWS = 60
_TARGETS = 200


def weight_curves(
    cuts: Cuts, sources: Sequence[str], weights: FloatArray, lower: FloatArray, upper: FloatArray
) -> pa.Table:
    r"""The least transport that is possible at each weight of a source, bounded from below.

    .. math:: L_k(t) = \min_{p :\, p_k = t}\; \max_j\, (M p)_j

    It is convex in t, and lowest within the source's near-optimal range.
    Source: LP duality; one linear programme a point.

    Args:
        cuts: over all rows.
        sources: K names.
        weights: float64 [K], which choose the sources where there are more than 12.
        lower: float64 [K].
        upper: float64 [K].

    Returns:
        Columns source, weight, bound; none for a source whose weight can't vary.

    Raises:
        TransportNotSolved: the LP solver failed.
    """
    names: list[str] = []
    places: list[float] = []
    bounds: list[float] = []
    for number in _drawn(weights):
        low = max(lower[number], 1 - (upper.sum() - upper[number]))
        high = min(upper[number], 1 - (lower.sum() - lower[number]))
        if high - low <= 10 * ROUNDING:
            continue
        for place in np.linspace(low, high, _POINTS).tolist():
            fixed_low, fixed_high = lower.copy(), upper.copy()
            fixed_low[number] = fixed_high[number] = place
            bound, _ = lowest_point(cuts, fixed_low, fixed_high)
            names.append(sources[number])
            places.append(place)
            bounds.append(bound)
    return pa.table(
        {
            "source": pa.array(names, pa.string()),
            "weight": pa.array(places, pa.float64()),
            "bound": pa.array(bounds, pa.float64()),
        }
    )


def _drawn(weights: FloatArray) -> list[int]:
    """The sources of largest weight, as many as are drawn, in their own order."""
    largest: list[int] = np.argsort(-weights, kind="stable")[:_SOURCES].tolist()
    return sorted(largest)


def map_table(
    vectors: FloatArray,
    source: IntArray,
    sources: Sequence[str],
    weights: FloatArray,
    y: FloatArray,
    b: FloatArray,
) -> pa.Table:
    """Rows and targets on their two principal directions; at most 60 rows a source, 200 targets.

    Args:
        vectors: a sample of rows, float64 [n, d], the first of each source taken.
        source: number of each row's source, int64 [n].
        sources: K names.
        weights: float64 [K], which choose the sources where there are more than 12.
        y: target points, float64 [m, d].
        b: their mass, float64 [m].

    Returns:
        Columns source (null: a target), x, y.
    """
    rows = np.concatenate([np.flatnonzero(source == k)[:_ROWS] for k in _drawn(weights)])
    points = np.unique(np.linspace(0, len(y) - 1, min(len(y), _TARGETS)).astype(np.int64))
    directions = min(2, y.shape[1])
    projection = principal_projection(vectors[rows], y, b, directions)
    placed = projection.of(np.concatenate([vectors[rows], y[points]]))
    across = placed[:, 0]
    up = placed[:, 1] if directions == 2 else np.zeros(len(placed))
    names = [sources[k] for k in source[rows].tolist()] + [None] * len(points)
    return pa.table({"source": pa.array(names, pa.string()), "x": across, "y": up})
