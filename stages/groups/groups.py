"""Difficulty groups: rows that the same models solve about as often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.groups.meanshift import OUTLIER, group_radius, mean_shift_groups

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

UNSOLVED = -2
"""Label of a row that no model solved in any rollout."""


@dataclass(frozen=True)
class DifficultyGroups:
    """The group of every row.

    Attributes:
        labels: int64 [rows]; groups from 0, easiest first, OUTLIER (-1) or UNSOLVED (-2).
        radius: of a group; None where no row was solved, so that there was nothing to group.
    """

    labels: IntArray
    radius: float | None

    @property
    def count(self) -> int:
        """Number of groups."""
        return int(max(self.labels.max(initial=OUTLIER), OUTLIER)) + 1


def difficulty_groups(
    vectors: FloatArray, *, resolution: float, quantile: float = 0.1, min_size: int = 10
) -> DifficultyGroups:
    """Group rows by their pass rates over several models.

    Rows that no model solved are set aside first; the others are grouped by improved mean shift.

    Source: Clustering-On-Difficulty (arXiv 2502.17262), section 4.1 and algorithm 1; its Q = 0.1
    and K = 10 are the defaults.

    Args:
        vectors: pass rates, float64 [rows, models], in [0, 1].
        resolution: the step of a pass rate, 1 / rollouts.
        quantile: share of all rows whose distance sets the bandwidth.
        min_size: rows below which a group is dissolved.

    Raises:
        ValueError: a rate lies outside [0, 1] or isn't finite, or another argument is out of range.
    """
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise ValueError(f"vectors must have shape [rows, models], not {vectors.shape}")
    if not bool(((vectors >= 0) & (vectors <= 1)).all()):
        raise ValueError("pass rates must be in [0, 1]")
    if not (0 < resolution <= 1 and 0 <= quantile <= 1 and min_size >= 1):
        raise ValueError(
            "need 0 < resolution <= 1, 0 <= quantile <= 1 and min_size >= 1, not "
            f"{resolution}, {quantile} and {min_size}"
        )
    labels = np.full(len(vectors), UNSOLVED, dtype=np.int64)
    solved = vectors.any(axis=1)
    if not solved.any():
        return DifficultyGroups(labels, None)
    rates = vectors[solved]
    radius = group_radius(rates, quantile, resolution)
    labels[solved] = easiest_first(mean_shift_groups(rates, radius, min_size), rates)
    return DifficultyGroups(labels, radius)


def easiest_first(labels: IntArray, vectors: FloatArray) -> IntArray:
    """The same groups numbered from 0 by falling mean pass rate; labels below 0 stay.

    Args:
        labels: int64 [rows].
        vectors: pass rates, float64 [rows, models].

    Returns:
        int64 [rows].
    """
    curves = {int(g): pass_rate_curve(vectors[labels == g]) for g in np.unique(labels[labels >= 0])}
    # Of equal means, the group that the later (stronger) models solve more often comes first.
    order = sorted(curves, key=lambda g: (-curves[g].mean(), *(-curves[g][::-1]), g))
    renumbered = labels.copy()
    for number, group in enumerate(order):
        renumbered[labels == group] = number
    return renumbered


def pass_rate_curve(vectors: FloatArray) -> FloatArray:
    r"""A group's mean pass rate under each model.

    .. math:: \bar d_m = \frac{1}{|G|} \sum_{i \in G} d_{im}

    Source: Clustering-On-Difficulty (arXiv 2502.17262), section 4: what a group's law is fitted to.

    Args:
        vectors: pass rates of the group's rows, float64 [rows, models], at least one row.

    Returns:
        float64 [models].
    """
    curve: FloatArray = vectors.mean(axis=0)
    return curve
