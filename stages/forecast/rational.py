"""The loss as a sum of reciprocals of weighted amounts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.mixture.simplex import FloatArray

_STARTS = 4
_LIMIT = 30.0


@dataclass(frozen=True)
class FittedRational:
    """Coefficients log lambda, float64 [M, K], and left-out predictions."""

    logs: FloatArray
    left_out: FloatArray
    penalty: float | None = None

    def losses(self, p: FloatArray, transport: FloatArray) -> FloatArray:
        """Losses of mixtures; transport bears on none."""
        return rational_losses(self.logs, p)

    def slopes(self, p: FloatArray, transport: float) -> tuple[FloatArray, float]:
        """Partial derivatives at one mixture."""
        scale = np.exp(self.logs)
        return np.asarray(-(1.0 / (scale @ p) ** 2) @ scale, np.float64), 0.0


@dataclass(frozen=True)
class RationalForm:
    r"""K reciprocals: :math:`\hat L(p) = \sum_{i=1}^K 1 / \sum_k \lambda_{ik} p_k`.

    That is how least squares errs with rows from several sources: the trace of the inverse of a
    weighted sum of covariances, here diagonal. "Rational" is a baseline of <projektor> after
    Hashimoto 2021 (Model performance scaling with multiple data sources, ICML), whose abstract
    names a rational function; its parametrisation we could not obtain, this one is ours.
    """

    name: str = "rational"
    uses_transport: bool = False

    def fitted(self, p: FloatArray, transport: FloatArray, losses: FloatArray) -> FittedRational:
        """Fit by least squares of log lambda, from several starts; refitted with each row left out.

        Raises:
            ValueError: no start converges, or the losses aren't all positive.
        """
        if not (losses > 0).all():
            raise ValueError("rational: a loss isn't positive, which the form can't be")
        sources = p.shape[1]
        level = np.log(sources / losses.mean())
        draws = np.random.default_rng(0).normal(0.0, 1.0, (_STARTS, sources, sources))
        logs = min(
            (_least_squares(p, losses, level + draw) for draw in draws),
            key=lambda found: float(((rational_losses(found, p) - losses) ** 2).sum()),
        )
        left_out = np.empty(len(losses))
        for i in range(len(losses)):
            others = np.arange(len(losses)) != i
            refitted = _least_squares(p[others], losses[others], logs)
            left_out[i] = rational_losses(refitted, p[i : i + 1])[0]
        return FittedRational(logs, left_out)


def rational_losses(logs: FloatArray, p: FloatArray) -> FloatArray:
    """Losses of mixtures [n, K] for log lambda [M, K]; float64 [n]."""
    return np.asarray((1.0 / (p @ np.exp(logs).T)).sum(axis=1), np.float64)


def _least_squares(p: FloatArray, losses: FloatArray, start: FloatArray) -> FloatArray:
    from scipy.optimize import least_squares

    def residuals(flat: FloatArray) -> FloatArray:
        return rational_losses(flat.reshape(start.shape), p) - losses

    def jacobian(flat: FloatArray) -> FloatArray:
        scale = np.exp(flat.reshape(start.shape))
        inverse = 1.0 / (p @ scale.T) ** 2
        return np.asarray(
            (-inverse[:, :, None] * p[:, None, :] * scale[None]).reshape(len(p), -1), np.float64
        )

    # Weights are held to e^-30..e^30: a source that tells nothing would drift to infinity.
    found = least_squares(
        residuals,
        np.clip(start, -_LIMIT + 1, _LIMIT - 1).ravel(),
        jac=jacobian,
        bounds=(-_LIMIT, _LIMIT),
        max_nfev=2000,
    )
    if found.status < 0 or not np.isfinite(found.x).all():
        raise ValueError(f"rational: least squares failed: {found.message}")
    return np.asarray(found.x, np.float64).reshape(start.shape)
