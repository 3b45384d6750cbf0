"""The transport value of the rows that were really emitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.base import ShardedColumns
from stages.errors import StageError
from stages.mixture.problem import target_cloud, vectors_of
from stages.mixture.settings import MixtureSettings
from stages.mixture.space import Space, projection_of, task_penalty
from stages.mixture.transport import TransportNotSolved, transport
from stages.storage import Store

LARGEST = 8000
"""Emitted lines in the exact solve; more are represented by an even, seeded sample."""


def emitted_value(
    columns: ShardedColumns,
    targets: ShardedColumns,
    lines: NDArray[np.int64],
    sources: Sequence[str],
    mixture: Mapping[str, Any],
    settings: MixtureSettings,
    seed: int,
    store: Store,
) -> dict[str, Any]:
    r"""The transport value of what is emitted, and of how many lines it was computed.

    .. math:: \mathrm{OT}\Bigl((1 - \alpha) \tfrac{1}{n} \sum_i \delta_{x_i}
              + \alpha\, \mu_{\mathrm{anchors}},\; \nu\Bigr)

    where :math:`\alpha` is the anchors' share of the whole.

    Args:
        columns: id, embedding.
        targets: id, task, embedding.
        lines: row number of every emitted line, int64 [n], copies repeated.
        sources: source of every row of the run.
        mixture: the mixture stage's report.
        settings: the mixture's settings.
        seed: of the recipe.
        store: the mixture's folder, where its projection is.

    Raises:
        StageError: an emitted row has no embedding, or the solver failed.
    """
    chosen = lines
    if len(lines) > LARGEST:
        chosen = np.random.default_rng([seed, 5]).choice(lines, LARGEST, replace=False)
    anchors = mixture.get("anchors") or {}
    anchored = [row for row, name in enumerate(sources) if name in anchors]
    rows, copies = np.unique(chosen, return_counts=True)
    mass = np.zeros(len(sources))
    mass[rows] = copies / copies.sum()
    if anchored:
        amount = sum(anchors.values())
        emitted = sum(mixture["available"][name] for name in mixture["weights"])
        share = amount / (amount + (mixture.get("budget") or emitted))
        mass *= 1 - share
        mass[anchored] = share / len(anchored)
    used = np.flatnonzero(mass)
    vectors = _vectors(columns, used)
    cloud = target_cloud(
        targets, settings.target_rows, seed, settings.task_weights, by_task=bool(settings.serves)
    )
    names = sorted(set(sources))
    projection = None
    if settings.pca is not None:
        projection = projection_of(store.read_table("projection.parquet"))
    penalty = task_penalty(names, cloud.tasks, settings.serves, settings.task_cost)
    space = Space(settings.metric, projection, penalty)
    number = {name: place for place, name in enumerate(names)}
    of = np.array([number[sources[row]] for row in used.tolist()], dtype=np.int64)
    try:
        cost = space.cost(space.vectors(vectors), of, space.vectors(cloud.vectors))
        value = transport(cost, mass[used], cloud.mass).value
    except (TransportNotSolved, ValueError) as error:
        raise StageError(f"the emitted rows' transport can't be solved: {error}") from error
    return {"value_emitted": value, "value_emitted_lines": len(chosen)}


def _vectors(columns: ShardedColumns, wanted: NDArray[np.intp]) -> NDArray[np.float32]:
    found: list[NDArray[np.float32]] = []
    start = 0
    for table in columns.iter(("id", "embedding")):
        here = wanted[(wanted >= start) & (wanted < start + table.num_rows)] - start
        start += table.num_rows
        kept = table.take(pa.array(here, pa.int64()))
        if kept["embedding"].null_count:
            raise StageError("an emitted row has no embedding", stage="emission")
        if kept.num_rows:
            found.append(vectors_of(kept))
    return np.concatenate(found)
