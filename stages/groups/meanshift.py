"""Improved mean shift: groups of vectors of pass rates, none wider than one radius.

Source: Clustering-On-Difficulty (arXiv 2502.17262), algorithm 1.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

OUTLIER = -1
"""Label of a vector that no group takes."""

ROUNDING = 1e-6
"""Slack on distances: rates are stored in float32, and equally spaced ones lie on the radius."""

_BANDWIDTH_ROWS = 10_000


def largest_radius(models: int) -> float:
    r"""A tenth of the largest distance between two vectors of pass rates.

    .. math:: U = \sqrt{M} / 10

    Source: arXiv 2502.17262, algorithm 1 (0.3 for its nine models).

    Args:
        models: M, the length of a vector.
    """
    return math.sqrt(models) / 10


def group_radius(vectors: FloatArray, quantile: float, resolution: float) -> float:
    r"""How far a member of a group may be from the group's centre.

    .. math:: R = \min\bigl(\max(B_Q, \delta), U\bigr)

    :math:`B_Q` is the mean distance of a vector to the nearest share Q of all vectors, by
    scikit-learn's `estimate_bandwidth` (of 10,000 vectors at most, drawn with a fixed seed). With
    few rollouts many vectors are equal and it falls to 0, so :math:`\delta`, the step of a pass
    rate, bounds it from below: rows that differ by one rollout of one model aren't told apart.

    Source: arXiv 2502.17262, algorithm 1; the lower bound is ours.

    Args:
        vectors: pass rates, float64 [rows, M], at least one row.
        quantile: Q, in [0, 1].
        resolution: the step of a pass rate, 1 / rollouts, above 0.
    """
    from sklearn.cluster import estimate_bandwidth

    bandwidth = float(
        estimate_bandwidth(vectors, quantile=quantile, n_samples=_BANDWIDTH_ROWS, random_state=0)
    )
    return min(max(bandwidth, resolution), largest_radius(vectors.shape[1]))


def mean_shift_groups(vectors: FloatArray, radius: float, min_size: int) -> IntArray:
    """The group of every vector, and OUTLIER for those that none takes.

    Mean shift runs on the vectors without a group; members farther than `radius` from their centre,
    and then all members of groups smaller than `min_size`, go back to those without one. This is
    repeated until a round leaves all labels as they were. A vector once grouped stays where it is.

    Source: arXiv 2502.17262, algorithm 1.

    Args:
        vectors: pass rates, float64 [rows, M].
        radius: bandwidth of mean shift and limit of distance, above 0.
        min_size: members below which a group is dissolved.

    Returns:
        int64 [rows]: OUTLIER, or numbers from 0 in the order in which groups were found.
    """
    labels = np.full(len(vectors), OUTLIER, dtype=np.int64)
    while True:
        loose = np.flatnonzero(labels == OUTLIER)
        found = _one_round(vectors[loose], radius, min_size)
        taken = found != OUTLIER
        if not taken.any():
            return labels
        _, numbers = np.unique(found[taken], return_inverse=True)
        labels[loose[taken]] = labels.max() + 1 + numbers


def _one_round(vectors: FloatArray, radius: float, min_size: int) -> IntArray:
    """Mean shift on these vectors, then the rules of distance and of size."""
    if len(vectors) < min_size or not len(vectors):
        return np.full(len(vectors), OUTLIER, dtype=np.int64)
    from sklearn.cluster import MeanShift

    reach = radius + ROUNDING
    # Equal vectors climb to the same mode: seeding from the distinct ones gives the same groups.
    fit = MeanShift(bandwidth=reach, seeds=np.unique(vectors, axis=0)).fit(vectors)
    labels = np.asarray(fit.labels_, dtype=np.int64)
    distances = np.linalg.norm(vectors - fit.cluster_centers_[labels], axis=1)
    labels[distances > reach] = OUTLIER
    sizes = np.bincount(labels[labels != OUTLIER], minlength=len(fit.cluster_centers_))
    labels[sizes[labels] < min_size] = OUTLIER
    return labels
