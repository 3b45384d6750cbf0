"""From the loss at two scales to the loss at a third: a straight line in the logarithm of rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, log
from typing import Literal

import numpy as np

from stages.mixture.simplex import FloatArray


def projection_weights(small: float, large: float, budget: float) -> tuple[float, float]:
    r"""What the losses at two scales count for in the loss at a budget.

    .. math:: \hat L(N) = \frac{\ln (N / N_0)\, \hat L(N_1) - \ln (N / N_1)\, \hat L(N_0)}
              {\ln (N_1 / N_0)}

    This is the line through both points over ln N. Of logarithms of losses it is a power law
    without an irreducible part.

    Source: <projektor> (arXiv 2307.02460), second stage, as its published code computes it.

    Args:
        small: N_0, rows.
        large: N_1, rows, above N_0.
        budget: N, rows.

    Returns:
        Weights of the loss at N_0 and at N_1; they sum to 1.

    Raises:
        ValueError: the scales don't rise, or one isn't positive.
    """
    if not 0 < small < large or not budget > 0:
        raise ValueError(f"scales {small} and {large} must rise from above 0, as budget {budget}")
    of_large = log(budget / small) / log(large / small)
    return 1.0 - of_large, of_large


def error_amplification(small: float, large: float, budget: float) -> float:
    r"""How many times a projected loss errs as much as either fit, were their errors independent.

    .. math:: \sqrt{w_0^2 + w_1^2}

    Source: variance of a weighted sum.

    Args:
        small: N_0, rows.
        large: N_1, rows.
        budget: N, rows.

    Raises:
        ValueError: the scales don't rise, or one isn't positive.
    """
    return hypot(*projection_weights(small, large, budget))


@dataclass(frozen=True)
class Projection:
    """From losses at two scales to the loss at a budget.

    Attributes:
        small: rows of the smaller scale.
        large: rows of the larger one.
        budget: rows to project to.
        of: what goes straight over the logarithm of rows.
    """

    small: int
    large: int
    budget: int
    of: Literal["loss", "log_loss"]

    @property
    def weights(self) -> tuple[float, float]:
        """What the scales count for."""
        return projection_weights(self.small, self.large, self.budget)

    def straight(self, losses: FloatArray) -> FloatArray:
        """What is straight, of losses.

        Raises:
            ValueError: a loss isn't positive and has no logarithm.
        """
        if self.of == "loss":
            return losses
        if not (losses > 0).all():
            raise ValueError(
                "a forecast loss isn't positive and has no logarithm; project the loss"
            )
        return np.asarray(np.log(losses), np.float64)

    def losses(self, small: FloatArray, large: FloatArray) -> FloatArray:
        """Losses at the budget, of those at both scales."""
        low, high = self.weights
        value = low * self.straight(small) + high * self.straight(large)
        return value if self.of == "loss" else np.asarray(np.exp(value), np.float64)

    def slopes(
        self, small: float, large: float, small_slopes: FloatArray, large_slopes: FloatArray
    ) -> FloatArray:
        r"""Gradient of the projected loss, of the losses at both scales and their gradients.

        .. math:: \nabla \hat L(N) = w_0 \nabla \hat L(N_0) + w_1 \nabla \hat L(N_1), \quad
                  \text{of logarithms} \quad \hat L(N) \sum_s w_s \nabla \hat L(N_s) / \hat L(N_s)

        Source: chain rule.
        """
        low, high = self.weights
        if self.of == "loss":
            return low * small_slopes + high * large_slopes
        projected = float(self.losses(np.array([small]), np.array([large]))[0])
        return projected * (low * small_slopes / small + high * large_slopes / large)
