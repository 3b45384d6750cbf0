"""Scores that compare responses to one prompt with each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def within_group_zscores(groups: Sequence[str], values: NDArray[np.float64]) -> NDArray[np.float64]:
    r"""Every value in standard deviations from the mean of its group.

    .. math:: z_i = \frac{v_i - \mu_g}{\sigma_g}, \qquad
        \sigma_g^2 = \frac{1}{n_g} \sum_{j \in g} (v_j - \mu_g)^2

    The deviation is the population's (divided by :math:`n_g`). Values that aren't finite count in
    no group.

    Args:
        groups: what each value belongs to (a row's prompt), one a value.
        values: float64 [n]; NaN where there is none.

    Returns:
        float64 [n]; NaN where the value isn't finite, or its group has fewer than two finite values
        or no spread.

    Raises:
        ValueError: not one group a value.

    Source: arXiv 2509.19284 compares within a question (fixed effects), since harder questions have
    longer and worse chains of thought altogether.
    """
    if len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values")
    scores = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    kept = values[finite]
    names, group = np.unique(np.asarray(groups, dtype=object)[finite], return_inverse=True)
    counts = np.bincount(group, minlength=len(names))
    apart = kept - (np.bincount(group, kept, len(names)) / counts)[group]
    deviation = np.sqrt(np.bincount(group, apart**2, len(names)) / counts)
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    np.minimum.at(low, group, kept)
    np.maximum.at(high, group, kept)
    # A rounded mean of equal values may leave a tiny deviation, so equality decides.
    spread = np.where(low < high, deviation, np.nan)
    scores[finite] = apart / spread[group]
    return scores
