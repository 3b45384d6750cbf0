"""Greedy coverage of features: rows that between them activate as much as possible."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.selection.ranking import FloatArray, IntArray


@dataclass(frozen=True)
class ActiveSets:
    """The features that each row activates, 4 bytes a feature and 8 a row.

    Attributes:
        starts: where each row's features begin in `features`, and the end; int64 [n + 1].
        features: feature numbers, distinct within a row; int32.
    """

    starts: IntArray
    features: NDArray[np.int32]

    def __len__(self) -> int:
        """Rows."""
        return len(self.starts) - 1

    def of(self, row: int | np.int64) -> NDArray[np.int32]:
        """Features of one row, int32."""
        return self.features[self.starts[row] : self.starts[row + 1]]


def greedy_coverage(
    sets: ActiveSets,
    rows: IntArray,
    count: int,
    relevance: FloatArray | None = None,
    diversity: float = 1.0,
) -> IntArray:
    r"""Rows picked one at a time by what each adds, in the order picked.

    .. math:: g(x) = (1 - \lambda)\, s(x) + \lambda\, \frac{|F(x) \setminus C|}{\max_y |F(y)|}

    F(x) are the features of row x, C those covered so far, s its relevance, and lambda the
    `diversity`: 1 is coverage alone, 0 relevance alone. The row of largest g is taken. When no row
    is left that adds a feature, C is emptied and coverage begins anew. Gains only fall while C
    grows, so a row's last known gain bounds its gain now: a heap of bounds gives the picks of the
    plain greedy, and few gains are computed again. Between two resets those picks cover at least
    1 - 1/e of what as many rows can cover.

    Holds about 110 bytes a row beside the sets. Coverage of activated features by the largest gain
    is described for SAE-GreedSelect (arXiv 2502.14050), whose own rules weren't available; the
    reset and the mixture with relevance are this project's.

    Args:
        sets: features of rows.
        rows: those to pick from, in the order in which ties fall, int64 [n].
        count: rows wanted.
        relevance: s of `rows`, in [0, 1], float64 [n]; None where lambda is 1.
        diversity: lambda, from 0 to 1.

    Returns:
        The first `count` picks (all where there are no more), int64.
    """
    sizes = np.diff(sets.starts)[rows]
    scale = diversity / max(int(sizes.max(initial=0)), 1)
    own = np.zeros(len(rows)) if relevance is None else (1.0 - diversity) * relevance
    covered: NDArray[np.bool_] = np.zeros(int(sets.features.max(initial=-1)) + 1, dtype=bool)
    # How many of the rows left have each feature, and how many uncovered features any of them has.
    holders = np.zeros(len(covered), np.int64)
    for row in rows.tolist():
        holders[sets.of(row)] += 1
    to_cover = int(np.count_nonzero(holders))
    left = np.ones(len(rows), dtype=bool)
    heap = _heap(own + scale * sizes, left)
    picks: list[int] = []
    while heap and len(picks) < count:
        if to_cover == 0 and covered.any():
            covered[:] = False
            to_cover = int(np.count_nonzero(holders))
            heap = _heap(own + scale * sizes, left)
        bound, place = heap[0]
        features = sets.of(rows[place])
        new = int(np.count_nonzero(~covered[features]))
        gain = float(own[place] + scale * new)
        if gain < -bound:
            heapq.heapreplace(heap, (-gain, place))
            continue
        heapq.heappop(heap)
        picks.append(int(rows[place]))
        left[place] = False
        holders[features] -= 1
        covered[features] = True
        to_cover -= new
    return np.array(picks, dtype=np.int64)


def unit_interval(scores: FloatArray) -> FloatArray:
    """Scores moved and scaled to [0, 1], float64 [n]; equal ones all become 0."""
    if not len(scores):
        return scores
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.zeros_like(scores)


def _heap(gains: FloatArray, left: NDArray[np.bool_]) -> list[tuple[float, int]]:
    places = np.flatnonzero(left)
    heap = list(zip((-gains[places]).tolist(), places.tolist(), strict=True))
    heapq.heapify(heap)
    return heap
