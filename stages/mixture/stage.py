"""The mixture stage: weights of sources that bring what is emitted near the targets, certified.

Whatever the weights are chosen by, what they cost in transport over all rows is estimated, and a
bound that no weights can go below is proven (`certified`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from stages.base import Columns, Outcome, ShardedColumns
from stages.errors import StageError
from stages.mixture.certificate import near_optimal_ranges
from stages.mixture.certified import (
    Certified,
    Problem,
    certified_mixture,
    estimated_value,
    first_draws,
    first_size,
    nearest_over_all_rows,
    relative_gap,
    rows_in_memory,
)
from stages.mixture.cuts import lowest_point
from stages.mixture.debiased import debiased_mixture, halves
from stages.mixture.energy import EnergySums, energy_mixture, energy_ranges, energy_sums
from stages.mixture.figures import map_table, weight_curves
from stages.mixture.on_device import Device
from stages.mixture.problem import TargetCloud, target_cloud, weight_bounds
from stages.mixture.pull import Pull
from stages.mixture.sample import Rows, lowest_rows
from stages.mixture.settings import MixtureSettings
from stages.mixture.simplex import FloatArray, nearest_mixture
from stages.mixture.space import Projection, Space, principal_projection, task_penalty
from stages.mixture.transport import TransportNotSolved
from stages.mixture.weightings import (
    chameleon_weights,
    kept_in_proportion,
    neighbour_shares,
    proportional_weights,
    uniform_weights,
)
from stages.storage import Store

_ENERGY_ROWS = 6400
"""Rows in the energy distance's sample, whose pairs are all taken."""

_LEAST_ENERGY_ROWS = 8
"""Rows of each source in it, however many sources there are."""

_ENERGY_SOURCES = 2500
"""Sources up to which the energy mixture is solved: its means are a matrix for each block."""

_FEW_SOURCES = 200
"""Sources up to which the debiased mixture is solved, and energy set beside other methods."""

_HALF_ROWS = 2000
"""Rows in each half of a debiased problem, which are transported onto each other."""

_BLOCKS = 8
_BLOCKS_OF_MANY = 4
"""Blocks of the energy distance's rows where there are more than 1,000 sources."""

_OUTSIDE = 0.02
"""How far from the energy mixture's range a weight is when it counts as outside."""


@dataclass(frozen=True)
class Supply:
    """What the emission may use.

    Attributes:
        budget: how much is emitted, None where there is no budget.
        unit: of the budget.
        repeats: how often a row of a source may be used.
        anchors: names of sources whose rows count and are never emitted.
    """

    budget: float | None
    unit: Literal["rows", "tokens"]
    repeats: Mapping[str, float]
    anchors: frozenset[str]


@dataclass(frozen=True)
class Chosen:
    """Weights, float64 [K]; what is uncertain about them, float64 [K, 2] or None; more to say."""

    weights: FloatArray
    ranges: FloatArray | None
    notes: Mapping[str, Any]


class MixtureStage:
    r"""Weights of sources, by :math:`\mathrm{OT}(\sum_k p_k \mu_k, \nu)` or another measure."""

    name = "mixture"
    version = 3

    def __init__(
        self, settings: MixtureSettings, supply: Supply, seed: int, device: Device = "cpu"
    ) -> None:
        """Keep the settings, what may be emitted, the seed, and where passes take costs."""
        self.settings = settings
        self._supply = supply
        self._seed = seed
        self._device = device

    def columns(self) -> Columns:
        """Ids and vectors; the decisions are read from selection."""
        return Columns(("id", "embedding"), pa.schema([]))

    def decide(
        self, columns: ShardedColumns, targets: ShardedColumns, artifacts: Mapping[str, Store]
    ) -> Outcome:
        """Weights, bounds and ranges.

        Raises:
            StageError: bounds can't be met, a kept source has no vectors, or a solver failed.
        """
        decisions = artifacts["selection"].read_table("decisions.parquet")
        available = _available(decisions, self._supply)
        sources = sorted(available)
        cloud = target_cloud(
            targets,
            self.settings.target_rows,
            self._seed,
            self.settings.task_weights,
            by_task=bool(self.settings.serves),
        )
        anchored = {name: available[name] for name in sources if name in self._supply.anchors}
        pool = {name: amount for name, amount in available.items() if name not in anchored}
        lower, upper = weight_bounds(
            sources,
            pool,
            self._supply.budget,
            self._supply.repeats,
            self.settings.floors,
            self.settings.caps,
            anchored,
        )
        self._check_names(sources, cloud)
        self._check_size(len(sources), len(cloud.mass))
        try:
            problem, projection = self._problem(columns, decisions, sources, cloud, lower, upper)
            if self.settings.kl:
                natural = _natural_mixture(sources, pool, lower)
                problem = replace(problem, pull=Pull(self.settings.kl, natural))
            report, figures = self._solved(problem, lower, upper, available, anchored)
        except (TransportNotSolved, ValueError) as error:
            raise StageError(f"the mixture can't be solved: {error}", stage=self.name) from error
        report |= {
            "anchors": {name: anchored[name] for name in sorted(anchored)},
            "available": available,
            "unit": self._supply.unit,
            "budget": self._supply.budget,
        }
        tables = {"weights.parquet": _weights_table(report), **figures}
        if projection is not None:
            report["pca_variance"] = projection.share
            tables["projection.parquet"] = projection.table()
        return Outcome(tables, report)

    def _check_names(self, sources: list[str], cloud: TargetCloud) -> None:
        """Every task that a source serves is a target's, and every kept source is there."""
        for name, tasks in self.settings.serves.items():
            unknown = sorted(set(tasks) - set(cloud.tasks))
            if unknown:
                raise StageError(
                    f"mixture.serves.{name} names the task {unknown[0]!r}; the targets have "
                    f"{', '.join(sorted(set(cloud.tasks)))}",
                    stage=self.name,
                )
        gone = sorted(set(self.settings.keep) - set(sources))
        if gone:
            raise StageError(
                f"mixture.keep names the source {gone[0]!r}, of which no row is kept; take it out",
                stage=self.name,
            )

    def _check_size(self, n_sources: int, n_targets: int) -> None:
        """The method asked for can do with so many sources."""
        limits = {"energy": _ENERGY_SOURCES, "debiased": _FEW_SOURCES}
        most = limits.get(self.settings.method)
        if most is not None and n_sources > most:
            other = "energy or transport" if n_sources <= _ENERGY_SOURCES else "transport"
            raise StageError(
                f"method: {self.settings.method} takes at most {most:,} sources, and there are "
                f"{n_sources:,}; set method: {other}, or merge sources",
                stage=self.name,
            )
        try:
            rows_in_memory(n_sources, n_targets)
        except ValueError as error:
            raise StageError(str(error), stage=self.name) from error

    def _problem(
        self,
        columns: ShardedColumns,
        decisions: pa.Table,
        sources: list[str],
        cloud: TargetCloud,
        lower: FloatArray,
        upper: FloatArray,
    ) -> tuple[Problem, Projection | None]:
        settings = self.settings
        penalty = task_penalty(sources, cloud.tasks, settings.serves, settings.task_cost)
        groups = np.eye(len(sources))
        if settings.keep:
            groups, lower, upper = kept_in_proportion(sources, settings.keep, lower, upper)
        problem = Problem(
            columns,
            decisions.select(["id", "source", "keep", "reason"]),
            sources,
            cloud.vectors,
            cloud.mass,
            Space(settings.metric, None, penalty),
            groups,
            lower,
            upper,
            self._seed,
            device=self._device,
        )
        if settings.pca is None:
            return problem, None
        size = first_size(settings.rows_per_source, len(sources))
        sample = first_draws(problem, size)[0]
        projection = principal_projection(sample.vectors, cloud.vectors, cloud.mass, settings.pca)
        space = Space(settings.metric, projection, penalty)
        return replace(problem, space=space, y=space.vectors(cloud.vectors)), projection

    def _solved(
        self,
        problem: Problem,
        lower: FloatArray,
        upper: FloatArray,
        available: Mapping[str, float],
        anchored: Mapping[str, float],
    ) -> tuple[dict[str, Any], dict[str, pa.Table]]:
        """The report, weights as shares of what is emitted, and what to draw."""
        settings = self.settings
        certified = certified_mixture(
            problem,
            settings.rows_per_source,
            settings.max_rows_per_source,
            settings.tolerance,
            settings.bundle_tolerance,
        )
        cuts = certified.cuts(problem.b)
        near = problem.groups @ near_optimal_ranges(
            problem.objective_cuts(cuts, certified.bundle.weights),
            problem.lower, problem.upper, settings.range_slack,
        )  # fmt: skip
        energy = self._energy_sums(problem)
        by_energy = energy_near = None
        if energy is not None:
            penalty = _mean_penalty(problem)
            by_energy = energy_mixture(energy, lower, upper, penalty).weights
            if len(energy.mass) > 1:
                energy_near = energy_ranges(energy, by_energy, lower, upper, penalty)
        chosen = self._chosen(
            problem, certified, near, by_energy, energy_near, lower, upper, available, anchored
        )
        estimate = certified.estimate
        if settings.method != "transport":
            draws = [certified.sample, *certified.fresh]
            start = certified.bundle.potentials[-1]
            estimate = estimated_value(problem, draws, chosen.weights, start)
        gap = relative_gap(estimate.value, certified.lower_bound)
        emitted = 1.0 - sum(
            float(upper[place]) for place, name in enumerate(problem.sources) if name in anchored
        )
        shares = _Shares(problem.sources, frozenset(anchored), emitted)
        report: dict[str, Any] = {
            "method": settings.method,
            "weights": shares.of(chosen.weights),
            "ranges": shares.of(chosen.ranges),
            "caps": shares.of(upper),
            "lower_bound": certified.lower_bound,
            "upper_estimate": estimate.value,
            "upper_interval": [
                estimate.value - estimate.half_width,
                estimate.value + estimate.half_width,
            ],
            "upper_from": estimate.source,
            "gap": gap,
            "tolerance": settings.tolerance,
            "certified": bool(gap <= settings.tolerance),
            "value_sample": certified.bundle.value,
            "sample_lower_bound": certified.bundle.lower_bound,
            "transport_weights": shares.of(certified.bundle.weights),
            "transport_ranges": shares.of(near),
            "transport_estimate": certified.estimate.value,
            "energy_weights": shares.of(by_energy),
            "energy_ranges": shares.of(energy_near),
            "rows_per_source": certified.size,
            "rows": dict(zip(problem.sources, certified.sums.count.tolist(), strict=True)),
            "solves": certified.bundle.solves,
            "target_points": len(problem.b),
            "stopped": certified.stopped,
            "trace": certified.trace,
            **chosen.notes,
        }
        if problem.pull is not None:
            objective = problem.objective(estimate.value, chosen.weights)
            report |= {
                "kl": settings.kl,
                "divergence": problem.pull.divergence(chosen.weights),
                "objective_estimate": objective,
                "objective_lower_bound": certified.objective_bound,
                "objective_gap": relative_gap(objective, certified.objective_bound),
            }
            report["certified"] = bool(report["objective_gap"] <= settings.tolerance)
        if energy is not None and by_energy is not None:
            report |= _shrinkage(energy, certified.bundle.weights, by_energy, energy_near)
        if settings.keep:
            free, _ = lowest_point(cuts, lower, upper)
            report["free_lower_bound"] = free
            report["loss_of_keeping"] = relative_gap(estimate.value, free)
        curves = weight_curves(cuts, problem.sources, certified.bundle.weights, lower, upper)
        sample = certified.sample
        vectors = problem.space.vectors(sample.vectors)
        points = map_table(
            vectors, sample.source, problem.sources, chosen.weights, problem.y, problem.b
        )
        return report, {"curves.parquet": curves, "map.parquet": points}

    def _chosen(
        self,
        problem: Problem,
        certified: Certified,
        near: FloatArray,
        by_energy: FloatArray | None,
        energy_near: FloatArray | None,
        lower: FloatArray,
        upper: FloatArray,
        available: Mapping[str, float],
        anchored: Mapping[str, float],
    ) -> Chosen:
        """The weights by the method asked for, within the bounds."""
        settings = self.settings
        if settings.method == "transport":
            return Chosen(certified.bundle.weights, near, {})
        if settings.method == "energy" and by_energy is not None:
            return Chosen(by_energy, energy_near, {})
        if settings.method == "debiased":
            return self._debiased(problem, certified, by_energy, lower, upper)
        sample = certified.sample
        n_sources = len(problem.sources)
        if settings.method == "nearest":
            found = nearest_over_all_rows(problem, settings.neighbours)
            shares = neighbour_shares(found, problem.b, n_sources)
        elif settings.method == "chameleon":
            shares = chameleon_weights(
                problem.space.vectors(sample.vectors),
                sample.source,
                np.bincount(sample.source, minlength=n_sources),
                settings.chameleon_ridge,
                settings.chameleon_temperature,
            )
        elif settings.method == "uniform":
            shares = uniform_weights(n_sources)
        else:
            shares = proportional_weights([available[name] for name in problem.sources])
        # Anchors' weights are fixed: the shares are of the others, and fill what is left.
        free = np.array([name not in anchored for name in problem.sources])
        if not shares[free].sum():
            raise ValueError(f"method: {settings.method} gives only anchors a share")
        wanted = np.where(free, shares / shares[free].sum() * (1 - lower[~free].sum()), lower)
        return Chosen(nearest_mixture(wanted, lower, upper), None, {})

    def _debiased(
        self,
        problem: Problem,
        certified: Certified,
        by_energy: FloatArray | None,
        lower: FloatArray,
        upper: FloatArray,
    ) -> Chosen:
        """The mean over both orders of the halves, of the sample and of a fresh one."""
        n_sources = len(problem.sources)
        uniform = nearest_mixture(np.full(n_sources, 1 / n_sources), lower, upper)
        starts = [uniform, certified.bundle.weights]
        if by_energy is not None:
            starts.append(by_energy)
        most = max(2, 2 * _HALF_ROWS // n_sources)
        found = []
        for rows in [certified.sample, *certified.fresh[:1]]:
            rows = _first_of_each(rows, most, n_sources)
            one, other = halves(problem.space.vectors(rows.vectors), rows.source, n_sources)
            for sample in ((one, other), (other, one)):
                found.append(
                    debiased_mixture(
                        sample,
                        problem.y,
                        problem.b,
                        lower,
                        upper,
                        problem.space,
                        starts,
                        self.settings.bundle_tolerance,
                    ).weights
                )
        weights = np.stack(found)
        ranges = np.column_stack([weights.min(axis=0), weights.max(axis=0)])
        return Chosen(weights.mean(axis=0), ranges, {"debiased_samples": len(found)})

    def _energy_sums(self, problem: Problem) -> EnergySums | None:
        """Sums over a sample; None beside another method where there are many sources."""
        n_sources = len(problem.sources)
        if n_sources > _FEW_SOURCES and self.settings.method != "energy":
            return None
        most = max(_LEAST_ENERGY_ROWS, _ENERGY_ROWS // n_sources)
        rows = lowest_rows(
            problem.columns, problem.decisions, problem.sources, most, problem.seed
        ).rows
        blocks = _BLOCKS if n_sources <= 1000 else _BLOCKS_OF_MANY
        if len(problem.b) < 4:
            blocks = 1
        return energy_sums(
            problem.space.vectors(rows.vectors),
            rows.source,
            problem.y,
            problem.b,
            problem.space.metric,
            n_sources,
            blocks,
        )


@dataclass(frozen=True)
class _Shares:
    """Arrays over sources as shares of what is emitted, by name, without anchors."""

    sources: Any
    anchors: frozenset[str]
    emitted: float

    def of(self, values: FloatArray | None) -> dict[str, Any] | None:
        if values is None:
            return None
        return {
            name: (np.asarray(value) / self.emitted).tolist()
            for name, value in zip(self.sources, values, strict=True)
            if name not in self.anchors
        }


def _natural_mixture(
    sources: Sequence[str], pool: Mapping[str, float], lower: FloatArray
) -> FloatArray:
    r"""Shares of what there is, beside the anchors' fixed weights.

    .. math:: p^0_k = (1 - \alpha) \frac{n_k}{\sum_{l \in \mathrm{pool}} n_l},
              \qquad \alpha = \sum_{\mathrm{anchors}} p_k

    Source: the natural mixture.

    Args:
        sources: K names.
        pool: rows or tokens of every source that is no anchor, each above 0.
        lower: least weights, those of anchors fixed, float64 [K].
    """
    free = np.array([name in pool for name in sources])
    natural = lower.copy()
    natural[free] = proportional_weights([pool[name] for name in sources if name in pool])
    natural[free] *= 1 - lower[~free].sum()
    return natural


def _shrinkage(
    energy: EnergySums, transport: FloatArray, by_energy: FloatArray, ranges: FloatArray | None
) -> dict[str, Any]:
    """Whether transport prefers narrow sources: see docs/mixture.md for the rule."""
    spread = np.diagonal(energy.statistics()[1])
    spreads = {"transport": float(transport @ spread), "energy": float(by_energy @ spread)}
    if ranges is None:
        return {"spread": spreads, "shrinkage": None}
    outside = (transport < ranges[:, 0] - _OUTSIDE) | (transport > ranges[:, 1] + _OUTSIDE)
    narrower = spreads["transport"] < spreads["energy"]
    return {"spread": spreads, "shrinkage": bool(outside.any()) and narrower}


def _mean_penalty(problem: Problem) -> FloatArray | None:
    penalty = problem.space.penalty
    return None if penalty is None else np.asarray(penalty @ problem.b)


def _first_of_each(rows: Rows, most: int, n_sources: int) -> Rows:
    """At most this many rows of each source, the first ones."""
    places = [np.flatnonzero(rows.source == number)[:most] for number in range(n_sources)]
    chosen = np.concatenate(places)
    return Rows(rows.vectors[chosen], rows.source[chosen])


def _weights_table(report: Mapping[str, Any]) -> pa.Table:
    names = list(report["weights"])
    ranges = report["ranges"] or {name: [None, None] for name in names}
    return pa.table(
        {
            "source": pa.array(names, pa.string()),
            "weight": pa.array([report["weights"][name] for name in names], pa.float64()),
            "low": pa.array([ranges[name][0] for name in names], pa.float64()),
            "high": pa.array([ranges[name][1] for name in names], pa.float64()),
            "cap": pa.array([report["caps"][name] for name in names], pa.float64()),
            "available": pa.array([report["available"][name] for name in names], pa.float64()),
        }
    )


def _available(decisions: pa.Table, supply: Supply) -> dict[str, float]:
    """Kept rows or tokens of every source, and all of every anchor's."""
    amounts: dict[str, float] = {}
    for source, keep, tokens in zip(
        *(decisions[name].to_pylist() for name in ("source", "keep", "tokens")), strict=True
    ):
        if keep or source in supply.anchors:
            amounts[source] = amounts.get(source, 0) + (tokens if supply.unit == "tokens" else 1)
    return {name: float(amount) for name, amount in amounts.items()}
