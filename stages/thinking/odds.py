"""From the NoThinking token's log-probability to difficulty."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def nothinking_log_odds(log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
    r"""Unrounded log-odds of not thinking, nats.

    .. math:: \ell = \log P(\text{NoThinking} \mid x) - \log\bigl(1 - P(\text{NoThinking} \mid x)
        \bigr)

    Where P rounds to 1 in the engine's precision the log-odds are infinite.

    Args:
        log_probs: log P of the NoThinking token as the first one, float64 [n], none above 0.

    Returns:
        float64 [n].

    Source: the indicator of ScaleDiff (arXiv 2509.21070) and AdaptThink (arXiv 2505.13417), Eq. 2,
    made continuous.
    """
    with np.errstate(divide="ignore"):
        # log(1 - e^x) loses all digits on one side of -log 2 by either formula.
        rest = np.where(
            log_probs > -np.log(2), np.log(-np.expm1(log_probs)), np.log1p(-np.exp(log_probs))
        )
    odds: NDArray[np.float64] = log_probs - rest
    return odds


def thinking_probability(log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
    r"""Probability of thinking, :math:`1 - P(\text{NoThinking} \mid x)`, float64 [n].

    Source: the score of OpenDataArena's thinking-probability scorer, unrounded.
    """
    probability: NDArray[np.float64] = -np.expm1(log_probs)
    return probability
