"""Round robin: every target row in turn takes the row that is best for it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from stages.selection.ranking import IntArray

_FIRST = 64


def round_robin(scores: NDArray[np.float32], count: int) -> IntArray:
    """Rows in the order taken: targets take turns, each the best row that is still there.

    Only as much of a target's ranking is sorted as its turns need.

    Args:
        scores: of each target and row, float32 [targets, n], no NaN; rows in the order in which
            ties fall.
        count: rows wanted, at most n.

    Returns:
        Row numbers, int64 [count].

    Source: A Critical Look at Targeted Instruction Selection (arXiv 2602.14696) and RDS+
    (arXiv 2503.01807).
    """
    n = scores.shape[1]
    count = min(count, n)
    first = max(_FIRST, 4 * -(-count // max(len(scores), 1)))
    rankings = [_ranking(line, first) for line in scores]
    used = np.zeros(n, dtype=bool)
    picks: list[int] = []
    while len(picks) < count:
        for ranking in rankings[: count - len(picks)]:
            # Fewer than n rows are used, so every ranking still holds one.
            row = next(row for row in ranking if not used[row])
            used[row] = True
            picks.append(row)
    return np.array(picks, dtype=np.int64)


def _ranking(scores: NDArray[np.float32], depth: int) -> Iterator[int]:
    """Row numbers by falling score, ties by number, sorted a stretch at a time."""
    given, n = 0, len(scores)
    while given < n:
        depth = min(depth, n)
        cut = np.partition(scores, n - depth)[n - depth]
        rows = np.flatnonzero(scores >= cut)
        ranked = rows[np.lexsort((rows, -scores[rows]))]
        yield from ranked[given:].tolist()
        given, depth = len(ranked), 2 * len(ranked)
