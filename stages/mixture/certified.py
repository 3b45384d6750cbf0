"""Transport-optimal weights from a sample, with a bound over every row of every shard.

A sample of every source is solved to optimality. The potentials of all its solves, and the mean of
those that fresh samples give at the weights found, then bound the optimum over all rows from below,
and the fresh samples estimate the value from above. While the two are too far apart the sample
grows, and starts from what the smaller one found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa

from stages.base import ShardedColumns
from stages.mixture.bundle import BundleResult, optimal_mixture
from stages.mixture.certificate import CutSums, cut_sums, full_cuts
from stages.mixture.cuts import Cuts, lowest_point
from stages.mixture.on_device import Device
from stages.mixture.pull import Pull, stacked
from stages.mixture.sample import FRESH_DRAWS, Rows, draws_of, kept_rows, lowest_rows
from stages.mixture.simplex import FloatArray, IntArray, row_weights
from stages.mixture.space import Space
from stages.mixture.transport import Transport, c_transform, transport
from stages.mixture.weightings import Neighbours, nearest_rows

_SAMPLE_ENTRIES = 32_000_000
"""Largest cost matrix of a sample: 256 MB, and some three times that while it is solved."""

_EXACT_ENTRIES = 4_000_000
"""Largest cost matrix over all rows that is solved exactly: seconds, and some 100 MB."""

_FIRST_ROWS = 8000
"""Rows of all sources in the first sample: with many sources it begins with fewer of each."""

_GROWTH = 4

Stopped = Literal["tolerance", "all rows", "max_rows_per_source", "memory"]


@dataclass(frozen=True)
class Problem:
    """What is to be mixed, and within which bounds.

    Attributes:
        columns: id, embedding of all rows.
        decisions: id, source, keep, reason of all rows.
        sources: K names, in the order of their numbers.
        y: target points as `space` gives them, float64 [m, r].
        b: their mass, float64 [m], sum 1.
        space: how vectors are compared.
        groups: W float64 [K, G]: mixtures p = W q.
        lower: of q, float64 [G].
        upper: of q, float64 [G].
        seed: of the recipe.
        pull: added to the transport that is minimised, or None.
        device: where the pass over all rows takes costs.
    """

    columns: ShardedColumns
    decisions: pa.Table
    sources: Sequence[str]
    y: FloatArray
    b: FloatArray
    space: Space
    groups: FloatArray
    lower: FloatArray
    upper: FloatArray
    seed: int
    pull: Pull | None = None
    device: Device = "cpu"

    def objective(self, value: float, weights: FloatArray) -> float:
        """The transport value of weights float64 [K], with the pull where there is one."""
        return value if self.pull is None else value + self.pull.value(weights)

    def objective_cuts(self, cuts: Cuts, weights: FloatArray) -> Cuts:
        """Cuts of the objective over q, tight near some weights float64 [K], of transport cuts."""
        if self.pull is not None:
            tangents = (weights[None], self.pull.natural[None])
            cuts = stacked(*(self.pull.joined(cuts, at) for at in tangents))
        return Cuts(cuts.slopes @ self.groups, cuts.constants)


@dataclass(frozen=True)
class Estimate:
    """The transport value of weights over all rows, seen from samples.

    Attributes:
        value: mean over the samples; of all rows where `exact`.
        half_width: half of its 95 % interval, 0 where exact or of one sample.
        source: what it was computed from.
        potentials: target potentials, float64 [draws, m].
    """

    value: float
    half_width: float
    source: Literal["all rows, exactly", "fresh rows", "the solved sample"]
    potentials: FloatArray


@dataclass(frozen=True)
class Certified:
    """Weights and what is proven of them.

    Attributes:
        bundle: the solved sample; its weights are the answer.
        sample: the rows of the solved sample, as `Problem.space` gives them.
        fresh: samples that it didn't see.
        estimate: of the value over all rows.
        potentials: g of every cut, float64 [J, m].
        sums: of every cut over all rows.
        lower_bound: of the transport over all rows and all allowed mixtures.
        objective_bound: the same of the transport with the pull.
        size: rows of each source in the solved sample.
        stopped: why the sample grew no further.
        trace: size, bound and estimate of every sample.
    """

    bundle: BundleResult
    sample: Rows
    fresh: list[Rows]
    estimate: Estimate
    potentials: FloatArray
    sums: CutSums
    lower_bound: float
    objective_bound: float
    size: int
    stopped: Stopped
    trace: list[dict[str, float]]

    def cuts(self, b: FloatArray) -> Cuts:
        """The cuts over all rows; b is the targets' mass."""
        return full_cuts(self.sums, self.potentials, b)


def relative_gap(value: float, bound: float) -> float:
    """How far a value can be above the least one, as a share of its bound."""
    return (value - bound) / max(abs(bound), 1e-12)


def first_draws(problem: Problem, size: int) -> list[Rows]:
    """The sample of `size` rows a source, and fresh ones, as the problem's space gives them."""
    lowest = lowest_rows(
        problem.columns,
        problem.decisions,
        problem.sources,
        size * (1 + FRESH_DRAWS),
        problem.seed,
    )
    return draws_of(lowest, size)


def first_size(rows_per_source: int, n_sources: int) -> int:
    """Rows of each source in the first sample: what is asked for, or fewer of many sources."""
    return min(rows_per_source, max(2, _FIRST_ROWS // n_sources))


def rows_in_memory(n_sources: int, n_targets: int) -> int:
    """Rows of each source in the largest sample whose costs are kept in memory.

    Raises:
        ValueError: two rows of each source are too many.
    """
    most = _SAMPLE_ENTRIES // (n_sources * n_targets)
    if most < 2:
        raise ValueError(
            f"{n_sources:,} sources and {n_targets:,} target points: two rows of each source make "
            f"a cost matrix above {_SAMPLE_ENTRIES:,} entries; merge sources, or lower "
            f"mixture.target_rows to {_SAMPLE_ENTRIES // (2 * n_sources):,}"
        )
    return most


def certified_mixture(
    problem: Problem,
    rows_per_source: int,
    max_rows_per_source: int,
    tolerance: float,
    bundle_tolerance: float,
) -> Certified:
    """Minimise transport over the sources' weights, with a bound that holds for all rows.

    Args:
        problem: what is to be mixed.
        rows_per_source: rows of each source in the first sample.
        max_rows_per_source: in the last one.
        tolerance: relative gap between estimate and bound to reach.
        bundle_tolerance: relative gap of each sample's own optimum.

    Raises:
        StageError: a source has no rows, or decisions are of other rows.
        TransportNotSolved: a solver stopped early.
        ValueError: the bounds are infeasible, or there are too many sources.
    """
    limit = min(max_rows_per_source, rows_in_memory(len(problem.sources), len(problem.b)))
    size = min(first_size(rows_per_source, len(problem.sources)), limit)
    known: FloatArray | None = None
    trace: list[dict[str, float]] = []
    while True:
        draws = first_draws(problem, size)
        rows = draws[0]
        bundle = optimal_mixture(
            problem.space.cost(problem.space.vectors(rows.vectors), rows.source, problem.y),
            rows.source,
            problem.b,
            problem.lower,
            problem.upper,
            bundle_tolerance,
            known=known,
            groups=problem.groups,
            pull=problem.pull,
        )
        estimate = estimated_value(problem, draws, bundle.weights, bundle.potentials[-1])
        # A mean of potentials is one with less noise than each: the dual value is concave in it.
        potentials = np.vstack([bundle.potentials, estimate.potentials.mean(axis=0)])
        sums = sums_over_all_rows(problem, potentials)
        cuts = full_cuts(sums, potentials, problem.b)
        objective = problem.objective_cuts(cuts, bundle.weights)
        bound, _ = lowest_point(objective, problem.lower, problem.upper)
        value = problem.objective(estimate.value, bundle.weights)
        trace.append({"rows_per_source": size, "lower_bound": bound, "estimate": value})
        stopped: Stopped | None = None
        if relative_gap(value, bound) <= tolerance:
            stopped = "tolerance"
        elif size >= int(sums.count.max()):
            stopped = "all rows"
        elif size >= limit:
            stopped = "max_rows_per_source" if limit == max_rows_per_source else "memory"
        if stopped is not None:
            grouped = Cuts(cuts.slopes @ problem.groups, cuts.constants)
            least, _ = lowest_point(grouped, problem.lower, problem.upper)
            return Certified(
                bundle, rows, draws[1:], estimate, potentials, sums, least, bound, size, stopped,
                trace,
            )  # fmt: skip
        known = potentials
        size = min(size * _GROWTH, limit)


def estimated_value(
    problem: Problem, draws: Sequence[Rows], weights: FloatArray, start: FloatArray
) -> Estimate:
    """What weights cost over all rows: exactly where that fits, else the mean over fresh samples.

    A sample that the weights weren't fitted to costs more than all rows on average (the value is
    convex in the sources' measures), so the estimate errs on the safe side.

    Args:
        problem: what is mixed.
        draws: the sample that the weights were fitted to, and fresh ones.
        weights: float64 [K].
        start: potential to start from, float64 [m].
    """
    if problem.decisions.num_rows * len(problem.b) <= _EXACT_ENTRIES:
        whole = lowest_rows(
            problem.columns, problem.decisions, problem.sources, problem.decisions.num_rows,
            problem.seed,
        ).rows  # fmt: skip
        solved = value_on(problem, whole, weights, start)
        return Estimate(solved.value, 0.0, "all rows, exactly", solved.target_potential[None])
    tried = draws[1:] or draws
    answers = [value_on(problem, rows, weights, start) for rows in tried]
    potentials = np.stack([answer.target_potential for answer in answers])
    mean, half = _mean_and_half_width([answer.value for answer in answers])
    return Estimate(mean, half, "fresh rows" if draws[1:] else "the solved sample", potentials)


def value_on(problem: Problem, rows: Rows, weights: FloatArray, start: FloatArray) -> Transport:
    r"""The transport of a mixture on given rows.

    .. math::
        F(p) = \mathrm{OT}\Bigl(\sum_k p_k \tfrac{1}{n_k} \sum_{i \in S_k} \delta_{x_i}, \nu\Bigr)

    Args:
        problem: what is mixed.
        rows: of every source.
        weights: p, float64 [K].
        start: potential to start from, float64 [m].

    Raises:
        TransportNotSolved: the solver stopped before the optimum.
    """
    mass = row_weights(weights, rows.source)
    used = mass > 0
    vectors = problem.space.vectors(rows.vectors[used])
    cost = problem.space.cost(vectors, rows.source[used], problem.y)
    warm = Transport(0.0, c_transform(cost, start), start)
    return transport(cost, mass[used], problem.b, warm)


def sums_over_all_rows(problem: Problem, potentials: FloatArray) -> CutSums:
    """The potentials' c-transforms over every kept row, one task a shard."""
    fn = partial(
        _shard_sums, sources=problem.sources, y=problem.y, space=problem.space,
        potentials=potentials, device=problem.device,
    )  # fmt: skip
    names = ("id", "embedding")
    total: CutSums = problem.columns.map(names, fn, CutSums.__add__, beside=problem.decisions)
    return total


def nearest_over_all_rows(problem: Problem, count: int) -> Neighbours:
    """The nearest kept rows of each target point, one task a shard."""
    fn = partial(
        _shard_neighbours, sources=problem.sources, y=problem.y, space=problem.space, count=count
    )
    names = ("id", "embedding")
    found: Neighbours = problem.columns.map(names, fn, Neighbours.__add__, beside=problem.decisions)
    return found


def _shard_sums(
    table: pa.Table,
    decisions: pa.Table,
    *,
    sources: Sequence[str],
    y: FloatArray,
    space: Space,
    potentials: FloatArray,
    device: Device,
) -> CutSums:
    vectors, source = _in_space(table, decisions, sources, y, space)
    return cut_sums(
        vectors, source, y, potentials, space.metric, len(sources), penalty=space.penalty,
        device=device,
    )  # fmt: skip


def _shard_neighbours(
    table: pa.Table,
    decisions: pa.Table,
    *,
    sources: Sequence[str],
    y: FloatArray,
    space: Space,
    count: int,
) -> Neighbours:
    vectors, source = _in_space(table, decisions, sources, y, space)
    return nearest_rows(vectors, source, y, space, count)


def _in_space(
    table: pa.Table, decisions: pa.Table, sources: Sequence[str], y: FloatArray, space: Space
) -> tuple[FloatArray, IntArray]:
    """Vectors of a shard's rows that count, as the cost sees them, and the rows' sources."""
    _, rows = kept_rows(table, decisions, sources)
    if not len(rows.source):
        return np.empty((0, y.shape[1])), rows.source
    return space.vectors(rows.vectors), rows.source


def _mean_and_half_width(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t (0 for a single value)."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, 0.0
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, float(t.ppf(0.975, len(values) - 1)) * error
