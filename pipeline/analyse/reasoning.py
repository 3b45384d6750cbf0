"""`tamis analyse reasoning`: how chains of thought are built, by source and within prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.table import Table

from pipeline.analyse.runs import floats, stage_table
from pipeline.analyse.tables import figure, finite, plain_table

FloatArray = npt.NDArray[np.float64]

MEASURES = (
    "reasoning_characters",
    "reasoning_steps",
    "review_ratio",
    "failed_step_fraction",
)
_SCORED = ("reasoning_characters", "review_ratio", "failed_step_fraction")
_QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Distribution:
    """Quartiles of one measure over one source's rows that have it; NaN where none has."""

    source: str
    measure: str
    rows: int
    quartiles: tuple[float, float, float]


@dataclass(frozen=True)
class ReasoningAnalysis:
    """Distributions by source, and every row's place among the responses to its prompt.

    Attributes:
        distributions: by source, in the order of the measures.
        z_scores: `id`, `group` (the prompt) and `MEASURE_z` of every row of the run, null where
            the prompt has fewer than two values, or equal ones.
        prompts: prompts with at least one z-score.
    """

    distributions: list[Distribution]
    z_scores: pa.Table
    prompts: int


def analysed_reasoning(url: str) -> ReasoningAnalysis:
    """Structure of the chains of thought of one run.

    Raises:
        ConfigError: no run is there, or it has no complete reasoning stage.
        StageError: the run's shards don't belong together.
    """
    from stages.reasoning.zscores import within_group_zscores

    table = stage_table(url, "reasoning", ["id", "group", "source", *MEASURES])
    sources = np.array(table["source"].to_pylist(), dtype=object)
    distributions = [
        _distribution(name, measure, floats(table[measure])[np.equal(sources, name).astype(bool)])
        for name in sorted(set(sources.tolist()))
        for measure in MEASURES
    ]
    prompts = table["group"].to_pylist()
    scores = {name: within_group_zscores(prompts, floats(table[name])) for name in _SCORED}
    placed = np.any([np.isfinite(values) for values in scores.values()], axis=0)
    return ReasoningAnalysis(
        distributions,
        pa.table(
            {
                "id": table["id"],
                "group": table["group"],
                # from_pandas: NaN becomes null.
                **{
                    f"{n}_z": pa.array(z, pa.float32(), from_pandas=True) for n, z in scores.items()
                },
            }
        ),
        len({prompts[row] for row in np.flatnonzero(placed).tolist()}),
    )


def reasoning_table(analysis: ReasoningAnalysis) -> Table:
    """One line a source and measure."""
    lines = (
        [each.source, each.measure, str(each.rows), *map(figure, each.quartiles)]
        for each in analysis.distributions
    )
    return plain_table(
        ["source", "measure"], ["rows", "lower quartile", "median", "upper quartile"], [], lines
    )


def reasoning_summary(analysis: ReasoningAnalysis) -> str:
    """How many prompts could be compared within."""
    return f"prompts with z-scores (several responses that differ): {analysis.prompts}"


def reasoning_report(analysis: ReasoningAnalysis) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "prompts_with_z_scores": analysis.prompts,
        "distributions": [
            {
                "source": each.source,
                "measure": each.measure,
                "rows": each.rows,
                **dict(
                    zip(
                        ("lower_quartile", "median", "upper_quartile"),
                        map(finite, each.quartiles),
                        strict=True,
                    )
                ),
            }
            for each in analysis.distributions
        ],
    }


def _distribution(source: str, measure: str, values: FloatArray) -> Distribution:
    there = values[np.isfinite(values)]
    found: Sequence[float] = (
        np.quantile(there, _QUARTILES).tolist() if there.size else [float("nan")] * 3
    )
    return Distribution(source, measure, len(there), (found[0], found[1], found[2]))
