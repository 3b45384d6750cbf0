"""Forms of the loss: their fits, slopes, projection, and the mixtures that they recommend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.pilot.forecasts import (
    FORMS,
    Measured,
    compared_forms,
    projection_alone,
    rank_correlations,
    recommended_form,
)
from stages.forecast.autoscale import autoscale_mixture
from stages.forecast.forecaster import forecaster
from stages.forecast.forms import POLYNOMIALS, monomial_slopes, monomials, projektor_exponents
from stages.forecast.minimum import least_mixture
from stages.forecast.projection import Projection, error_amplification, projection_weights
from stages.forecast.rational import RationalForm, rational_losses
from stages.forecast.ridge import PENALTIES, ridge_fit
from stages.forecast.transport_value import MixtureTransport
from stages.mixture.joint_lp import optimal_mixture_by_lp
from stages.pilots.design import mixture_design, random_mixtures, simplex_lattice

BY_NAME = {form.name: form for form in FORMS}


def data(seed: int, n: int = 40, sources: int = 3) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    return draws.dirichlet(np.ones(sources), n), draws.uniform(0.5, 1.5, n)


def clouds(seed: int, sources: int = 3, per_source: int = 12, m: int = 9) -> Any:
    draws = np.random.default_rng(seed)
    centres = 2 * draws.normal(size=(sources, 4))
    vectors = np.concatenate([c + draws.normal(size=(per_source, 4)) for c in centres])
    source = np.repeat(np.arange(sources), per_source)
    targets = draws.normal(size=(m, 4))
    # Generic masses: with equal ones the duals are degenerate, and T has kinks everywhere.
    mass = draws.dirichlet(np.ones(m))
    return vectors, source, targets, mass


# Designs


@given(st.integers(2, 5), st.integers(1, 5))
def test_lattice_holds_every_mixture_of_its_grid_once(sources: int, parts: int) -> None:
    from itertools import product

    wanted = {c for c in product(range(parts + 1), repeat=sources) if sum(c) == parts}
    found = [
        tuple(np.rint(p * parts).astype(int).tolist()) for p in simplex_lattice(sources, parts)
    ]
    assert len(found) == len(wanted)
    assert set(found) == wanted


@given(st.integers(2, 5), st.integers(5, 60), st.integers(0, 9))
def test_design_covers_the_simplex(sources: int, count: int, seed: int) -> None:
    design = mixture_design(sources, count, seed)
    assert design.shape == (count, sources)
    assert np.allclose(design.sum(axis=1), 1)
    assert (design >= 0).all()
    assert {tuple(p) for p in np.eye(sources)} <= {tuple(p) for p in design}
    assert len(np.unique(design.round(9), axis=0)) == count
    assert np.array_equal(design, mixture_design(sources, count, seed))


def test_larger_design_has_finer_steps() -> None:
    """No point of the simplex is farther from the design than half a lattice cell."""
    points = random_mixtures(3, 2000, 1)
    farthest = [
        np.linalg.norm(points[:, None] - mixture_design(3, n, 0)[None], axis=2).min(axis=1).max()
        for n in (6, 15, 45)
    ]
    assert farthest[0] > farthest[1] > farthest[2]
    assert farthest[2] < 0.12


def test_design_needs_a_mixture_a_source() -> None:
    with pytest.raises(ValueError, match="4 mixtures can't hold each of 5 sources"):
        mixture_design(5, 4, 0)
    with pytest.raises(ValueError, match="one source"):
        mixture_design(1, 4, 0)


# Ridge


@given(st.integers(0, 50), st.sampled_from(PENALTIES))
@settings(max_examples=40)
def test_left_out_predictions_are_those_of_brute_refits(seed: int, penalty: float) -> None:
    """Each row left out, the normal equations of the others solved by themselves."""
    draws = np.random.default_rng(seed)
    x, y = draws.normal(size=(14, 4)), draws.normal(size=14)
    fit = ridge_fit(x, y, [penalty])
    z = x / x.std(axis=0)
    weight = penalty * np.linalg.norm(z - z.mean(axis=0), 2) ** 2
    for i in range(14):
        others = np.arange(14) != i
        a = np.column_stack([np.ones(13), z[others]])
        penalties = np.diag([0.0, *[weight] * 4])
        beta = np.linalg.solve(a.T @ a + penalties, a.T @ y[others])
        assert fit.left_out[i] == pytest.approx(beta[0] + z[i] @ beta[1:], rel=1e-7, abs=1e-9)


def test_coefficients_are_those_of_another_library() -> None:
    from sklearn.linear_model import Ridge

    draws = np.random.default_rng(3)
    x, y = draws.normal(size=(20, 5)) * [1, 5, 0.1, 2, 1], draws.normal(size=20)
    fit = ridge_fit(x, y, [0.03])
    z = x / x.std(axis=0)
    top = np.linalg.norm(z - z.mean(axis=0), 2) ** 2
    other = Ridge(alpha=0.03 * top).fit(z, y)
    assert fit.predictions(x) == pytest.approx(other.predict(z), rel=1e-9)


def test_chosen_penalty_has_the_least_left_out_error() -> None:
    draws = np.random.default_rng(5)
    x = draws.normal(size=(12, 9))
    y = x[:, 0] + draws.normal(size=12)
    errors = {}
    for penalty in PENALTIES:
        fit = ridge_fit(x, y, [penalty])
        errors[penalty] = float(np.mean((fit.left_out - y) ** 2))
    assert ridge_fit(x, y).penalty == min(errors, key=errors.__getitem__)


def test_too_few_rows_for_a_judgement_are_refused() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(ValueError, match="4 rows are too few for 3 features"):
        ridge_fit(x, np.arange(4.0), [0.0])
    with pytest.raises(ValueError, match="needs at least 3"):
        ridge_fit(x[:2], np.arange(2.0))


# Forms


@pytest.mark.parametrize("form", POLYNOMIALS, ids=lambda form: form.name)
@pytest.mark.parametrize("sources", [2, 3, 5])
def test_form_recovers_losses_of_its_own_kind(form: Any, sources: int) -> None:
    p, t = data(1, 60, sources)
    exponents = form.exponents_for(sources)
    draws = np.random.default_rng(2)
    truth = 3.0 + monomials(exponents, p, t) @ draws.normal(scale=0.3, size=len(exponents))
    losses = np.exp(truth / 3) if form.of_log else truth
    fit = form.fitted(p[:40], t[:40], losses[:40])
    assert fit.losses(p, t) == pytest.approx(losses, rel=1e-6)
    assert fit.left_out == pytest.approx(losses[:40], rel=1e-6)


def test_projektor_form_is_the_equation() -> None:
    """Written out, with coefficients of its own; 4 K of its columns are independent."""
    p, t = data(4, 50)
    draws = np.random.default_rng(0)
    b2, b1, c2, c1 = draws.normal(size=(4, 3))
    losses = np.array(
        [
            sum(b2[k] * q[k] ** 2 + b1[k] * q[k] + 0.7 for k in range(3)) * d
            + sum(c2[k] * q[k] ** 2 + c1[k] * q[k] + 0.2 for k in range(3))
            for q, d in zip(p, t, strict=True)
        ]
    )
    fit = BY_NAME["projektor_pq"].fitted(p, t, losses)
    assert fit.losses(p, t) == pytest.approx(losses, abs=1e-7)
    columns = monomials(projektor_exponents(3), p, t)
    assert np.linalg.matrix_rank(columns) == 12


def test_rational_form_recovers_a_sum_of_reciprocals() -> None:
    p = mixture_design(3, 45, 0)
    logs = np.log([[2.0, 0.4, 0.9], [0.5, 1.5, 0.6], [0.8, 0.7, 2.5]])
    losses = rational_losses(logs, p)
    assert losses[7] == pytest.approx(sum(1 / (np.exp(row) @ p[7]) for row in logs))
    fit = RationalForm().fitted(p, np.zeros(45), losses)
    fresh = random_mixtures(3, 50, 9)
    assert fit.losses(fresh, np.zeros(50)) == pytest.approx(rational_losses(logs, fresh), rel=1e-3)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_slopes_are_finite_differences(form: Any) -> None:
    p, t = data(6)
    losses = 4 + p @ [0.3, -0.5, 0.4] + 0.6 * p[:, 0] * p[:, 1] + 0.5 * t
    fit = form.fitted(p, t, losses)
    at, value, step = np.array([0.2, 0.5, 0.3]), 0.9, 1e-6
    by_weight, by_transport = fit.slopes(at, value)

    def loss(q: np.ndarray, d: float) -> float:
        return float(fit.losses(q[None], np.array([d]))[0])

    for k in range(3):
        e = step * np.eye(3)[k]
        assert by_weight[k] == pytest.approx(
            (loss(at + e, value) - loss(at - e, value)) / (2 * step), rel=1e-5, abs=1e-6
        )
    assert by_transport == pytest.approx(
        (loss(at, value + step) - loss(at, value - step)) / (2 * step), rel=1e-5, abs=1e-6
    )


def test_monomial_slopes_at_the_simplex_boundary_are_finite() -> None:
    exponents = projektor_exponents(3)
    slopes = monomial_slopes(exponents, np.array([1.0, 0.0, 0.0]), 0.5)
    squares = np.flatnonzero((exponents[:, 1] == 2) & (exponents[:, -1] == 0))
    assert np.isfinite(slopes).all()
    assert slopes[squares, 1] == 0


# Projection


@given(
    st.floats(-3, 3), st.floats(-0.9, 0.9), st.integers(10, 1000), st.integers(2, 20),
    st.integers(1, 16),
)  # fmt: skip
def test_projection_is_the_line_through_two_points(
    alpha: float, beta: float, small: int, factor: int, more: int
) -> None:
    """L = alpha - beta ln N, and the power law exp(alpha) N^-beta, are met exactly."""
    large, budget = small * factor, small * factor * more
    of_loss = Projection(small, large, budget, "loss")
    at = [np.array([alpha - beta * np.log(n)]) for n in (small, large, budget)]
    assert of_loss.losses(at[0], at[1])[0] == pytest.approx(at[2][0], abs=1e-12)
    of_log = Projection(small, large, budget, "log_loss")
    powers = [np.exp(value) for value in at]
    assert of_log.losses(powers[0], powers[1])[0] == pytest.approx(powers[2][0], rel=1e-12)


def test_amplification_is_the_spread_of_projected_noise() -> None:
    noise = np.random.default_rng(0).normal(size=(2, 200_000))
    projected = Projection(1000, 1500, 10_000, "loss").losses(noise[0], noise[1])
    assert error_amplification(1000, 1500, 10_000) == pytest.approx(projected.std(), rel=0.01)
    assert error_amplification(1000, 1500, 10_000) == pytest.approx(7.36, abs=0.005)
    assert error_amplification(1000, 4000, 16_000) == pytest.approx(np.sqrt(5))
    assert projection_weights(100, 400, 400) == pytest.approx((0, 1))


def test_scales_must_rise() -> None:
    with pytest.raises(ValueError, match="must rise"):
        projection_weights(100, 100, 400)
    with pytest.raises(ValueError, match="isn't positive"):
        Projection(10, 20, 40, "log_loss").losses(np.array([1.0]), np.array([-1.0]))


# Transport and the optimum


def test_transport_slopes_are_finite_differences() -> None:
    transport = MixtureTransport(*clouds(0), "euclidean")
    draws = np.random.default_rng(1)
    for p in draws.dirichlet(5 * np.ones(3), 5):
        _, means = transport.value_and_slopes(p)
        for a, b in ((0, 1), (1, 2)):
            step = 1e-6 * (np.eye(3)[a] - np.eye(3)[b])
            slope = (transport.value(p + step) - transport.value(p - step)) / 2e-6
            assert slope == pytest.approx(means[a] - means[b], abs=1e-6)


@pytest.mark.parametrize("of", ["loss", "log_loss"])
def test_gradient_of_the_projected_loss_is_finite_differences(of: Any) -> None:
    """Through both fits, the projection and the transport, which is solved anew."""
    transport = MixtureTransport(*clouds(2), "euclidean")
    p = mixture_design(3, 24, 0)
    t = transport.values(p)
    losses = np.column_stack([5 + p @ [0.2, 0.9, 0.4] + 0.5 * t, 4 + p @ [0.6, 0.2, 0.3] + 0.8 * t])
    one = forecaster(BY_NAME["projektor_pq"], p, t, losses, Projection(100, 400, 1600, of))
    at = np.array([0.31, 0.27, 0.42])
    value, slopes = one.value_and_slopes(at, transport)
    assert value == pytest.approx(one.losses(at[None], np.array([transport.value(at)]))[0])
    for a, b in ((0, 1), (1, 2)):
        step = 1e-6 * (np.eye(3)[a] - np.eye(3)[b])
        up, _ = one.value_and_slopes(at + step, transport)
        down, _ = one.value_and_slopes(at - step, transport)
        assert (up - down) / 2e-6 == pytest.approx(slopes[a] - slopes[b], abs=1e-5)


def test_descent_finds_the_minimum_of_a_quadratic() -> None:
    """Against a dense grid of the bounded simplex."""
    target = np.array([0.7, 0.35, -0.05])
    lower, upper = np.array([0.0, 0.1, 0.05]), np.array([0.5, 1.0, 1.0])
    found = least_mixture(
        lambda p: (float(((p - target) ** 2).sum()), 2 * (p - target)),
        [np.full(3, 1 / 3)], lower, upper, 200,
    )  # fmt: skip
    grid = simplex_lattice(3, 200)
    grid = grid[((grid >= lower) & (grid <= upper)).all(axis=1)]
    best = grid[((grid - target) ** 2).sum(axis=1).argmin()]
    assert found.weights == pytest.approx(best, abs=0.006)
    assert (found.weights >= lower - 1e-12).all()
    assert (found.weights <= upper + 1e-12).all()


def test_where_the_loss_is_transport_the_optimum_is_the_linear_programme_s() -> None:
    vectors, source, targets, mass = clouds(5)
    transport = MixtureTransport(vectors, source, targets, mass, "euclidean")
    p = mixture_design(3, 24, 0)
    t = transport.values(p)
    losses = np.column_stack([2 + t, 1 + 0.5 * t])
    one = forecaster(BY_NAME["centre_scaling"], p, t, losses, Projection(100, 400, 1600, "loss"))
    from stages.mixture.cost import cost_matrix

    best = optimal_mixture_by_lp(
        cost_matrix(vectors, targets, "euclidean"), source, mass, np.zeros(3), np.ones(3)
    )
    starts = [*np.eye(3), *random_mixtures(3, 6, 0)]
    found = least_mixture(
        lambda q: one.value_and_slopes(q, transport), starts, np.zeros(3), np.ones(3), 200
    )
    # The line through 2 + T and 1 + T / 2 at 100 and 400 rows is 0 at 1600.
    high = mixture_design(3, 300, 1)
    assert found.value <= one.losses(high, transport.values(high)).min() + 1e-4
    small = one.fits[0]

    def at_small(q: np.ndarray) -> tuple[float, np.ndarray]:
        value, means = transport.value_and_slopes(q)
        by_weight, by_transport = small.slopes(q, value)
        loss = float(small.losses(q[None], np.array([value]))[0])
        return loss, by_weight + by_transport * means

    least = least_mixture(at_small, starts, np.zeros(3), np.ones(3), 200)
    assert least.value == pytest.approx(2 + best.value, rel=2e-3)
    assert least.value >= 2 + best.value - 1e-6


def test_autoscale_continues_geometrically() -> None:
    """n(3) = n(2)^2 / n(1) where the scales are evenly apart in the logarithm."""
    first, second = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])
    found = autoscale_mixture(first, second, 100, 400, 1600)
    amounts = (second * 400) ** 2 / (first * 100)
    assert found == pytest.approx(amounts / amounts.sum())
    assert autoscale_mixture(first, second, 100, 400, 400) == pytest.approx(second)
    gone = autoscale_mixture(np.array([0.0, 1.0]), np.array([0.5, 0.5]), 100, 400, 1600)
    assert gone == pytest.approx([0, 1])
    with pytest.raises(ValueError, match="no source has weight at both"):
        autoscale_mixture(np.array([1.0, 0.0]), np.array([0.0, 1.0]), 100, 400, 1600)


# Comparison


def planted(seed: int, noise: float) -> tuple[Measured, Measured, dict[int, float], Any]:
    """Losses that are log-linear in the weights and a power law of rows."""
    draws = np.random.default_rng(seed)
    projection = Projection(100, 400, 1600, "log_loss")
    sets = []
    for p in (mixture_design(3, 24, seed), random_mixtures(3, 8, seed + 100)):
        clean = np.column_stack(
            [np.exp(p @ [0.6, 1.0, 1.3]) * n ** -(0.1 + 0.05 * p[:, 0]) for n in (100, 400)]
        )
        losses = clean * np.exp(noise * draws.normal(size=clean.shape))
        t = 0.5 + p @ [0.2, 0.1, 0.6]
        sets.append(Measured(p, losses, t, t**2))
    p = sets[1].mixtures
    truth = np.exp(p @ [0.6, 1.0, 1.3]) * 1600 ** -(0.1 + 0.05 * p[:, 0])
    return sets[0], sets[1], dict(enumerate(truth.tolist())), projection


def test_form_that_the_losses_follow_is_recommended() -> None:
    design, held_out, at_budget, projection = planted(0, 0.0)
    made, rows = compared_forms(design, held_out, at_budget, projection, True)
    place, by = recommended_form(rows)
    assert by == "budget_error"
    assert made[place].form.name == "log_linear"
    assert rows[place]["budget_error"] < 1e-6
    assert {row["form"] for row in rows} == set(BY_NAME)
    worst = next(row for row in rows if row["form"] == "constant")
    assert worst["budget_error"] == max(row["budget_error"] for row in rows)
    alone = projection_alone(held_out, at_budget, projection)
    assert alone["budget_error"] < 1e-9
    without, _ = compared_forms(design, held_out, {}, projection, False)
    assert not any(one.form.uses_transport for one in without)


def test_intervals_hold_as_often_as_they_say() -> None:
    """Over many designs, for forecasts of fresh noisy losses of the form's own kind."""
    inside = total = 0
    for seed in range(40):
        design, held_out, at_budget, projection = planted(seed, 0.01)
        one = forecaster(
            BY_NAME["log_linear"], design.mixtures, design.transport, design.losses, projection
        )
        forecast = one.losses(held_out.mixtures, held_out.transport)
        draws = np.random.default_rng(seed)
        # A projection of measured losses errs as one of fits to them does, and more.
        noisy = projection.losses(
            *(np.array(list(at_budget.values())) * np.exp(0.01 * draws.normal(size=(2, 8))))
        )
        for loss, truth in zip(forecast.tolist(), noisy.tolist(), strict=True):
            low, high = one.interval(loss, 0.8)
            inside += low <= truth <= high
            total += 1
    assert inside / total == pytest.approx(0.8, abs=0.07)


def test_rank_correlation_is_that_of_the_order() -> None:
    design, held_out, _, _ = planted(0, 0.0)
    rising = Measured(design.mixtures, design.losses, design.losses[:, 0] ** 3, -design.energy)
    other = Measured(
        held_out.mixtures, held_out.losses, held_out.losses[:, 0] ** 3, -held_out.energy
    )
    assert rank_correlations(rising, other, "transport")[0] == pytest.approx(1)
    level = Measured(design.mixtures, design.losses, np.ones(24), np.ones(24))
    same = Measured(held_out.mixtures, held_out.losses, np.ones(8), np.ones(8))
    assert rank_correlations(level, same, "transport") == [None, None]
