"""`tamis analyse groups`: rows grouped by how often several models solve them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.table import Table

from pipeline.analyse.runs import ScoredRun, floats, scored_runs
from pipeline.analyse.tables import figure, finite, percent, plain_table, sparkline
from stages.errors import ConfigError
from stages.groups.groups import UNSOLVED, DifficultyGroups, difficulty_groups, pass_rate_curve
from stages.groups.meanshift import OUTLIER

_COLUMNS = ("id", "source", "rollouts", "pass_rate")
_MARKS = {OUTLIER: "outliers", UNSOLVED: "unsolved"}


@dataclass(frozen=True)
class RateVectors:
    """Pass rates of the rows that every run has one of, by rising id.

    Attributes:
        ids: row ids [rows].
        sources: each row's source in the first run [rows].
        rates: float64 [rows, runs].
        resolution: the smallest step of a pass rate, 1 / most rollouts.
        partly: rows left out because some runs only have a pass rate of them.
        unscored: rows left out because no run has one.
    """

    ids: list[str]
    sources: list[str]
    rates: npt.NDArray[np.float64]
    resolution: float
    partly: int
    unscored: int


@dataclass(frozen=True)
class GroupAnalysis:
    """Groups of rows, and what they were made from."""

    runs: list[ScoredRun]
    vectors: RateVectors
    groups: DifficultyGroups
    quantile: float
    min_size: int

    @property
    def present(self) -> list[int]:
        """Labels in the order of a table: groups, outliers, unsolved."""
        there = set(self.groups.labels.tolist())
        return [*range(self.groups.count), *(mark for mark in _MARKS if mark in there)]


def analysed_groups(urls: Sequence[str], quantile: float, min_size: int) -> GroupAnalysis:
    """Difficulty groups over the models of several runs, given from weak to strong.

    Raises:
        ConfigError: a run has no pass rates, or no row has one in all of them.
        StageError: a run's shards don't belong together.
    """
    runs = scored_runs(urls, _COLUMNS)
    vectors = rate_vectors(runs)
    groups = difficulty_groups(
        vectors.rates, resolution=vectors.resolution, quantile=quantile, min_size=min_size
    )
    return GroupAnalysis(runs, vectors, groups, quantile, min_size)


def rate_vectors(runs: Sequence[ScoredRun]) -> RateVectors:
    """The pass rates of every row that has one in all runs.

    Raises:
        ConfigError: there is no such row.
    """
    rates: list[dict[str, float]] = []
    known: set[str] = set()
    most = 0
    for run in runs:
        ids = run.table["id"].to_pylist()
        known.update(ids)
        found = floats(run.table["pass_rate"])
        rates.append({i: rate for i, rate in zip(ids, found.tolist(), strict=True) if rate == rate})
        most = max(most, int(np.nanmax(floats(run.table["rollouts"]), initial=0)))
    shared = sorted(set.intersection(*(set(each) for each in rates)))
    if not shared:
        raise ConfigError(
            "no row has a pass rate in all of these runs; their recipes must name the same "
            "sources, and ask the pass_rate stage for the same rows"
        )
    scored = set().union(*rates)
    source_of = dict(
        zip(runs[0].table["id"].to_pylist(), runs[0].table["source"].to_pylist(), strict=True)
    )
    return RateVectors(
        ids=shared,
        sources=[source_of[i] for i in shared],
        rates=np.array([[each[i] for each in rates] for i in shared], dtype=np.float64),
        resolution=1 / most,
        partly=len(scored) - len(shared),
        unscored=len(known - scored),
    )


def groups_table(analysis: GroupAnalysis) -> Table:
    """One line a group: size, pass rate under each model, and where its rows come from."""
    names = [run.name for run in analysis.runs]
    lines = (
        [
            str(entry["group"]),
            str(entry["rows"]),
            percent(entry["share"]),
            *(f"{rate:.3f}" for rate in entry["pass_rates"]),
            sparkline(entry["pass_rates"]),
            ", ".join(f"{source} {rows}" for source, rows in entry["sources"].items()),
        ]
        for entry in _entries(analysis)
    )
    return plain_table(["group"], ["rows", "share", *names], ["curve", "sources"], lines)


def groups_summary(analysis: GroupAnalysis) -> str:
    """What the groups were made from, and what was left out."""
    vectors, radius = analysis.vectors, analysis.groups.radius
    lines = [f"rows with a pass rate in every run: {len(vectors.ids)}"]
    if vectors.partly or vectors.unscored:
        lines.append(
            f"left out: with a pass rate in some runs only {vectors.partly}, "
            f"in none {vectors.unscored}"
        )
    if radius is not None:
        lines.append(f"radius of a group: {figure(radius)}; least rows: {analysis.min_size}")
    return "\n".join(lines)


def groups_report(analysis: GroupAnalysis) -> dict[str, Any]:
    """The same as JSON."""
    vectors, radius = analysis.vectors, analysis.groups.radius
    return {
        "models": [{"name": run.name, "model": run.model, "run": run.url} for run in analysis.runs],
        "quantile": analysis.quantile,
        "min_size": analysis.min_size,
        "resolution": vectors.resolution,
        "radius": finite(radius),
        "rows": len(vectors.ids),
        "left_out": {"pass_rate_in_some_runs": vectors.partly, "in_none": vectors.unscored},
        "groups": list(_entries(analysis)),
    }


def group_rows(analysis: GroupAnalysis) -> pa.Table:
    """The group of every row: `id`, `difficulty_group` (-1 outlier, -2 unsolved)."""
    return pa.table(
        {
            "id": pa.array(analysis.vectors.ids, pa.string()),
            "difficulty_group": pa.array(analysis.groups.labels, pa.int32()),
        }
    )


def _entries(analysis: GroupAnalysis) -> list[dict[str, Any]]:
    labels, vectors = analysis.groups.labels, analysis.vectors
    entries = []
    for label in analysis.present:
        members = np.flatnonzero(labels == label)
        sources = Counter(vectors.sources[row] for row in members.tolist())
        entries.append(
            {
                "group": _MARKS.get(label, label),
                "rows": len(members),
                "share": len(members) / len(labels),
                "pass_rates": pass_rate_curve(vectors.rates[members]).tolist(),
                "sources": dict(sorted(sources.items())),
            }
        )
    return entries
