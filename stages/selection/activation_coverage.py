"""How much of what the targets activate is activated by the selected rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stages.base import ShardedColumns

ACTIVE = "active_features"
"""Column of feature numbers that the features stage adds where it is asked to."""


def activation_coverage(selected: set[int], target: set[int]) -> float | None:
    r"""Share of the targets' features that some selected row activates; None without features.

    .. math:: \mathrm{FAC} = \frac{|F(S) \cap F(T)|}{|F(T)|}

    Source: FAC Synthesis (arXiv 2602.10388), section 3; its F(T) holds the features that a language
    model judged relevant, here it holds all that the targets activate.
    """
    return len(selected & target) / len(target) if target else None


def coverage_report(
    columns: ShardedColumns, targets: ShardedColumns, keep: NDArray[np.bool_]
) -> dict[str, Any]:
    """The coverage of the targets by the kept rows and by all rows, over all tasks and by task.

    Holds one set of features a task and two for rows, whatever the number of rows.

    Args:
        columns: of the run, with ACTIVE.
        targets: likewise, with `task`.
        keep: of each row, in order, bool [n].
    """
    kept: set[int] = set()
    every: set[int] = set()
    start = 0
    for table in columns.iter((ACTIVE,)):
        column = table[ACTIVE]
        here = pa.array(keep[start : start + table.num_rows])
        kept |= _features(column.filter(here))
        every |= _features(column)
        start += table.num_rows
    by_task: dict[str, set[int]] = {}
    for table in targets.iter((ACTIVE, "task")):
        tasks = table["task"].cast(pa.string())
        for task in sorted(set(tasks.to_pylist())):
            mine = table[ACTIVE].filter(pc.equal(tasks, task))
            by_task.setdefault(task, set()).update(_features(mine))
    return {
        "target_features": len(set().union(*by_task.values())),
        **_shares(kept, every, set().union(*by_task.values())),
        "by_task": {task: _shares(kept, every, found) for task, found in sorted(by_task.items())},
    }


def _shares(kept: set[int], every: set[int], target: set[int]) -> Mapping[str, float | None]:
    return {
        "kept_rows": activation_coverage(kept, target),
        "all_rows": activation_coverage(every, target),
    }


def _features(column: pa.ChunkedArray) -> set[int]:
    return set(pc.unique(pc.list_flatten(column)).to_pylist())
