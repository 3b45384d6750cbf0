"""What the measured losses say: every form's errors, the best mixture, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.forecast.autoscale import autoscale_mixture
from stages.forecast.forecaster import Forecaster, forecaster, solved_transport, value_and_slopes
from stages.forecast.forms import POLYNOMIALS, Form
from stages.forecast.minimum import least_mixture
from stages.forecast.projection import Projection, error_amplification
from stages.forecast.rational import RationalForm
from stages.forecast.settings import ForecastSettings
from stages.forecast.transport_value import MixtureTransport
from stages.mixture.simplex import FloatArray, Mixture
from stages.pilots.design import random_mixtures

FORMS: tuple[Form, ...] = (*POLYNOMIALS[:-2], RationalForm(), *POLYNOMIALS[-2:])
"""Those that use transport last: of forms that err alike the first is recommended."""


@dataclass(frozen=True)
class Measured:
    """Mixtures with what was measured of them.

    Attributes:
        mixtures: float64 [n, K].
        losses: float64 [n, 2], at the smaller and the larger scale.
        transport: float64 [n]; zeros where there is no transport.
        energy: float64 [n], likewise.
    """

    mixtures: FloatArray
    losses: FloatArray
    transport: FloatArray
    energy: FloatArray


@dataclass(frozen=True)
class Bounds:
    """Least and largest weights that may be recommended, float64 [K] each."""

    lower: FloatArray
    upper: FloatArray


def compared_forms(
    design: Measured,
    held_out: Measured,
    at_budget: Mapping[int, float],
    projection: Projection,
    with_transport: bool,
) -> tuple[list[Forecaster], list[dict[str, Any]]]:
    """Every form fitted to the design, and how it errs on mixtures that it hasn't seen.

    Args:
        design: what forms are fitted to.
        held_out: what they are judged by.
        at_budget: measured losses at the budget, by place in `held_out`.
        projection: to the budget.
        with_transport: whether there are transport values.

    Returns:
        The forecasters, and by form its errors: mean absolute ones, in nats.

    Raises:
        ValueError: the design is too small, or a forecast has no logarithm.
    """
    made: list[Forecaster] = []
    rows: list[dict[str, Any]] = []
    places = sorted(at_budget)
    truth = np.array([at_budget[place] for place in places])
    projected = projection.losses(held_out.losses[:, 0], held_out.losses[:, 1])
    for form in FORMS:
        if form.uses_transport and not with_transport:
            continue
        one = forecaster(form, design.mixtures, design.transport, design.losses, projection)
        forecast = one.losses(held_out.mixtures, held_out.transport)
        by_scale = [
            _mean_error(fit.losses(held_out.mixtures, held_out.transport), measured)
            for fit, measured in zip(one.fits, held_out.losses.T, strict=True)
        ]
        row = {
            "form": form.name,
            "uses_transport": form.uses_transport,
            "penalties": [fit.penalty for fit in one.fits],
            "left_out_error": [
                _mean_error(fit.left_out, measured)
                for fit, measured in zip(one.fits, design.losses.T, strict=True)
            ],
            "held_out_error": by_scale,
            "projected_error": _mean_error(forecast, projected),
        }
        if places:
            row["budget_error"] = _mean_error(forecast[places], truth)
            row["budget_bias"] = float(np.mean(forecast[places] - truth))
        made.append(one)
        rows.append(row)
    return made, rows


def recommended_form(rows: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """Place of the form that errs least on held-out mixtures, and the error that was looked at.

    That is the error at the budget where held-out mixtures were trained on it, else at the larger
    scale.
    """
    by = "budget_error" if all("budget_error" in row for row in rows) else "held_out_error"
    errors = [row[by] if by == "budget_error" else row[by][-1] for row in rows]
    return int(np.argmin(errors)), by


def projection_alone(
    held_out: Measured, at_budget: Mapping[int, float], projection: Projection
) -> dict[str, float]:
    """Errors of the straight line itself: through measured losses, without any form."""
    places = sorted(at_budget)
    truth = np.array([at_budget[place] for place in places])
    forecast = projection.losses(held_out.losses[places, 0], held_out.losses[places, 1])
    return {
        "budget_error": _mean_error(forecast, truth),
        "budget_bias": float(np.mean(forecast - truth)),
    }


def rank_correlations(design: Measured, held_out: Measured, what: str) -> list[float | None]:
    """Spearman's rank correlation of a distance and the loss over all mixtures, by scale.

    Args:
        design: mixtures.
        held_out: more of them.
        what: `transport` or `energy`.

    Returns:
        One number a scale; None where either is the same for all mixtures.
    """
    from scipy.stats import spearmanr

    distance = np.concatenate([getattr(design, what), getattr(held_out, what)])
    losses = np.concatenate([design.losses, held_out.losses])
    if np.ptp(distance) == 0 or (np.ptp(losses, axis=0) == 0).any():
        return [None, None]
    return [float(spearmanr(distance, column).statistic) for column in losses.T]


def least_forecast(
    one: Forecaster,
    transport: MixtureTransport | None,
    design: Measured,
    bounds: Bounds,
    settings: ForecastSettings,
    seed: int,
) -> Mixture:
    """The mixture within bounds of least loss at the budget."""
    starts = _starts(one.losses(design.mixtures, design.transport), design, settings, seed)
    return least_mixture(
        lambda p: one.value_and_slopes(p, transport),
        starts,
        bounds.lower,
        bounds.upper,
        settings.steps,
    )


def least_at_scale(
    one: Forecaster,
    scale: int,
    transport: MixtureTransport | None,
    design: Measured,
    bounds: Bounds,
    settings: ForecastSettings,
    seed: int,
) -> Mixture:
    """The mixture within bounds of least loss at the smaller (0) or larger (1) scale."""
    fit = one.fits[scale]

    def objective(p: FloatArray) -> tuple[float, FloatArray]:
        value, means = solved_transport(one.form, p, transport)
        return value_and_slopes(fit, p, value, means)

    starts = _starts(fit.losses(design.mixtures, design.transport), design, settings, seed)
    return least_mixture(objective, starts, bounds.lower, bounds.upper, settings.steps)


def autoscaled(
    one: Forecaster,
    transport: MixtureTransport | None,
    design: Measured,
    bounds: Bounds,
    settings: ForecastSettings,
    seed: int,
) -> FloatArray:
    """The AutoScale rule's mixture, from the form's optima at both scales.

    Raises:
        ValueError: the optima share no source.
    """
    small, large = (
        least_at_scale(one, scale, transport, design, bounds, settings, seed).weights
        for scale in (0, 1)
    )
    p = one.projection
    return autoscale_mixture(small, large, p.small, p.large, p.budget)


def projection_report(projection: Projection) -> dict[str, Any]:
    """What the projection counts, and how it multiplies errors."""
    scales = (projection.small, projection.large, projection.budget)
    return {
        "of": projection.of,
        "scales": list(scales[:2]),
        "budget": projection.budget,
        "weights": list(projection.weights),
        "amplification": error_amplification(*scales),
    }


def _starts(
    forecast: FloatArray, design: Measured, settings: ForecastSettings, seed: int
) -> list[FloatArray]:
    """The design's best by forecast, the uniform mixture, then random ones."""
    sources = design.mixtures.shape[1]
    best = design.mixtures[int(np.argmin(forecast))]
    others = random_mixtures(sources, settings.starts, seed + 2)
    return [best, np.full(sources, 1 / sources), *others][: settings.starts]


def _mean_error(forecast: FloatArray, truth: FloatArray) -> float:
    return float(np.mean(np.abs(forecast - truth)))
