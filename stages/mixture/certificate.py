"""Bounds over all rows from potentials found on a sample, by one pass that adds up.

For a potential g chosen without looking at a row, h_k(g) is a plain mean over the rows of source k;
every g bounds the full problem from below, however it was found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from stages.mixture.cost import Metric, checked_rows, cost_matrix
from stages.mixture.cuts import HIGHS, Cuts, lowest_blend, lowest_point
from stages.mixture.on_device import TILE_ROWS, Device, lowest_on
from stages.mixture.simplex import (
    ROUNDING,
    FloatArray,
    IntArray,
    checked_bounds,
    distribution,
    least_dot,
    of_source,
    source_counts,
)
from stages.mixture.transport import TransportNotSolved, c_transforms

_EXACT_RANGES = 200
"""Sources up to which every range is that of linear programmes: two a source, each some 0.1 s."""

_HALVINGS = 40


@dataclass(frozen=True)
class CutSums:
    """Sums over rows x of source k of g_j^c(x) = min_i (c(x, y_i) - g_ji): blocks add up.

    Attributes:
        count: rows per source, int64 [K].
        total: sums, float64 [K, J].
        squares: sums of squares, float64 [K, J].
    """

    count: IntArray
    total: FloatArray
    squares: FloatArray

    def __add__(self, other: CutSums) -> CutSums:
        """Sums over the union of disjoint blocks of rows.

        Source: linearity of the sum.
        """
        return CutSums(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )

    def means(self) -> FloatArray:
        """Mean potential per cut and source: h_jk = total_kj / count_k.

        Source: LP duality (h of the cut).

        Returns:
            float64 [J, K].

        Raises:
            ValueError: a source has no rows.
        """
        for k in np.flatnonzero(self.count == 0):
            raise ValueError(f"source {k} has no rows")
        return np.asarray((self.total / self.count[:, None]).T, dtype=np.float64)

    def standard_errors(self) -> FloatArray:
        """Standard error of every mean: sqrt((squares / n - mean^2) / (n - 1)), n = count_k.

        It says how far h would move with other rows of the same sources. Infinite where n = 1.
        Source: central limit theorem for a potential fixed beforehand.

        Returns:
            float64 [J, K].

        Raises:
            ValueError: a source has no rows.
        """
        spread = np.maximum((self.squares / self.count[:, None]).T - self.means() ** 2, 0.0)
        freedom = np.where(self.count > 1, self.count - 1.0, 1.0)
        return np.where(self.count > 1, np.sqrt(spread / freedom), np.inf)


def cut_sums(
    x_block: npt.ArrayLike,
    source_block: npt.ArrayLike,
    y: npt.ArrayLike,
    potentials: FloatArray,
    metric: Metric,
    n_sources: int,
    tile_rows: int = 1024,
    penalty: FloatArray | None = None,
    device: Device = "cpu",
) -> CutSums:
    """Sum g_j^c(x) and its square per (source, cut) over one block of rows.

    Costs of a tile are computed once, in float64, for all cuts.
    Source: LP duality, g^c(x) = min_i (c(x, y_i) - g_i).

    Args:
        x_block: [n, d], float32 or float64.
        source_block: integers [n] in 0..n_sources-1.
        y: [m, d], the target rows.
        potentials: float64 [J, m].
        metric: the cost.
        n_sources: K.
        tile_rows: rows per tile; memory is tile_rows * m numbers.
        penalty: added to the cost of a source's rows, float64 [K, m]; None: nothing.
        device: cuda takes larger tiles on the GPU, in float64 too.

    Returns:
        The sums of this block; they may be of no rows at all.

    Raises:
        ValueError: an argument is malformed, or a row has no cost.
        StageError: this process sees no GPU.
    """
    x = checked_rows(x_block, "x", metric)
    source, count = source_counts(source_block, n_sources)
    if len(x) != source.size:
        raise ValueError(f"{len(x)} rows with {source.size} sources")
    if tile_rows < 1:
        raise ValueError(f"tile_rows is {tile_rows}: need at least 1")
    total = np.zeros((n_sources, len(potentials)))
    squares = np.zeros_like(total)
    points = checked_rows(y, "y", metric)
    tile_rows = tile_rows if device == "cpu" else TILE_ROWS
    for start in range(0, source.size, tile_rows):
        rows = x[start : start + tile_rows]
        members = source[start : start + tile_rows]
        added = None if penalty is None else penalty[members]
        if device == "cpu":
            tile = cost_matrix(rows, points, metric)
            lowest = c_transforms(tile if added is None else tile + added, potentials)
        else:
            lowest = lowest_on(device, rows, points, potentials, metric, added)
        members_of = of_source(members, n_sources)
        total += members_of @ lowest
        squares += members_of @ lowest**2
    return CutSums(count, total, squares)


def full_cuts(sums: CutSums, potentials: FloatArray, b: npt.ArrayLike) -> Cuts:
    """Cuts of the full problem: F(q) >= q . h_j + <b, g_j> with h_j the means over all rows.

    Source: LP duality.

    Args:
        sums: over all rows.
        potentials: float64 [J, m], those of `sums`.
        b: [m], non-negative, scaled to sum 1.

    Returns:
        J cuts.

    Raises:
        ValueError: a source has no rows, or `b` is malformed.
    """
    return Cuts(sums.means(), np.asarray(potentials @ distribution(b, "b"), dtype=np.float64))


def certified_lower_bound(
    sums: CutSums,
    potentials: FloatArray,
    b: npt.ArrayLike,
    lower: npt.ArrayLike,
    upper: npt.ArrayLike,
) -> tuple[float, FloatArray]:
    """Bound min_p F(p) over all rows: min_p max_j (p . h_j + <b, g_j>) <= min_p F(p).

    Source: LP duality.

    Args:
        sums: over all rows.
        potentials: float64 [J, m], those of `sums`.
        b: [m], non-negative, scaled to sum 1.
        lower: [K].
        upper: [K].

    Returns:
        The bound, and the float64 [K] mixture where the highest cut is lowest.

    Raises:
        ValueError: a source has no rows, or the bounds are infeasible.
        TransportNotSolved: the LP solver failed.
    """
    return lowest_point(full_cuts(sums, potentials, b), lower, upper)


def value_lower_bound_at(
    p: npt.ArrayLike, sums: CutSums, potentials: FloatArray, b: npt.ArrayLike
) -> float:
    """Bound F(p) over all rows at one mixture: max_j (p . h_j + <b, g_j>) <= F(p).

    Source: LP duality.

    Args:
        p: [K], non-negative, scaled to sum 1.
        sums: over all rows.
        potentials: float64 [J, m], those of `sums`.
        b: [m], non-negative, scaled to sum 1.

    Returns:
        The bound.

    Raises:
        ValueError: a source has no rows, or an argument is malformed.
    """
    return full_cuts(sums, potentials, b).value_at(distribution(p, "mixture weights"))


def near_optimal_ranges(
    cuts: Cuts, lower: npt.ArrayLike, upper: npt.ArrayLike, delta: float
) -> FloatArray:
    """Least and greatest p_k among near-optimal mixtures, those with M p <= (1 + delta) LB.

    Cuts lie below F, so a mixture with F(p) <= (1 + delta) LB can't be outside these ranges. Where
    there are more than 200 sources, those that the lowest point gives no more than they must have
    get a range from one blend of the cuts, which is wider.
    Source: LP duality; two linear programmes a source.

    Args:
        cuts: J cuts over K weights.
        lower: [K].
        upper: [K].
        delta: relative slack, at least 0.

    Returns:
        float64 [K, 2], least and greatest weight.

    Raises:
        ValueError: infeasible bounds or a negative delta.
        TransportNotSolved: the LP solver failed.
    """
    if not delta >= 0:
        raise ValueError(f"delta is {delta}: need at least 0")
    low, high = checked_bounds(lower, upper)
    bound, lowest, blend = lowest_blend(cuts, low, high)
    values = cuts.vertex_values()
    size = float(np.abs(values).max()) or 1.0
    # The lowest point is inside by construction, also where rounding puts it above the bound.
    level = max(bound + delta * abs(bound), cuts.value_at(lowest))
    ranges = np.column_stack([lowest, lowest])
    for k in range(low.size):
        if low.size > _EXACT_RANGES and lowest[k] <= low[k] + ROUNDING:
            ranges[k] = low[k], _greatest_of_blend(k, blend, level, low, high)
            continue
        for side, sign in enumerate((1.0, -1.0)):
            answer = linprog(
                sign * np.eye(1, low.size, k)[0],
                A_ub=values / size,
                b_ub=np.full(len(values), level / size),
                A_eq=np.ones((1, low.size)),
                b_eq=np.ones(1),
                bounds=np.column_stack([low, high]),
                method="highs",
                options=HIGHS,
            )
            if answer.status != 0:
                raise TransportNotSolved(f"range of weight {k}: {answer.message}")
            ranges[k, side] = answer.x[k]
    ranges[:, 0] = np.clip(ranges[:, 0], low, lowest)
    ranges[:, 1] = np.clip(ranges[:, 1], lowest, high)
    return ranges


def _greatest_of_blend(
    k: int, blend: FloatArray, level: float, low: FloatArray, high: FloatArray
) -> float:
    r"""The greatest weight of a source that one blend of the cuts allows.

    .. math:: \max \{ p_k : c \cdot p \le \mathrm{level},\;
              l \le p \le u,\; \textstyle\sum p = 1 \}

    The least of :math:`c \cdot p` at a given :math:`p_k` is convex in it and, from :math:`l_k` on
    for a source that the cheapest mixture leaves at :math:`l_k`, rises: a bisection finds where it
    passes the level.
    Source: the linear programme's dual with its multipliers held.
    """

    def least(weight: float) -> float:
        lowest, highest = low.copy(), high.copy()
        lowest[k] = highest[k] = weight
        return float(blend @ least_dot(blend, lowest, highest))

    inside = float(low[k])
    outside = float(min(high[k], 1.0 - (low.sum() - low[k])))
    if least(outside) <= level:
        return outside
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if least(middle) <= level else (inside, middle)
    return outside
