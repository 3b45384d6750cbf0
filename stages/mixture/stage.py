"""The mixture stage: weights of sources that bring what is emitted near the targets, certified.

A sample of every source is solved to optimality; the duals of all its solves then bound the optimum
over every row from below (`certificate`), and fresh rows estimate the value from above. While the
two are too far apart the sample grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.base import Columns, Outcome, ShardedColumns
from stages.errors import StageError
from stages.mixture.bundle import BundleResult, optimal_mixture
from stages.mixture.certificate import (
    CutSums,
    certified_lower_bound,
    cut_sums,
    full_cuts,
    near_optimal_ranges,
)
from stages.mixture.cost import Metric, cost_matrix
from stages.mixture.energy import energy_mixture
from stages.mixture.problem import TargetCloud, target_cloud, vectors_of, weight_bounds
from stages.mixture.settings import MixtureSettings
from stages.mixture.transport import TransportNotSolved, transport
from stages.rows import key_hash
from stages.storage import Store

FloatArray = NDArray[np.float64]
_FRESH_DRAWS = 4
_EXACT_ENTRIES = 4_000_000
"""Largest cost matrix over all rows that is solved exactly: seconds, and some 100 MB."""


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
class KeptRows:
    """Ids, sources and vectors of the kept rows of one shard."""

    ids: list[str]
    source: NDArray[np.int64]
    vectors: FloatArray


class MixtureStage:
    r"""Minimises :math:`\mathrm{OT}(\sum_k p_k \mu_k, \nu)` over the weights p."""

    name = "mixture"
    version = 1

    def __init__(self, settings: MixtureSettings, supply: Supply, seed: int) -> None:
        """Keep the settings, what may be emitted, and the seed."""
        self.settings = settings
        self._supply = supply
        self._seed = seed

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
            targets, self.settings.target_rows, self._seed, self.settings.task_weights
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
        try:
            report = self._solved(columns, decisions, sources, cloud, lower, upper)
        except (TransportNotSolved, ValueError) as error:
            raise StageError(f"the mixture can't be solved: {error}", stage=self.name) from error
        weights = {name: value for name, value in report["weights"].items() if name not in anchored}
        emitted = sum(weights.values())
        report["weights"] = {name: value / emitted for name, value in weights.items()}
        for key in ("ranges", "caps", "energy_weights"):
            report[key] = {
                name: (np.asarray(report[key][name]) / emitted).tolist() for name in weights
            }
        report["anchors"] = {name: anchored[name] for name in sorted(anchored)}
        report["available"] = available
        report["unit"] = self._supply.unit
        report["budget"] = self._supply.budget
        table = pa.table(
            {
                "source": list(report["weights"]),
                "weight": list(report["weights"].values()),
                "low": [report["ranges"][name][0] for name in report["weights"]],
                "high": [report["ranges"][name][1] for name in report["weights"]],
                "cap": [report["caps"][name] for name in report["weights"]],
                "available": [available[name] for name in report["weights"]],
            }
        )
        return Outcome({"weights.parquet": table}, report)

    def _solved(
        self,
        columns: ShardedColumns,
        decisions: pa.Table,
        sources: list[str],
        cloud: TargetCloud,
        lower: FloatArray,
        upper: FloatArray,
    ) -> dict[str, Any]:
        settings = self.settings
        size = settings.rows_per_source
        trace: list[dict[str, float]] = []
        while True:
            draws = _draws(columns, decisions, sources, size, self._seed)
            x, source = draws[0]
            cost = cost_matrix(x, cloud.vectors, settings.metric)
            bundle = optimal_mixture(
                cost, source, cloud.mass, lower, upper, settings.bundle_tolerance
            )
            sums = self._sums(columns, decisions, sources, cloud, bundle)
            bound, _ = certified_lower_bound(sums, bundle.potentials, cloud.mass, lower, upper)
            estimate, half, how = self._upper_estimate(
                columns, decisions, sources, cloud, bundle, draws[1:]
            )
            gap = (estimate - bound) / max(abs(bound), 1e-12)
            trace.append({"rows_per_source": size, "lower_bound": bound, "estimate": estimate})
            largest = int(sums.count.max())
            if gap <= settings.tolerance or size >= min(settings.max_rows_per_source, largest):
                break
            size = min(size * 2, settings.max_rows_per_source)
        energy = energy_mixture(x, source, cloud.vectors, cloud.mass, lower, upper, settings.metric)
        cuts = full_cuts(sums, bundle.potentials, cloud.mass)
        ranges = near_optimal_ranges(cuts, lower, upper, settings.range_slack)
        return {
            "weights": dict(zip(sources, bundle.weights.tolist(), strict=True)),
            "value_sample": bundle.value,
            "sample_lower_bound": bundle.lower_bound,
            "lower_bound": bound,
            "upper_estimate": estimate,
            "upper_interval": [estimate - half, estimate + half],
            "upper_from": how,
            "gap": gap,
            "tolerance": settings.tolerance,
            "certified": bool(gap <= settings.tolerance),
            "ranges": dict(zip(sources, ranges.tolist(), strict=True)),
            "caps": dict(zip(sources, upper.tolist(), strict=True)),
            "energy_weights": dict(zip(sources, energy.weights.tolist(), strict=True)),
            "rows_per_source": size,
            "rows": dict(zip(sources, sums.count.tolist(), strict=True)),
            "solves": bundle.solves,
            "target_points": len(cloud.mass),
            "trace": trace,
        }

    def _upper_estimate(
        self,
        columns: ShardedColumns,
        decisions: pa.Table,
        sources: list[str],
        cloud: TargetCloud,
        bundle: BundleResult,
        fresh: list[tuple[FloatArray, NDArray[np.int64]]],
    ) -> tuple[float, float, str]:
        """The mixture's value over all rows: exact where that fits, else the mean over fresh rows.

        A subsample's value lies above the full one on average (F is convex in the measures), so the
        estimate errs on the safe side.
        """
        fits = int(decisions.num_rows) * len(cloud.mass) <= _EXACT_ENTRIES
        if fits or not fresh:
            kept = list(_kept_rows(columns, decisions, sources))
            vectors = np.concatenate([rows.vectors for rows in kept])
            source = np.concatenate([rows.source for rows in kept])
            value = mixture_value(vectors, source, bundle.weights, cloud, self.settings.metric)
            return value, 0.0, "all rows, exactly"
        values = [
            mixture_value(vectors, of, bundle.weights, cloud, self.settings.metric)
            for vectors, of in fresh
        ]
        return (*_mean_and_half_width(values), "fresh rows")

    def _sums(
        self,
        columns: ShardedColumns,
        decisions: pa.Table,
        sources: list[str],
        cloud: TargetCloud,
        bundle: BundleResult,
    ) -> CutSums:
        """The saved potentials over every kept row of every shard."""
        total: CutSums | None = None
        for rows in _kept_rows(columns, decisions, sources):
            sums = cut_sums(
                rows.vectors,
                rows.source,
                cloud.vectors,
                bundle.potentials,
                self.settings.metric,
                len(sources),
            )
            total = sums if total is None else total + sums
        if total is None:
            raise StageError("no kept row has an embedding", stage=self.name)
        return total


def mixture_value(
    vectors: FloatArray,
    source: NDArray[np.int64],
    weights: FloatArray,
    cloud: TargetCloud,
    metric: Metric,
) -> float:
    r"""The transport value of a mixture on given rows.

    .. math::
        F(p) = \mathrm{OT}\Bigl(\sum_k p_k \tfrac{1}{n_k} \sum_{i \in S_k} \delta_{x_i}, \nu\Bigr)

    Args:
        vectors: float64 [n, d].
        source: integers [n].
        weights: p, float64 [K].
        cloud: the targets.
        metric: the cost.

    Raises:
        TransportNotSolved: the solver stopped before the optimum.
    """
    counts = np.bincount(source, minlength=len(weights))
    mass = weights[source] / counts[source]
    used = mass > 0
    cost = cost_matrix(vectors[used], cloud.vectors, metric)
    return transport(cost, mass[used] / mass[used].sum(), cloud.mass).value


def _available(decisions: pa.Table, supply: Supply) -> dict[str, float]:
    """Kept rows or tokens of every source, and all of every anchor's."""
    amounts: dict[str, float] = {}
    for source, keep, tokens in zip(
        *(decisions[name].to_pylist() for name in ("source", "keep", "tokens")), strict=True
    ):
        if keep or source in supply.anchors:
            amounts[source] = amounts.get(source, 0) + (tokens if supply.unit == "tokens" else 1)
    return {name: float(amount) for name, amount in amounts.items()}


def _kept_rows(
    columns: ShardedColumns, decisions: pa.Table, sources: list[str]
) -> list[KeptRows] | Any:
    """Kept (and anchor) rows that have a vector, shard by shard."""
    number = {name: place for place, name in enumerate(sources)}
    start = 0
    for table in columns.iter(("id", "embedding")):
        part = decisions.slice(start, table.num_rows)
        start += table.num_rows
        if part["id"].to_pylist() != table["id"].to_pylist():
            raise StageError(
                "selection's decisions are of other rows than the embeddings; run again with "
                "--restart-from selection",
                stage="mixture",
            )
        wanted = [
            place
            for place, (keep, source, reason, valid) in enumerate(
                zip(
                    part["keep"].to_pylist(),
                    part["source"].to_pylist(),
                    part["reason"].to_pylist(),
                    table["embedding"].is_valid().to_pylist(),
                    strict=True,
                )
            )
            if (keep or reason == "anchor") and source in number and valid
        ]
        places = pa.array(wanted, pa.int64())
        kept = table.take(places)
        names = part["source"].take(places).to_pylist()
        if kept.num_rows:
            yield KeptRows(
                kept["id"].to_pylist(), np.array([number[n] for n in names]), vectors_of(kept)
            )


def _draws(
    columns: ShardedColumns, decisions: pa.Table, sources: list[str], size: int, seed: int
) -> list[tuple[FloatArray, NDArray[np.int64]]]:
    """Disjoint samples of `size` rows a source, by hash: the one to solve, then fresh ones.

    A source with fewer rows than the sample gives all of them to every draw, which is exact.
    """
    keys: list[list[tuple[int, FloatArray]]] = [[] for _ in sources]
    most = size * (1 + _FRESH_DRAWS)
    for rows in _kept_rows(columns, decisions, sources):
        for row, source, vector in zip(rows.ids, rows.source.tolist(), rows.vectors, strict=True):
            keys[source].append((key_hash(row, seed), vector))
        for source, found in enumerate(keys):
            if len(found) > 2 * most:
                keys[source] = sorted(found, key=lambda pair: pair[0])[:most]
    empty = [name for name, found in zip(sources, keys, strict=True) if not found]
    if empty:
        raise StageError(f"source {empty[0]} has no kept row with an embedding", stage="mixture")
    ordered = [[vector for _, vector in sorted(found, key=lambda pair: pair[0])] for found in keys]
    draws = []
    for draw in range(1 + _FRESH_DRAWS):
        x: list[FloatArray] = []
        of: list[int] = []
        fresh = draw == 0
        for source, vectors in enumerate(ordered):
            mine = vectors[draw * size : (draw + 1) * size]
            if len(vectors) <= size:
                mine = vectors
            elif len(mine) < min(size, len(vectors) // 2):
                break
            else:
                fresh = True
            x += mine
            of += [source] * len(mine)
        else:
            if fresh:
                draws.append((np.array(x), np.array(of)))
                continue
        break
    return draws


def _mean_and_half_width(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t (0 for a single value)."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, 0.0
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, float(t.ppf(0.975, len(values) - 1)) * error
