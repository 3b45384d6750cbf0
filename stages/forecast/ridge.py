"""Ridge regression with an unpenalised intercept, its penalty chosen by leave-one-out error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.mixture.simplex import FloatArray

PENALTIES = (0.0, *(10.0**power for power in range(-8, 3)))
"""Relative to the largest squared singular value of the standardised features."""

_RANK = 1e-10
_LEVERAGE = 1 - 1e-9


@dataclass(frozen=True)
class RidgeFit:
    """A fit.

    Attributes:
        intercept: of raw features.
        coefficients: of raw features, float64 [F].
        penalty: the chosen one, relative (see `PENALTIES`).
        left_out: what each row is predicted to be by the fit to all others, float64 [n].
    """

    intercept: float
    coefficients: FloatArray
    penalty: float
    left_out: FloatArray

    def predictions(self, features: FloatArray) -> FloatArray:
        """Predicted values of rows, float64 [n]."""
        return np.asarray(self.intercept + features @ self.coefficients, np.float64)


def ridge_fit(
    features: FloatArray, values: FloatArray, penalties: Sequence[float] = PENALTIES
) -> RidgeFit:
    r"""Least squares with a penalty on the slopes of standardised features.

    .. math:: \min_{\beta_0, \beta} \sum_i (y_i - \beta_0 - z_i \beta)^2 + \lambda \lVert \beta
              \rVert^2, \qquad y_i - \hat y_{(-i)} = \frac{y_i - \hat y_i}{1 - H_{ii}}

    z are the features divided by their standard deviations over all rows. Collinear ones (weights
    sum to 1) are no trouble: without a penalty the solution of least norm is taken. A penalty under
    which some row is fitted by itself alone (H_ii = 1) can't be judged and isn't chosen.

    Source: Hoerl and Kennard 1970; leave-one-out in closed form, Allen 1974 (PRESS).

    Args:
        features: float64 [n, F]; F may be 0.
        values: float64 [n].
        penalties: to choose from.

    Raises:
        ValueError: there are too few rows to leave one out.
    """
    n = len(values)
    if n < 3:
        raise ValueError(f"{n} rows: leaving one out of them needs at least 3")
    centre = features.mean(axis=0)
    spread = features.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    z = (features - centre) / spread
    mean = float(values.mean())
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    kept = s > _RANK * s.max(initial=0.0)
    u, s, vt = u[:, kept], s[kept], vt[kept]
    projected = u.T @ (values - mean)
    best: tuple[float, float, FloatArray, FloatArray] | None = None
    for penalty in penalties:
        shrink = s**2 / (s**2 + penalty * s.max(initial=0.0) ** 2)
        leverage = 1.0 / n + (u**2) @ shrink
        if leverage.max() > _LEVERAGE:
            continue
        fitted = mean + u @ (shrink * projected)
        left_out = values - (values - fitted) / (1.0 - leverage)
        error = float(np.mean((values - left_out) ** 2))
        if best is None or error < best[0]:
            best = (error, penalty, shrink, left_out)
    if best is None:
        raise ValueError(f"{n} rows are too few for {features.shape[1]} features")
    _, penalty, shrink, left_out = best
    slopes = (vt.T @ (shrink / s * projected)) / spread
    return RidgeFit(float(mean - centre @ slopes), slopes, penalty, left_out)
