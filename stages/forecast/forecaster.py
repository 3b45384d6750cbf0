"""A form fitted at two scales and projected to a budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.forecast.forms import FittedForm, Form
from stages.forecast.projection import Projection
from stages.forecast.transport_value import MixtureTransport
from stages.mixture.simplex import FloatArray


@dataclass(frozen=True)
class Forecaster:
    """Forecasts of one form.

    Attributes:
        form: which.
        fits: at the smaller and the larger scale.
        projection: to the budget.
        residuals: of the projected leave-one-out losses, in what is straight, float64 [n].
    """

    form: Form
    fits: tuple[FittedForm, FittedForm]
    projection: Projection
    residuals: FloatArray

    def losses(self, p: FloatArray, transport: FloatArray) -> FloatArray:
        """Losses at the budget of mixtures [n, K] with their transport values [n]."""
        small, large = (fit.losses(p, transport) for fit in self.fits)
        return self.projection.losses(small, large)

    def half_width(self, coverage: float) -> float:
        r"""Half of an interval, in what is straight.

        .. math:: t_{n-1, (1 + c) / 2} \sqrt{\tfrac{1}{n} \sum_i r_i^2}

        r are the residuals of the design's mixtures, each left out of both fits, then projected
        with the same weights as the forecast. They hold the errors of the fits and the noise of
        trainings, amplified; not how far the true loss is from a straight line.

        Args:
            coverage: c.
        """
        from scipy.stats import t

        n = len(self.residuals)
        spread = float(np.sqrt(np.mean(self.residuals**2)))
        return float(t.ppf((1 + coverage) / 2, n - 1)) * spread

    def interval(self, loss: float, coverage: float) -> tuple[float, float]:
        """The interval about a forecast loss."""
        half = self.half_width(coverage)
        if self.projection.of == "loss":
            return loss - half, loss + half
        return loss * float(np.exp(-half)), loss * float(np.exp(half))

    def value_and_slopes(
        self, p: FloatArray, transport: MixtureTransport | None
    ) -> tuple[float, FloatArray]:
        r"""Projected loss at one mixture, and its gradient, the transport solved at this mixture.

        .. math:: \frac{d \hat L}{d p_k} = \frac{\partial \hat L}{\partial p_k}
                  + \frac{\partial \hat L}{\partial T}\, h_k(p)

        Source: chain rule; h is a subgradient of T.
        """
        value, means = solved_transport(self.form, p, transport)
        found = [value_and_slopes(fit, p, value, means) for fit in self.fits]
        (small, small_slopes), (large, large_slopes) = found
        loss = self.projection.losses(np.array([small]), np.array([large]))[0]
        return float(loss), self.projection.slopes(small, large, small_slopes, large_slopes)


def solved_transport(
    form: Form, p: FloatArray, transport: MixtureTransport | None
) -> tuple[float, FloatArray]:
    """Transport value and slopes at a mixture; zeros where the form doesn't use them.

    Raises:
        ValueError: the form uses transport, and there is none.
    """
    if not form.uses_transport:
        return 0.0, np.zeros(len(p))
    if transport is None:
        raise ValueError(f"{form.name} needs transport values")
    return transport.value_and_slopes(p)


def value_and_slopes(
    fit: FittedForm, p: FloatArray, transport: float, means: FloatArray
) -> tuple[float, FloatArray]:
    """Loss of one fit at a mixture, and its gradient by the weights, transport's part in it."""
    by_weight, by_transport = fit.slopes(p, transport)
    loss = float(fit.losses(p[None], np.array([transport]))[0])
    return loss, by_weight + by_transport * means


def forecaster(
    form: Form, p: FloatArray, transport: FloatArray, losses: FloatArray, projection: Projection
) -> Forecaster:
    """Fit a form at both scales.

    Args:
        form: which.
        p: mixtures of the design, [n, K].
        transport: their transport values, [n].
        losses: measured, [n, 2]: at the smaller and the larger scale.
        projection: to the budget.

    Raises:
        ValueError: the design is too small for the form.
    """
    small = form.fitted(p, transport, losses[:, 0])
    large = form.fitted(p, transport, losses[:, 1])
    projected = projection.losses(small.left_out, large.left_out)
    measured = projection.losses(losses[:, 0], losses[:, 1])
    residuals = projection.straight(projected) - projection.straight(measured)
    return Forecaster(form, (small, large), projection, residuals)
