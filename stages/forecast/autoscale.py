"""The AutoScale rule: optimal mixtures at two scales, continued to a third."""

from __future__ import annotations

from math import log

import numpy as np

from stages.mixture.simplex import FloatArray


def autoscale_mixture(
    at_small: FloatArray, at_large: FloatArray, small: float, large: float, budget: float
) -> FloatArray:
    r"""Every source's amount grows geometrically, as it did between the scales.

    .. math:: n_k(N) = n_k(N_1) \left( \frac{n_k(N_1)}{n_k(N_0)} \right)^t, \quad
              t = \frac{\ln (N / N_1)}{\ln (N_1 / N_0)}, \quad p_k = n_k / \textstyle\sum_l n_l

    With t = 1 it is n(3) = n(2)^2 / n(1). A source that is absent at either scale stays absent.
    The rule gives a mixture and no loss.

    Source: AutoScale (arXiv 2407.20177).

    Args:
        at_small: optimal weights at N_0, [K].
        at_large: optimal weights at N_1, [K].
        small: N_0, rows.
        large: N_1, rows.
        budget: N, rows.

    Returns:
        float64 [K].

    Raises:
        ValueError: no source has weight at both scales.
    """
    first, second = at_small * small, at_large * large
    both = (first > 0) & (second > 0)
    if not both.any():
        raise ValueError("no source has weight at both scales: there is nothing to continue")
    logs = np.log(second[both]) + log(budget / large) / log(large / small) * (
        np.log(second[both]) - np.log(first[both])
    )
    amounts = np.zeros(len(first))
    amounts[both] = np.exp(logs - logs.max())
    return np.asarray(amounts / amounts.sum(), np.float64)
