r"""A pull towards the natural mixture, :math:`\tau\, \mathrm{KL}(p \| p^0)`, and planes below it.

Transport plus the pull is convex, so that the same cutting planes minimise it: a plane below the
one plus a plane below the other lies below their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import xlogy

from stages.mixture.cuts import Cuts
from stages.mixture.simplex import FloatArray

_LEAST = 1e-12
"""Weight at which a tangent at weight 0 is taken instead, where the slope would be infinite."""


@dataclass(frozen=True)
class Pull:
    """A pull.

    Attributes:
        strength: tau, in units of the cost.
        natural: p0, float64 [K], positive, sum 1.
    """

    strength: float
    natural: FloatArray

    def divergence(self, p: FloatArray) -> float:
        r""":math:`\mathrm{KL}(p \| p^0) = \sum_k p_k \log (p_k / p^0_k)`.

        Source: Kullback and Leibler 1951.

        Args:
            p: float64 [K], on the simplex.
        """
        return float(np.sum(xlogy(p, p / self.natural)))

    def value(self, p: FloatArray) -> float:
        r""":math:`\tau\, \mathrm{KL}(p \| p^0)`; p is float64 [K], on the simplex."""
        return self.strength * self.divergence(p)

    def joined(self, cuts: Cuts, points: FloatArray) -> Cuts:
        r"""Cuts of the sum: each cut with the tangent at a point, wherever that is.

        .. math:: \mathrm{KL}(p \| p^0) \ge \sum_k p_k \log \frac{z_k}{p^0_k} + 1 - \sum_k z_k

        for any positive z and any p on the simplex.
        Source: convexity of :math:`t \log t`; tangent of the generalised divergence.

        Args:
            cuts: J cuts of the transport, over K weights.
            points: z, float64 [J, K]: one for each cut; or [1, K]: one for all.

        Returns:
            J cuts.
        """
        z = np.maximum(points, _LEAST)
        slopes = self.strength * np.log(z / self.natural)
        constants = self.strength * (1.0 - z.sum(axis=1))
        return Cuts(cuts.slopes + slopes, cuts.constants + constants)


def stacked(*parts: Cuts) -> Cuts:
    """All cuts of all parts."""
    return Cuts(
        np.concatenate([part.slopes for part in parts]),
        np.concatenate([part.constants for part in parts]),
    )
