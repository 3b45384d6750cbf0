"""The transport problem of a run: its vectors, how much each source holds, what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.base import ShardedColumns
from stages.errors import StageError
from stages.rows import key_hash

FloatArray = NDArray[np.float64]

_LISTED = 20
"""Sources whose amounts an error names one by one."""


@dataclass(frozen=True)
class TargetCloud:
    """Distinct target vectors float64 [m, d], their mass [m], summing to 1, and a task of each."""

    vectors: FloatArray
    mass: FloatArray
    tasks: list[str]


def vectors_of(table: pa.Table) -> NDArray[np.float32]:
    """The `embedding` column of rows that have one, float32 [rows, d].

    Raises:
        StageError: vectors differ in length, or hold NaN.
    """
    column = table["embedding"].combine_chunks()
    values: NDArray[np.float32] = np.asarray(
        column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32
    )
    if table.num_rows == 0:
        return values.reshape(0, 0)
    if len(values) % table.num_rows or not np.isfinite(values).all():
        raise StageError("embeddings differ in length or hold NaN", stage="mixture")
    return values.reshape(table.num_rows, -1)


def target_cloud(
    targets: ShardedColumns, rows: int, seed: int, task_weights: str, *, by_task: bool = False
) -> TargetCloud:
    """The targets as one weighted cloud; equal vectors are one point with their joint mass.

    Args:
        targets: columns id, task, embedding.
        rows: how many target rows to take, those of lowest hash(id, seed).
        seed: of the recipe.
        task_weights: `equal` gives each task the same mass, `proportional` each row.
        by_task: equal vectors of different tasks stay apart.

    Raises:
        StageError: no target row has a vector.
    """
    tables = [table.filter(table["embedding"].is_valid()) for table in _iter(targets)]
    table = pa.concat_tables(tables)
    if table.num_rows == 0:
        raise StageError("no target row has an embedding", stage="mixture")
    ids = table["id"].to_pylist()
    chosen = sorted(range(len(ids)), key=lambda i: key_hash(ids[i], seed))[:rows]
    table = table.take(sorted(chosen))
    tasks = table["task"].to_pylist()
    mass = np.ones(len(tasks))
    if task_weights == "equal":
        counts = {task: tasks.count(task) for task in set(tasks)}
        mass = np.array([1 / counts[task] for task in tasks])
    vectors = vectors_of(table).astype(np.float64)
    numbers = {task: float(place) for place, task in enumerate(sorted(set(tasks)))}
    label = np.array([[numbers[task] if by_task else 0.0] for task in tasks])
    distinct, first, place = np.unique(
        np.hstack([vectors, label]), axis=0, return_index=True, return_inverse=True
    )
    joint = np.bincount(place.ravel(), weights=mass)
    return TargetCloud(distinct[:, :-1], joint / joint.sum(), [tasks[i] for i in first.tolist()])


def weight_bounds(
    sources: Sequence[str],
    available: Mapping[str, float],
    budget: float | None,
    repeats: Mapping[str, float],
    floors: Mapping[str, float],
    caps: Mapping[str, float],
    anchored: Mapping[str, float],
) -> tuple[FloatArray, FloatArray]:
    r"""Least and largest weight of each source.

    .. math:: p_k \le \min\Bigl(\mathrm{cap}_k,\;
              \frac{\mathrm{available}_k \cdot \mathrm{repeats}_k}{\mathrm{budget}}\Bigr)

    Args:
        sources: names, in the order of the result.
        available: kept rows or tokens per source.
        budget: rows or tokens to emit; None: no bound from what is available.
        repeats: how often a row may be used.
        floors: least weights of the recipe, as shares of what is emitted.
        caps: largest weights of the recipe, likewise.
        anchored: amount of each anchor source, in the budget's unit; its weight is fixed.

    Returns:
        Two float64 [K] arrays; anchors have equal bounds.

    Raises:
        StageError: a floor exceeds what its source can give, or the caps leave less than 1 in all.
    """
    emitted = budget if budget is not None else float(sum(available.values()))
    whole = emitted + sum(anchored.values())
    share = emitted / whole
    lower, upper = [], []
    for name in sources:
        if name in anchored:
            lower.append(anchored[name] / whole)
            upper.append(anchored[name] / whole)
            continue
        supply = available[name] * repeats.get(name, 1.0) / budget if budget else 1.0
        high, low = min(1.0, supply, caps.get(name, 1.0)), floors.get(name, 0.0)
        if low > high:
            raise StageError(
                f"mixture.floors.{name} = {low:g} asks for more than the {available[name]:g} "
                f"available allow of a budget of {budget:g} (at most {high:.3g}); lower the floor "
                "or the budget, or raise the source's repeats",
                stage="mixture",
            )
        lower.append(low * share)
        upper.append(high * share)
    if sum(upper) < 1 - 1e-9 or sum(lower) > 1 + 1e-9:
        side = f"caps allow only {sum(upper):.3f}" if sum(upper) < 1 else "floors exceed 1"
        raise StageError(
            f"no mixture meets the bounds: {side} of the whole; available {_listed(available)}, "
            f"budget {budget}; lower the budget, or raise caps or repeats",
            stage="mixture",
        )
    return np.array(lower), np.array(upper)


def _listed(available: Mapping[str, float]) -> str:
    """Amounts by source, or their sum where there are many."""
    if len(available) <= _LISTED:
        return ", ".join(f"{name}: {amount:g}" for name, amount in available.items())
    return f"{sum(available.values()):g} in {len(available):,} sources"


def _iter(targets: ShardedColumns) -> list[pa.Table]:
    return list(targets.iter(("id", "task", "embedding")))
