"""Forms of the loss as a function of a mixture, and of its transport value where they use one.

All but `rational` are linear in their coefficients: a form is the list of its monomials in the
weights p_1..p_K and the transport value T. Monomials that are collinear because the weights sum to
1 stay: the ridge takes care of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stages.forecast.ridge import RidgeFit, ridge_fit
from stages.mixture.simplex import FloatArray

Exponents = NDArray[np.int64]
"""Of monomials, int64 [F, K + 1]: of every weight, and of the transport value last."""


class FittedForm(Protocol):
    """A form with coefficients."""

    @property
    def left_out(self) -> FloatArray:
        """The loss of every row by the fit to all others, float64 [n]."""
        ...

    @property
    def penalty(self) -> float | None:
        """Of the ridge; None where there is none."""
        ...

    def losses(self, p: FloatArray, transport: FloatArray) -> FloatArray:
        """Losses of mixtures [n, K] with their transport values [n]; float64 [n]."""
        ...

    def slopes(self, p: FloatArray, transport: float) -> tuple[FloatArray, float]:
        """Partial derivatives at one mixture: by the weights, float64 [K], and by transport."""
        ...


class Form(Protocol):
    """A form to fit."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def uses_transport(self) -> bool:
        """Whether it needs transport values."""
        ...

    def fitted(self, p: FloatArray, transport: FloatArray, losses: FloatArray) -> FittedForm:
        """Fit to mixtures [n, K], their transport values [n], and losses [n]."""
        ...


def monomials(exponents: Exponents, p: FloatArray, transport: FloatArray) -> FloatArray:
    r"""Values of monomials.

    .. math:: \phi_f = T^{e_{f,K+1}} \prod_k p_k^{e_{fk}}

    Args:
        exponents: int64 [F, K + 1].
        p: float64 [n, K].
        transport: float64 [n].

    Returns:
        float64 [n, F].
    """
    variables = np.column_stack([p, transport])
    return np.asarray(np.prod(variables[:, None, :] ** exponents[None], axis=2), np.float64)


def monomial_slopes(exponents: Exponents, p: FloatArray, transport: float) -> FloatArray:
    r"""Partial derivatives of monomials at one mixture.

    .. math:: \partial \phi_f / \partial v_k = e_{fk}\, \phi_f / v_k

    Args:
        exponents: int64 [F, K + 1].
        p: float64 [K].
        transport: T.

    Returns:
        float64 [F, K + 1].
    """
    at, value = p[None], np.array([transport])
    columns = []
    for k in range(exponents.shape[1]):
        lowered = exponents.copy()
        lowered[:, k] = np.maximum(lowered[:, k] - 1, 0)
        columns.append(exponents[:, k] * monomials(lowered, at, value)[0])
    return np.column_stack(columns)


@dataclass(frozen=True)
class FittedPolynomial:
    """A polynomial, or the exponential of one."""

    exponents: Exponents
    fit: RidgeFit
    of_log: bool

    @property
    def left_out(self) -> FloatArray:
        """The loss of every row by the fit to all others, float64 [n]."""
        return np.exp(self.fit.left_out) if self.of_log else self.fit.left_out

    @property
    def penalty(self) -> float | None:
        """Of the ridge."""
        return self.fit.penalty

    def losses(self, p: FloatArray, transport: FloatArray) -> FloatArray:
        """Losses of mixtures."""
        values = self.fit.predictions(monomials(self.exponents, p, transport))
        return np.exp(values) if self.of_log else values

    def slopes(self, p: FloatArray, transport: float) -> tuple[FloatArray, float]:
        """Partial derivatives at one mixture."""
        slopes = self.fit.coefficients @ monomial_slopes(self.exponents, p, transport)
        if self.of_log:
            slopes = slopes * self.losses(p[None], np.array([transport]))[0]
        return slopes[:-1], float(slopes[-1])


@dataclass(frozen=True)
class PolynomialForm:
    """A form that is linear in its coefficients.

    Attributes:
        name: what reports call it.
        exponents_for: its monomials over K sources.
        uses_transport: whether one of them holds T.
        of_log: whether it gives the logarithm of the loss.
    """

    name: str
    exponents_for: Callable[[int], Exponents]
    uses_transport: bool = False
    of_log: bool = False

    def fitted(self, p: FloatArray, transport: FloatArray, losses: FloatArray) -> FittedPolynomial:
        """Fit by ridge.

        Raises:
            ValueError: too few mixtures, or a loss that isn't positive where logarithms are taken.
        """
        if self.of_log and not (losses > 0).all():
            raise ValueError(f"{self.name}: a loss isn't positive and has no logarithm")
        exponents = self.exponents_for(p.shape[1])
        values = np.log(losses) if self.of_log else losses
        fit = ridge_fit(monomials(exponents, p, transport), values)
        return FittedPolynomial(exponents, fit, self.of_log)


def constant_exponents(sources: int) -> Exponents:
    r"""No monomial, the intercept alone: :math:`\hat L = b_0`."""
    return np.zeros((0, sources + 1), np.int64)


def linear_exponents(sources: int) -> Exponents:
    r"""The weights: :math:`\hat L = b_0 + \sum_k b_k p_k`."""
    return np.eye(sources, sources + 1, dtype=np.int64)


def pseudo_quadratic_exponents(sources: int) -> Exponents:
    r"""Weights and their squares: :math:`\hat L = b_0 + \sum_k (b_k p_k + c_k p_k^2)`."""
    first = linear_exponents(sources)
    return np.vstack([first, 2 * first])


def quadratic_exponents(sources: int) -> Exponents:
    r"""All products: :math:`\hat L = b_0 + \sum_k b_k p_k + \sum_{k \le l} c_{kl} p_k p_l`."""
    first = linear_exponents(sources)
    pairs = [first[k] + first[j] for k in range(sources) for j in range(k, sources)]
    return np.vstack([first, *pairs])


def centre_scaling_exponents(sources: int) -> Exponents:
    r"""Transport and weights.

    .. math:: \hat L(p) - \bar L = b\, (T(p) - \bar T) + \sum_k c_k (p_k - \bar p_k)

    Bars are means over the design. <projektor> (arXiv 2307.02460) names a form "center-scaling"
    whose formula we could not obtain; this is ours under that name: the loss moves from the
    design's centre as the transport value does, and by an offset a source. K + 1 slopes.
    """
    transport = np.zeros((1, sources + 1), np.int64)
    transport[0, -1] = 1
    return np.vstack([linear_exponents(sources), transport])


def projektor_exponents(sources: int) -> Exponents:
    r"""Squares, weights and their products with transport, 4 K free coefficients.

    .. math:: \hat L = \sum_k (b_{2k} p_k^2 + b_{1k} p_k + b_0)\, T
              + \sum_k (c_{2k} p_k^2 + c_{1k} p_k + c_0)

    Source: <projektor> (arXiv 2307.02460), first stage, form PQ, as its published notebook states
    it; the constants are collinear with the linear terms, since the weights sum to 1.
    """
    plain = pseudo_quadratic_exponents(sources)
    times = plain.copy()
    times[:, -1] = 1
    return np.vstack([plain, times])


LINEAR = PolynomialForm("linear", linear_exponents)
POLYNOMIALS = (
    PolynomialForm("constant", constant_exponents),
    LINEAR,
    PolynomialForm("log_linear", linear_exponents, of_log=True),
    PolynomialForm("pseudo_quadratic", pseudo_quadratic_exponents),
    PolynomialForm("quadratic", quadratic_exponents),
    PolynomialForm("centre_scaling", centre_scaling_exponents, uses_transport=True),
    PolynomialForm("projektor_pq", projektor_exponents, uses_transport=True),
)
"""From few coefficients to many, those without transport first.

log_linear is in the manner of RegMix and Olmix (arXiv 2407.01492, 2602.12237): the logarithm of the
loss, linear in the weights. It is the exponential law of arXiv 2403.16952 without its constant.
"""
