r"""How many rollouts each prompt should get, and what that gains.

A prompt :math:`i` is solved by a share :math:`p_i` of its rollouts; :math:`G_i` is the norm of the
gradient of a correct one. The gradient of the training loss is estimated from the correct ones of
:math:`n_i` rollouts a prompt. Arrays are float64 [n], one entry a prompt.

Source: GVM-RAFT (arXiv 2505.02391), section 3.1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def allocation_weights(
    pass_rates: FloatArray, gradient_norms: FloatArray, alpha: float, beta: float
) -> FloatArray:
    r"""What the best numbers of rollouts are proportional to.

    .. math:: w_i = \frac{G_i}{\sqrt{p_i + \alpha / p_i^{\beta - 1}}}

    A prompt that was never solved has no correct rollout to learn from and gets 0.

    Args:
        pass_rates: p, from 0 to 1; NaN where unknown.
        gradient_norms: G, at least 0; NaN where unknown.
        alpha: 0 or more; turns the budget away from prompts that are hardly ever solved.
        beta: how sharply it does.

    Returns:
        float64 [n], at least 0; 0 where p or G is 0 or NaN.

    Source: GVM-RAFT (arXiv 2505.02391), Prop. 1.
    """
    weights = np.zeros(len(pass_rates))
    known = (pass_rates > 0) & (gradient_norms > 0)
    p = pass_rates[known]
    with np.errstate(over="ignore"):
        # A penalty beyond the largest float is a weight of 0, which is its limit.
        weights[known] = gradient_norms[known] / np.sqrt(p + alpha / p ** (beta - 1))
    return weights


def predicted_variance(
    pass_rates: FloatArray, gradient_norms: FloatArray, rollouts: FloatArray
) -> float:
    r"""Upper bound on the variance of the estimated gradient (trace of its covariance).

    .. math:: V(n) = \sum_i \frac{G_i^2}{p_i \, n_i}

    It is exact where the gradients of a prompt's correct rollouts have the norm G and mean zero;
    a mean :math:`\mu_i` lowers the variance by :math:`\sum_i \lVert \mu_i \rVert^2 / n_i`.

    Args:
        pass_rates: p, above 0.
        gradient_norms: G.
        rollouts: n; where it is 0 the estimate has no such term and the bound is infinite.

    Source: GVM-RAFT (arXiv 2505.02391), section 3.1.
    """
    with np.errstate(divide="ignore"):
        return float(np.sum(gradient_norms**2 / (pass_rates * rollouts)))


def regularised_variance(weights: FloatArray, rollouts: FloatArray) -> float:
    r"""The objective that the rule minimises over n at a given sum of n.

    .. math:: \sum_i \frac{G_i^2}{p_i \, n_i} \cdot \frac{1}{1 + \alpha / p_i^\beta}
        = \sum_i \frac{w_i^2}{n_i}

    Args:
        weights: w of `allocation_weights`; prompts of weight 0 have no part in it.
        rollouts: n, above 0 where the weight is.

    Source: GVM-RAFT (arXiv 2505.02391), Eq. 7.
    """
    counted = weights > 0
    return float(np.sum(weights[counted] ** 2 / rollouts[counted]))


def predicted_ratio(
    pass_rates: FloatArray, gradient_norms: FloatArray, rollouts: FloatArray
) -> float:
    r"""By what factor an allocation lowers the bound against as many rollouts for every prompt.

    .. math:: \frac{V(\bar n)}{V(n)}, \qquad \bar n_i = \frac{1}{k} \sum_{j=1}^{k} n_j

    Without regularisation and bounds it is :math:`k \sum_i a_i^2 / (\sum_i a_i)^2` with
    :math:`a_i = G_i / \sqrt{p_i}`, which is at least 1.

    Args:
        pass_rates: p, above 0, float64 [k].
        gradient_norms: G, above 0.
        rollouts: n, above 0; whole numbers or shares.

    Source: the ratio of two bounds of GVM-RAFT (arXiv 2505.02391), section 3.1.
    """
    uniform = np.full(len(rollouts), np.mean(rollouts))
    return predicted_variance(pass_rates, gradient_norms, uniform) / predicted_variance(
        pass_rates, gradient_norms, rollouts
    )
