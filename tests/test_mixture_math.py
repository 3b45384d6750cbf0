"""Mixture stage: each test states the equation that it checks and where the equation comes from."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.spatial.distance import cdist

from stages.mixture.bundle import nearest_below_level, optimal_mixture
from stages.mixture.certificate import (
    CutSums,
    certified_lower_bound,
    cut_sums,
    full_cuts,
    near_optimal_ranges,
    value_lower_bound_at,
)
from stages.mixture.cost import (
    Metric,
    cosine_cost,
    cost_matrix,
    euclidean_cost,
    squared_euclidean_cost,
)
from stages.mixture.cuts import Cuts, lowest_point
from stages.mixture.debiased import debiased_mixture, halves, self_transport
from stages.mixture.energy import EnergySums, energy_mixture, energy_ranges, energy_sums
from stages.mixture.joint_lp import optimal_mixture_by_lp
from stages.mixture.on_device import lowest_on
from stages.mixture.pull import Pull
from stages.mixture.simplex import (
    FloatArray,
    IntArray,
    least_dot,
    nearest_mixture,
    row_weights,
)
from stages.mixture.space import Space, principal_projection, projection_of, task_penalty
from stages.mixture.transport import (
    TransportNotSolved,
    c_transform,
    c_transforms,
    mean_potential_per_source,
    transport,
)
from stages.mixture.weightings import (
    chameleon_weights,
    kept_in_proportion,
    nearest_rows,
    neighbour_shares,
)


@dataclass(frozen=True)
class Problem:
    """Rows of K sources, a weighted target and the Euclidean cost between them."""

    x: FloatArray
    source: IntArray
    y: FloatArray
    b: FloatArray
    cost: FloatArray

    @property
    def n_sources(self) -> int:
        """K."""
        return int(self.source.max()) + 1

    @property
    def free(self) -> tuple[FloatArray, FloatArray]:
        """Bounds that allow the whole simplex."""
        return np.zeros(self.n_sources), np.ones(self.n_sources)

    def value(self, p: FloatArray) -> float:
        """F(p) = OT(sum_k p_k mu_k, nu)."""
        return transport(self.cost, row_weights(p, self.source), self.b).value


def gaussian_problem(
    seed: int, sources: int = 3, rows: int = 20, atoms: int = 25, d: int = 4, generic: bool = True
) -> Problem:
    """Gaussian sources and a target near their centres; `generic` target weights avoid kinks."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(sources, d))
    source = np.repeat(np.arange(sources), rows)
    x = centres[source] + rng.normal(size=(source.size, d))
    y = 0.8 * centres[rng.integers(0, sources, atoms)] + rng.normal(size=(atoms, d))
    b = rng.uniform(0.2, 1.0, atoms) if generic else np.ones(atoms)
    return Problem(x, source, y, b / b.sum(), euclidean_cost(x, y))


def pairs_of(problem: Problem, metric: Metric = "euclidean", blocks: int = 1) -> EnergySums:
    """Sums over all pairs of a problem."""
    return energy_sums(
        problem.x, problem.source, problem.y, problem.b, metric, problem.n_sources, blocks
    )


# Ground costs


@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "cosine"])
def test_cost_random_rows_matches_definition(metric):
    """|x - y|, |x - y|^2 and 1 - x.y / (|x| |y|). Source: definitions."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 7)).astype(np.float32), rng.normal(size=(20, 7)) + 0.5
    name = {"squared_euclidean": "sqeuclidean"}.get(metric, metric)
    np.testing.assert_allclose(cost_matrix(x, y, metric), cdist(x, y, name), atol=1e-13)


@pytest.mark.parametrize("cost", [euclidean_cost, squared_euclidean_cost, cosine_cost])
def test_cost_of_row_to_itself_far_from_origin_is_zero(cost):
    """c(x, x) = 0 and c >= 0. Source: definition of a distance."""
    x = np.random.default_rng(1).normal(size=(50, 33)) + 10.0
    y = np.vstack([x, x + 1e-9])
    values = cost(x, y)
    assert np.all(np.diagonal(values[:, :50]) == 0)
    assert values.min() >= 0
    nudged = np.diagonal(euclidean_cost(x, y)[:, 50:])
    np.testing.assert_allclose(nudged, 1e-9 * np.sqrt(33), rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_cost_row_not_finite_raises_naming_row(bad):
    """|x - y| is undefined. Source: definition."""
    x = np.ones((4, 2))
    x[2, 1] = bad
    with pytest.raises(ValueError, match="row 2 of y"):
        euclidean_cost(np.ones((3, 2)), x)


def test_cost_cosine_of_zero_vector_raises_naming_row():
    """Cosine x / |x| is undefined at 0. Source: definition."""
    x = np.ones((4, 2))
    x[1] = 0.0
    with pytest.raises(ValueError, match="row 1 of x"):
        cosine_cost(x, np.ones((3, 2)))
    assert euclidean_cost(x, np.ones((3, 2)))[1, 0] == pytest.approx(np.sqrt(2))


# Transport (T1, T2, T4, T14)


def test_transport_random_weights_has_strong_duality():
    """T1: <C, P> = <a, f> + <b, g> with f + g <= C. Source: LP duality."""
    problem = gaussian_problem(1)
    a = row_weights(np.array([0.2, 0.5, 0.3]), problem.source)
    answer = transport(problem.cost, a, problem.b)
    f, g = answer.source_potential, answer.target_potential
    reference = ot.emd2(a, problem.b, problem.cost)
    assert answer.value == pytest.approx(reference, rel=1e-9)
    assert a @ f + problem.b @ g == pytest.approx(reference, rel=1e-9)
    assert (f[:, None] + g - problem.cost).max() <= 1e-12


def test_transport_massless_target_atoms_equals_transport_without_them():
    """Atoms with b_j = 0 drop out of <C, P>, and bind no f_i. Source: LP duality."""
    problem = gaussian_problem(2)
    a = row_weights(np.array([0.2, 0.5, 0.3]), problem.source)
    b = problem.b.copy()
    b[:10] = 0.0
    answer = transport(problem.cost, a, b)
    assert answer.value == pytest.approx(transport(problem.cost[:, 10:], a, b[10:]).value)
    dual = a @ answer.source_potential + b / b.sum() @ answer.target_potential
    assert dual == pytest.approx(answer.value, rel=1e-9)
    f = c_transform(problem.cost[:, 10:], answer.target_potential[10:])
    np.testing.assert_array_equal(answer.source_potential, f)


def test_transport_warm_start_from_other_weights_gives_cold_value():
    """Least <C, P> doesn't depend on where the simplex starts. Source: definition of a minimum."""
    problem = gaussian_problem(3)
    weights = [row_weights(np.array(p), problem.source) for p in ([0.6, 0.4, 0], [0.1, 0.2, 0.7])]
    first, cold = (transport(problem.cost, a, problem.b) for a in weights)
    warm = transport(problem.cost, weights[1], problem.b, first)
    assert warm.value == pytest.approx(cold.value, rel=1e-12)
    assert abs(first.value - cold.value) > 1e-3


@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_transport_cost_in_other_unit_scales_value(unit):
    """T9: OT(s C) = s OT(C); POT alone fails at 1e-12. Source: linearity of <C, P>."""
    problem = gaussian_problem(4, rows=60, atoms=80)
    a = row_weights(np.array([0.2, 0.5, 0.3]), problem.source)
    value = transport(problem.cost, a, problem.b).value
    scaled = transport(problem.cost * unit, a, problem.b).value
    assert scaled / unit == pytest.approx(value, rel=1e-9)


def slopes_along(problem: Problem, p: FloatArray, direction: FloatArray) -> FloatArray:
    """Backward difference, h . direction and forward difference."""
    step = 1e-6
    answer = transport(problem.cost, row_weights(p, problem.source), problem.b)
    h = mean_potential_per_source(answer.source_potential, problem.source, p.size)
    back, ahead = problem.value(p - step * direction), problem.value(p + step * direction)
    return np.array([(answer.value - back) / step, h @ direction, (ahead - answer.value) / step])


def test_gradient_uniform_weights_lies_between_one_sided_differences():
    """T2: F'(p; -d) <= h . d <= F'(p; d). Source: LP duality, h is a subgradient of convex F."""
    problem = gaussian_problem(5, generic=False)
    kinks = 0
    for p, (i, j) in itertools.product(
        [(0.2, 0.5, 0.3), (0.25, 0.25, 0.5), (0.4, 0.4, 0.2)], [(0, 1), (1, 2), (2, 0)]
    ):
        direction = np.eye(3)[i] - np.eye(3)[j]
        backward, slope, forward = slopes_along(problem, np.array(p), direction)
        assert backward - 1e-7 <= slope <= forward + 1e-7
        kinks += forward - backward > 1e-4
    assert kinks > 0, "no kink met: the bracket was not put to the test"


def test_gradient_generic_weights_equals_central_difference():
    """T2: h . d = F'(p; d) where F is differentiable. Source: Danskin's theorem."""
    problem = gaussian_problem(6)
    rng = np.random.default_rng(6)
    for _ in range(8):
        p = nearest_mixture(rng.dirichlet(np.ones(3)), np.full(3, 0.05), np.ones(3))
        direction = rng.normal(size=3)
        direction -= direction.mean()
        backward, slope, forward = slopes_along(problem, p, direction)
        assert slope == pytest.approx((backward + forward) / 2, abs=1e-6)


def test_gradient_of_source_without_weight_equals_forward_difference():
    """T4: h_k from f = min_j (C - g) is right at p_k = 0; POT's own u isn't. Source: LP duality."""
    problem = gaussian_problem(0)
    p, step = np.array([0.6, 0.4, 0.0]), 1e-6
    direction = np.array([-0.6, -0.4, 1.0])
    a = row_weights(p, problem.source)
    answer = transport(problem.cost, a, problem.b)
    difference = (problem.value(p + step * direction) - answer.value) / step
    h = mean_potential_per_source(answer.source_potential, problem.source, 3)
    assert h @ direction == pytest.approx(difference, abs=1e-6)
    _, log = ot.emd2(a, problem.b, problem.cost, log=True)
    loose = mean_potential_per_source(log["u"], problem.source, 3)
    assert abs(loose @ direction - difference) > 0.1


def test_mean_potential_with_row_weights_is_weighted_mean():
    """h_k = sum w f / sum w over source k. Source: definition."""
    h = mean_potential_per_source(np.array([1.0, 3.0, 5.0]), [0, 0, 1], 2, [3.0, 1.0, 2.0])
    np.testing.assert_allclose(h, [1.5, 5.0])
    with pytest.raises(ValueError, match="source 2 has no rows"):
        mean_potential_per_source(np.array([1.0, 3.0, 5.0]), [0, 0, 1], 3)


def test_transport_out_of_iterations_raises_instead_of_warning():
    """T14: a plan that isn't optimal is only an upper bound. Source: POT's result code."""
    problem = gaussian_problem(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TransportNotSolved, match="numItermax"):
            transport(problem.cost, np.ones(60), problem.b, max_iterations=5)


@pytest.mark.parametrize("bad", [-0.1, np.nan])
def test_transport_weight_not_a_mass_raises_naming_atom(bad):
    """P >= 0 needs a >= 0. Source: constraints of the LP."""
    problem = gaussian_problem(7)
    a = np.ones(60)
    a[3] = bad
    with pytest.raises(ValueError, match=r"a\[3\]"):
        transport(problem.cost, a, problem.b)


# Simplex with bounds


def random_mixtures(seed: int, lower: FloatArray, upper: FloatArray) -> FloatArray:
    """Points of the bounded simplex: convex combinations of its vertices."""
    rng = np.random.default_rng(seed)
    corners = np.array([least_dot(rng.normal(size=lower.size), lower, upper) for _ in range(30)])
    return rng.dirichlet(np.full(len(corners), 0.2), size=300) @ corners


LOWER, UPPER = np.array([0.1, 0.0, 0.05, 0.0]), np.array([0.5, 0.3, 0.6, 0.9])


def test_nearest_mixture_random_points_satisfies_variational_inequality():
    """(point - q) . (z - q) <= 0 for all feasible z. Source: projection on a convex set."""
    rng = np.random.default_rng(8)
    others = random_mixtures(8, LOWER, UPPER)
    for point in rng.normal(size=(20, 4)):
        q = nearest_mixture(point, LOWER, UPPER)
        assert q.sum() == pytest.approx(1, abs=1e-14)
        assert np.all((q >= LOWER) & (q <= UPPER))
        assert ((others - q) @ (point - q)).max() <= 1e-12


def test_least_dot_random_slopes_equals_linear_programme():
    """Least p . h, lower <= p <= upper, sum p = 1. Source: LP solved by HiGHS."""
    for slope in np.random.default_rng(9).normal(size=(20, 4)):
        p = least_dot(slope, LOWER, UPPER)
        bounds = np.column_stack([LOWER, UPPER])
        answer = linprog(slope, A_eq=np.ones((1, 4)), b_eq=[1.0], bounds=bounds)
        assert p.sum() == pytest.approx(1, abs=1e-14)
        assert p @ slope == pytest.approx(answer.fun, abs=1e-9)


def test_nearest_below_level_random_cuts_satisfies_variational_inequality():
    """(point - q) . (z - q) <= 0 for all z with M z <= level. Source: convex projection."""
    rng = np.random.default_rng(10)
    others = random_mixtures(10, LOWER, UPPER)
    tested = 0
    for _ in range(20):
        cuts = Cuts(rng.normal(size=(6, 4)), rng.normal(size=6))
        point = others[rng.integers(len(others))]
        low = lowest_point(cuts, LOWER, UPPER)[0]
        level = low + 0.3 * (cuts.value_at(point) - low)
        q = nearest_below_level(point, cuts, level, LOWER, UPPER)
        assert q is not None
        assert cuts.value_at(q) <= level + 1e-9
        assert np.all((q >= LOWER) & (q <= UPPER))
        inside = others[(others @ cuts.vertex_values().T).max(axis=1) <= level]
        if len(inside) and np.abs(point - q).max() > 1e-6:
            assert ((inside - q) @ (point - q)).max() <= 1e-9
            tested += len(inside)
    assert tested > 50


def test_nearest_below_level_empty_set_returns_none():
    """No p has M p <= level below min_p max_j (M p)_j. Source: definition."""
    cuts = Cuts(np.random.default_rng(11).normal(size=(5, 4)), np.zeros(5))
    bound, lowest = lowest_point(cuts, LOWER, UPPER)
    assert nearest_below_level(lowest, cuts, bound - 0.1, LOWER, UPPER) is None


def test_lowest_point_random_cuts_is_a_saddle_point():
    """min_p max_j (M p)_j: bound <= every value, met at the minimiser. Source: LP duality."""
    cuts = Cuts(np.random.default_rng(12).normal(size=(6, 4)), np.zeros(6))
    bound, lowest = lowest_point(cuts, LOWER, UPPER)
    assert cuts.value_at(lowest) == pytest.approx(bound, abs=1e-9)
    values = (random_mixtures(12, LOWER, UPPER) @ cuts.vertex_values().T).max(axis=1)
    assert values.min() >= bound


# Optimal mixture (T3, T7, T9, T13, T14)


def dual_value(problem: Problem) -> float:
    """Largest <b, g> + t with f_i + g_j <= C_ij and mean_{i in k} f_i >= t."""
    n, m = problem.cost.shape
    members = problem.source == np.arange(problem.n_sources)[:, None]
    mean = members / members.sum(axis=1, keepdims=True)
    pairs = np.hstack(
        [np.kron(np.eye(n), np.ones((m, 1))), np.tile(np.eye(m), (n, 1)), np.zeros((n * m, 1))]
    )
    floors = np.hstack([-mean, np.zeros((len(mean), m)), np.ones((len(mean), 1))])
    answer = linprog(
        -np.concatenate([np.zeros(n), problem.b, [1.0]]),
        A_ub=np.vstack([pairs, floors]),
        b_ub=np.concatenate([problem.cost.ravel(), np.zeros(len(mean))]),
        bounds=(None, None),
    )
    return -float(answer.fun)


@pytest.mark.parametrize("seed", [20, 21])
def test_optimal_mixture_free_weights_equals_joint_lp_and_dual(seed):
    """T3: min_p F(p) = min_{P, p} <C, P> = max_g [<b, g> + min_k h_k(g)]. Source: LP duality."""
    problem = gaussian_problem(seed)
    bundle = optimal_mixture(problem.cost, problem.source, problem.b, *problem.free, 1e-8)
    joint = optimal_mixture_by_lp(problem.cost, problem.source, problem.b, *problem.free)
    assert bundle.value == pytest.approx(joint.value, rel=1e-6)
    assert bundle.lower_bound == pytest.approx(joint.value, rel=1e-6)
    assert dual_value(problem) == pytest.approx(joint.value, rel=1e-6)
    assert problem.value(bundle.weights) == pytest.approx(joint.value, rel=1e-6)
    assert problem.value(joint.weights) == pytest.approx(joint.value, rel=1e-6)
    uniform = np.full(3, 1 / 3)
    assert problem.value(uniform) > joint.value * 1.001, "the start was already optimal"


@given(
    seed=st.integers(0, 2**31),
    sources=st.integers(2, 5),
    rows=st.integers(1, 8),
    atoms=st.integers(1, 14),
    floor=st.floats(0, 0.15),
    cap=st.floats(0.5, 1),
)
@settings(max_examples=40)
def test_optimal_mixture_random_problems_equals_joint_lp(seed, sources, rows, atoms, floor, cap):
    """T3: min_p F(p) by cuts = the joint LP by HiGHS, to 1e-6. Source: LP duality."""
    problem = gaussian_problem(seed, sources, rows, atoms)
    bounds = np.full(sources, floor), np.full(sources, cap)
    bundle = optimal_mixture(problem.cost, problem.source, problem.b, *bounds, 1e-8)
    joint = optimal_mixture_by_lp(problem.cost, problem.source, problem.b, *bounds)
    assert bundle.value == pytest.approx(joint.value, rel=1e-6)
    assert bundle.lower_bound == pytest.approx(joint.value, rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.0])
def test_transport_entropic_value_lies_within_epsilon_log_m_above(epsilon):
    """T11: 0 <= OT_eps - OT <= eps log m, OT_eps by Sinkhorn. Source: KL(P | a x b) <= H(b)."""
    problem = gaussian_problem(35)
    a = row_weights(np.array([0.2, 0.5, 0.3]), problem.source)
    plan = ot.sinkhorn(
        a, problem.b, problem.cost, epsilon, "sinkhorn_log", numItermax=100_000, stopThr=1e-12
    )
    product = np.outer(a, problem.b)
    entropic = (problem.cost * plan).sum() + epsilon * (plan * np.log(plan / product)).sum()
    excess = entropic - transport(problem.cost, a, problem.b).value
    assert 0 < excess <= epsilon * np.log(problem.b.size)


def test_c_transforms_many_rows_equals_one_at_a_time():
    """f_ij = min_l (C_il - g_jl), whatever the number of rows. Source: definition."""
    rng = np.random.default_rng(36)
    cost, potentials = rng.normal(size=(300, 7)), rng.normal(size=(3, 7))
    expected = (cost[:, None] - potentials).min(axis=2)
    np.testing.assert_array_equal(c_transforms(cost, potentials), expected)


def test_optimal_mixture_eight_sources_certifies_gap_by_its_cuts():
    """LB <= F* <= UB and UB - LB <= tol UB; cuts are tight at their p. Source: LP duality."""
    problem = gaussian_problem(22, sources=8, rows=12, atoms=60, d=8)
    result = optimal_mixture(problem.cost, problem.source, problem.b, *problem.free, 1e-4)
    joint = optimal_mixture_by_lp(problem.cost, problem.source, problem.b, *problem.free)
    assert result.lower_bound <= joint.value * (1 + 1e-9)
    assert joint.value <= result.value * (1 + 1e-9)
    assert 0 <= result.gap <= 1e-4 * result.value
    assert result.potentials.shape == (result.solves, 60)
    assert result.cuts.slopes.shape == (result.solves, 8)
    h = [
        mean_potential_per_source(c_transform(problem.cost, g), problem.source, 8)
        for g in result.potentials
    ]
    np.testing.assert_allclose(result.cuts.slopes, h, atol=1e-12)
    np.testing.assert_allclose(result.cuts.constants, result.potentials @ problem.b, atol=1e-12)
    assert result.cuts.value_at(result.weights) == pytest.approx(result.value, rel=1e-9)


def test_optimal_mixture_twenty_sources_needs_few_solves():
    """Steps to the nearest point of the level set; Kelley's took 193 here. Source: LNN 1995."""
    problem = gaussian_problem(34, sources=20, rows=20, atoms=100, d=16)
    result = optimal_mixture(problem.cost, problem.source, problem.b, *problem.free, 1e-4)
    assert result.solves <= 60


def test_optimal_mixture_single_source_takes_one_solve():
    """K = 1: the simplex is the point p = 1. Source: definition."""
    problem = gaussian_problem(23, sources=1)
    result = optimal_mixture(problem.cost, problem.source, problem.b, [0.0], [1.0])
    assert result.weights.tolist() == [1.0]
    assert result.solves == 1
    assert result.value == pytest.approx(ot.emd2(np.full(20, 1 / 20), problem.b, problem.cost))


@pytest.mark.parametrize("truth", [[0.5, 0.2, 0.3, 0.0], [0.1, 0.2, 0.3, 0.4]])
def test_optimal_mixture_target_made_of_sources_recovers_weights(truth):
    """T7: nu = sum p*_k mu_k on disjoint atoms: F(p) = 0 iff p = p*. Source: OT is a metric."""
    p = np.array(truth)
    x = np.random.default_rng(24).normal(size=(60, 3))
    source = np.repeat(np.arange(4), 15)
    b = row_weights(p, source)
    result = optimal_mixture(euclidean_cost(x, x), source, b, np.zeros(4), np.ones(4))
    np.testing.assert_allclose(result.weights, p, atol=1e-8)
    assert result.value == pytest.approx(0, abs=1e-10)
    assert result.lower_bound <= 1e-15


def test_value_random_segments_is_convex():
    """T9: F(s p + (1 - s) q) <= s F(p) + (1 - s) F(q). Source: LP value in its right-hand side."""
    problem = gaussian_problem(25)
    rng = np.random.default_rng(25)
    slack = []
    for _ in range(40):
        p, q, s = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3)), rng.uniform()
        chord = s * problem.value(p) + (1 - s) * problem.value(q)
        slack.append(chord - problem.value(s * p + (1 - s) * q))
    assert min(slack) >= -1e-9
    assert max(slack) > 1e-3


def test_optimal_mixture_sources_renamed_permutes_weights():
    """T9: weights follow their sources under relabelling. Source: symmetry of the LP."""
    problem = gaussian_problem(26, sources=4)
    order = np.array([2, 0, 3, 1])
    lower, upper = np.array([0.05, 0.0, 0.1, 0.0]), np.array([0.3, 0.4, 0.5, 1.0])
    plain = optimal_mixture(problem.cost, problem.source, problem.b, lower, upper, 1e-12)
    new_lower, new_upper = np.empty(4), np.empty(4)
    new_lower[order], new_upper[order] = lower, upper
    renamed = optimal_mixture(
        problem.cost, order[problem.source], problem.b, new_lower, new_upper, 1e-12
    )
    assert renamed.value == pytest.approx(plain.value, rel=1e-9)
    np.testing.assert_allclose(renamed.weights[order], plain.weights, atol=1e-7)
    assert np.ptp(plain.weights) > 0.1


def test_value_rows_of_one_source_duplicated_stays():
    """T9: mu_k doesn't change when its rows are repeated. Source: definition of mu_k."""
    problem = gaussian_problem(27)
    twice = np.concatenate([np.arange(60), np.flatnonzero(problem.source == 1)])
    p = np.array([0.3, 0.5, 0.2])
    doubled = transport(problem.cost[twice], row_weights(p, problem.source[twice]), problem.b).value
    assert doubled == pytest.approx(problem.value(p), rel=1e-9)
    best = [
        optimal_mixture(cost, source, problem.b, *problem.free, 1e-10).value
        for cost, source in [
            (problem.cost, problem.source),
            (problem.cost[twice], problem.source[twice]),
        ]
    ]
    assert best[1] == pytest.approx(best[0], rel=1e-9)


def test_optimal_mixture_cost_in_other_unit_keeps_weights():
    """T9: argmin s F = argmin F. Source: linearity of <C, P>."""
    problem = gaussian_problem(28)
    small, large = (
        optimal_mixture(problem.cost * s, problem.source, problem.b, *problem.free, 1e-11)
        for s in (1e-11, 1e9)
    )
    assert small.value / 1e-11 == pytest.approx(large.value / 1e9, rel=1e-9)
    np.testing.assert_allclose(small.weights, large.weights, atol=1e-7)


def test_optimal_mixture_binding_caps_and_floors_are_respected():
    """T13: lower <= p <= upper keeps the problem an LP. Source: LP duality."""
    problem = gaussian_problem(29)
    free = optimal_mixture(problem.cost, problem.source, problem.b, *problem.free)
    most, least = int(free.weights.argmax()), int(free.weights.argmin())
    lower, upper = np.zeros(3), np.full(3, np.inf)
    upper[most] = free.weights[most] - 0.1
    lower[least] = free.weights[least] + 0.05
    bound = optimal_mixture(problem.cost, problem.source, problem.b, lower, upper, 1e-8)
    joint = optimal_mixture_by_lp(problem.cost, problem.source, problem.b, lower, upper)
    for weights in (bound.weights, joint.weights):
        assert np.all((weights >= lower) & (weights <= upper))
        assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert bound.value == pytest.approx(joint.value, rel=1e-6)
    assert bound.value > free.value * (1 + 1e-4)


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        ([0.5, 0.4, 0.2], [1, 1, 1], r"\[0.5, 0.4, 0.2\] sum to 1.1, above 1"),
        ([0, 0, 0], [0.3, 0.3, 0.3], r"\[0.3, 0.3, 0.3\] sum to 0.9, below 1"),
        ([0, 0.5, 0], [1, 0.4, 1], "source 1: need 0 <= 0.5 <= 0.4"),
        ([0, 0, -0.1], [1, 1, 1], "source 2: need 0 <= -0.1"),
        ([0, np.nan, 0], [1, 1, 1], "source 1"),
        ([0, 0], [1, 1, 1], "shape"),
    ],
)
def test_optimal_mixture_infeasible_bounds_raises_naming_them(lower, upper, message):
    """T13: nonempty iff 0 <= l <= u, sum l <= 1 <= sum u. Source: intermediate value theorem."""
    problem = gaussian_problem(30)
    arguments = problem.cost, problem.source, problem.b
    with pytest.raises(ValueError, match=message):
        optimal_mixture(*arguments, lower, upper)
    with pytest.raises(ValueError, match=message):
        optimal_mixture_by_lp(*arguments, lower, upper)
    with pytest.raises(ValueError, match=message):
        energy_mixture(pairs_of(problem), lower, upper)


def test_optimal_mixture_too_few_solves_raises():
    """T14: without UB - LB <= tol UB nothing is returned. Source: stopping rule."""
    problem = gaussian_problem(31)
    with pytest.raises(TransportNotSolved, match="after 2 solves"):
        optimal_mixture(problem.cost, problem.source, problem.b, *problem.free, 1e-9, max_solves=2)


def test_solvers_out_of_steps_raise(monkeypatch):
    """T14: neither energy nor debiased weights come back unsolved. Source: optimality gap."""
    problem = gaussian_problem(37, sources=4, rows=30)
    monkeypatch.setattr("stages.mixture.energy._STEPS", 2)
    with pytest.raises(TransportNotSolved, match="4 sources: optimality gap"):
        energy_mixture(pairs_of(problem), *problem.free)
    monkeypatch.setattr("stages.mixture.debiased._STEPS", 1)
    with pytest.raises(TransportNotSolved, match="still falls after 1 steps"):
        debiased_mixture(
            halves(problem.x, problem.source, 4), problem.y, problem.b, *problem.free,
            Space("euclidean"), [np.eye(4)[0]], 1e-6,
        )  # fmt: skip


def test_optimal_mixture_source_without_rows_raises_naming_it():
    """mu_k needs rows. Source: definition of mu_k."""
    problem = gaussian_problem(32)
    for solve in (optimal_mixture, optimal_mixture_by_lp):
        with pytest.raises(ValueError, match="source 3 has no rows"):
            solve(problem.cost, problem.source, problem.b, np.zeros(4), np.ones(4))


def test_joint_lp_plan_above_limit_raises():
    """The LP has n m variables. Source: size of the plan."""
    problem = gaussian_problem(33)
    with pytest.raises(ValueError, match="60 x 25 entries is above the limit of 1000"):
        optimal_mixture_by_lp(
            problem.cost, problem.source, problem.b, *problem.free, max_plan_entries=1000
        )


# Certificate (T5, T6, T10)


def sums_over(problem: Problem, potentials: FloatArray, rows: IntArray, tile: int = 64) -> CutSums:
    """Sums of the cuts over some rows of the problem."""
    return cut_sums(
        problem.x[rows],
        problem.source[rows],
        problem.y,
        potentials,
        "euclidean",
        problem.n_sources,
        tile_rows=tile,
    )


def test_certificate_potentials_of_sample_bound_full_problem():
    """T5: LB <= min F_full <= F_full(p_sub), LB(p) <= F_full(p). Source: LP duality."""
    full = gaussian_problem(40, rows=120, atoms=40)
    sample = np.concatenate([np.arange(k * 120, k * 120 + 30) for k in range(3)])
    bundle = optimal_mixture(full.cost[sample], full.source[sample], full.b, *full.free)
    sums = sums_over(full, bundle.potentials, np.arange(360))
    bound, lowest = certified_lower_bound(sums, bundle.potentials, full.b, *full.free)
    least = optimal_mixture(full.cost, full.source, full.b, *full.free, 1e-8)
    assert bound <= least.value
    assert least.lower_bound <= full.value(bundle.weights)
    assert bound > 0.9 * least.value, "a bound this loose certifies nothing"
    for p in (bundle.weights, lowest, np.array([0.2, 0.2, 0.6])):
        at = value_lower_bound_at(p, sums, bundle.potentials, full.b)
        assert bound <= at + 1e-12
        assert at <= full.value(p) + 1e-12


def test_cut_any_potential_lies_below_value():
    """T6: F(q) >= q . h(g) + <b, g> for all g, q; equality at optimal g. Source: LP duality."""
    problem = gaussian_problem(41)
    rng = np.random.default_rng(41)
    rows = np.arange(60)
    for scale in (0.01, 0.3, 3.0):
        g = scale * rng.normal(size=(5, 25))
        sums = sums_over(problem, g, rows)
        for q in rng.dirichlet(np.ones(3), size=5):
            assert value_lower_bound_at(q, sums, g, problem.b) <= problem.value(q) + 1e-12
    q = np.array([0.3, 0.3, 0.4])
    best = transport(problem.cost, row_weights(q, problem.source), problem.b)
    g = best.target_potential[None]
    tight = value_lower_bound_at(q, sums_over(problem, g, rows), g, problem.b)
    assert tight == pytest.approx(best.value, rel=1e-9)


@pytest.mark.parametrize("shards", [1, 3, 17])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_certificate_rows_in_other_shards_and_order_gives_same_bound(shards, metric):
    """T10: sums over disjoint shards add up in any order, to 1e-12. Source: linearity of sums."""
    problem = gaussian_problem(42, rows=50)
    rng = np.random.default_rng(42)
    g = 0.3 * rng.normal(size=(4, 25))
    x = np.vstack([problem.x, problem.y])  # costs of 0 are where rounding shows
    source = np.append(problem.source, rng.integers(0, 3, 25))

    def sums(rows: IntArray, tile: int) -> CutSums:
        return cut_sums(x[rows], source[rows], problem.y, g, metric, 3, tile_rows=tile)

    whole = sums(np.arange(len(x)), 4096)
    parts = np.array_split(rng.permutation(len(x)), shards)
    merged = sums(parts[0], 7)
    for part in parts[1:]:
        merged = sums(part, 11) + merged
    np.testing.assert_array_equal(merged.count, whole.count)
    np.testing.assert_allclose(merged.total, whole.total, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.squares, whole.squares, rtol=1e-12, atol=1e-12)
    bounds = [certified_lower_bound(s, g, problem.b, *problem.free)[0] for s in (merged, whole)]
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "cosine"])
def test_c_transforms_by_torch_equal_those_by_numpy(metric, device, monkeypatch):
    """f_ij = min_l (c(x_i, y_l) + pi_il - g_jl), wherever it is computed. Source: definition."""
    monkeypatch.setattr("stages.mixture.on_device.TILE_ROWS", 17)
    problem = gaussian_problem(48)
    rng = np.random.default_rng(48)
    x = np.vstack([problem.x, problem.y, 1e-200 * problem.x[:1]])  # costs of 0, a tiny norm
    penalty = rng.uniform(0, 0.5, size=(len(x), 25))
    g = 0.3 * rng.normal(size=(4, 25))
    for added in (None, penalty):
        cost = cost_matrix(x, problem.y, metric)
        expected = c_transforms(cost if added is None else cost + added, g)
        found = lowest_on(device, x, problem.y, g, metric, added)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_cut_sums_on_a_gpu_equal_those_on_the_processor():
    """Sums of the same c-transforms. Source: definition."""
    problem = gaussian_problem(49, rows=3000, atoms=50)
    g = 0.3 * np.random.default_rng(49).normal(size=(6, 50))
    arguments = problem.x, problem.source, problem.y, g, "euclidean", 3
    here, there = cut_sums(*arguments), cut_sums(*arguments, device="cuda")
    np.testing.assert_array_equal(here.count, there.count)
    np.testing.assert_allclose(here.total, there.total, rtol=1e-12)
    np.testing.assert_allclose(here.squares, there.squares, rtol=1e-12)


def test_cut_sums_known_potential_gives_mean_and_standard_error():
    """h_k = mean of min_j (C_ij - g_j); its error sd / sqrt(n). Source: central limit theorem."""
    problem = gaussian_problem(43)
    g = np.random.default_rng(43).normal(size=(2, 25))
    sums = sums_over(problem, g, np.arange(60))
    lowest = (cdist(problem.x, problem.y)[None] - g[:, None]).min(axis=2).reshape(2, 3, 20)
    np.testing.assert_allclose(sums.means(), lowest.mean(axis=2), rtol=1e-12)
    error = lowest.std(axis=2, ddof=1) / np.sqrt(20)
    np.testing.assert_allclose(sums.standard_errors(), error, rtol=1e-9)


def test_cut_sums_block_of_no_rows_is_neutral_and_cannot_certify():
    """Empty sums are 0; a mean of no rows is undefined. Source: definition."""
    problem = gaussian_problem(44)
    g = np.zeros((2, 25))
    nothing = sums_over(problem, g, np.arange(0))
    some = sums_over(problem, g, np.arange(60))
    np.testing.assert_array_equal((some + nothing).total, some.total)
    with pytest.raises(ValueError, match="source 2 has no rows"):
        certified_lower_bound(
            nothing + sums_over(problem, g, np.arange(40)), g, problem.b, *problem.free
        )


def test_cut_sums_bad_row_raises_with_its_place_in_the_block():
    """min_j c(x, y_j) is undefined for NaN. Source: definition."""
    problem = gaussian_problem(45)
    x = problem.x.copy()
    x[41, 0] = np.nan
    with pytest.raises(ValueError, match="row 41 of x"):
        cut_sums(x, problem.source, problem.y, np.zeros((1, 25)), "euclidean", 3, tile_rows=16)


def test_near_optimal_ranges_three_sources_match_grid_search():
    """[min p_k, max p_k] with M p <= (1 + delta) LB, by enumeration. Source: definition."""
    problem = gaussian_problem(46)
    result = optimal_mixture(problem.cost, problem.source, problem.b, *problem.free, 1e-8)
    cuts = full_cuts(
        sums_over(problem, result.potentials, np.arange(60)), result.potentials, problem.b
    )
    step, delta = 1 / 200, 0.02
    ranges = near_optimal_ranges(cuts, *problem.free, delta)
    grid = np.array([(i, j, 200 - i - j) for i in range(201) for j in range(201 - i)]) * step
    level = (1 + delta) * lowest_point(cuts, *problem.free)[0]
    near = grid[(grid @ cuts.vertex_values().T).max(axis=1) <= level]
    assert len(near) > 50
    assert np.all(near.min(axis=0) >= ranges[:, 0] - 1e-9)
    assert np.all(near.max(axis=0) <= ranges[:, 1] + 1e-9)
    np.testing.assert_allclose(near.min(axis=0), ranges[:, 0], atol=3 * step)
    np.testing.assert_allclose(near.max(axis=0), ranges[:, 1], atol=3 * step)
    scaled = Cuts(cuts.slopes * 1e-11, cuts.constants * 1e-11)
    np.testing.assert_allclose(near_optimal_ranges(scaled, *problem.free, delta), ranges, atol=1e-6)
    narrow = near_optimal_ranges(cuts, *problem.free, 0.0)
    assert np.all(narrow[:, 0] <= result.weights + 1e-3)
    assert np.ptp(narrow, axis=1).max() < 0.1 * np.ptp(ranges, axis=1).max()


def test_near_optimal_ranges_of_many_sources_hold_those_of_linear_programmes(monkeypatch):
    """One blend of the cuts allows all that the cuts allow, and no weight of 1. Source: duality."""
    rng = np.random.default_rng(47)
    x, y = rng.normal(size=(80, 3)), 0.5 * rng.normal(size=(15, 3))
    source, b = np.repeat(np.arange(40), 2), np.full(15, 1 / 15)
    bounds = np.where(np.arange(40) == 7, 0.02, 0.0), np.full(40, 0.4)
    cost = euclidean_cost(x, y)
    cuts = optimal_mixture(cost, source, b, *bounds, 1e-6).cuts
    exact = near_optimal_ranges(cuts, *bounds, 0.01)
    monkeypatch.setattr("stages.mixture.certificate._EXACT_RANGES", 10)
    fast = near_optimal_ranges(cuts, *bounds, 0.01)
    assert np.all(fast[:, 0] <= exact[:, 0] + 1e-9)
    assert np.all(fast[:, 1] >= exact[:, 1] - 1e-9)
    np.testing.assert_allclose(fast[:, 0], exact[:, 0], atol=1e-9)
    weighed = lowest_point(cuts, *bounds)[1] > bounds[0] + 1e-9
    np.testing.assert_allclose(fast[weighed], exact[weighed], atol=1e-9)
    # The blend says something: for most sources less than their cap.
    assert (fast[~weighed, 1] < 0.3).mean() > 0.5


# Energy distance


def energy_by_pairs(problem: Problem, p: FloatArray) -> float:
    """2 E c(x, y) - E c(x, x') - E c(y, y') by a sum over all pairs, none with itself."""
    sizes = np.bincount(problem.source)
    a = row_weights(p, problem.source)
    same = problem.source[:, None] == problem.source
    pairs = np.outer(a, a)
    pairs[same] *= np.repeat(sizes / (sizes - 1), sizes)[:, None].repeat(a.size, 1)[same]
    np.fill_diagonal(pairs, 0.0)
    own = np.outer(problem.b, problem.b)
    np.fill_diagonal(own, 0.0)
    return float(
        2 * a @ cdist(problem.x, problem.y) @ problem.b
        - (pairs * cdist(problem.x, problem.x)).sum()
        - (own * cdist(problem.y, problem.y)).sum() / own.sum()
    )


def test_energy_value_equals_sum_over_pairs():
    """ED(p) = 2 p . D - p^T E p - S. Source: Szekely and Rizzo 2013."""
    problem = gaussian_problem(50)
    mixture = energy_mixture(pairs_of(problem), *problem.free)
    assert mixture.value == pytest.approx(energy_by_pairs(problem, mixture.weights), abs=1e-12)
    grid = np.array([(i, j, 40 - i - j) for i in range(41) for j in range(41 - i)]) / 40
    values = [energy_by_pairs(problem, p) for p in grid]
    assert mixture.value <= min(values) + 1e-9
    np.testing.assert_allclose(mixture.weights, grid[int(np.argmin(values))], atol=1 / 40)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_energy_target_drawn_from_distinct_sources_recovers_weights(metric):
    """E ED(p) = 0 iff p = p*: error n^(-1/2). Source: Szekely and Rizzo 2013 (negative type)."""
    rng = np.random.default_rng(51)
    truth = np.array([0.5, 0.3, 0.2, 0.0])
    centres = 3.0 * np.eye(4, 16)
    source, labels = (
        np.repeat(np.arange(4), 300),
        np.repeat(np.arange(4), (truth * 300).astype(int)),
    )
    x, y = (centres[k] + rng.normal(size=(k.size, 16)) for k in (source, labels))
    sums = energy_sums(x, source, y, np.ones(300), metric, 4)
    mixture = energy_mixture(sums, np.zeros(4), np.ones(4))
    np.testing.assert_allclose(mixture.weights, truth, atol=0.03)
    assert abs(mixture.value) < 0.02


def test_energy_of_a_source_of_one_row_and_of_one_target_is_that_of_points():
    """E c(x, x') = 0 between copies of one point, so argmin ED is p*. Source: energy of a point."""
    rng = np.random.default_rng(54)
    alone = np.full(4, 3.0)
    x = np.vstack([rng.normal(size=(200, 4)), alone])
    y = np.vstack([rng.normal(size=(100, 4)), np.tile(alone, (100, 1))])
    sums = energy_sums(x, [0] * 200 + [1], y, np.ones(200), "euclidean", 2, blocks=8)
    mixture = energy_mixture(sums, np.zeros(2), np.ones(2))
    np.testing.assert_allclose(mixture.weights, 0.5, atol=0.05)
    ranges = energy_ranges(sums, mixture.weights, np.zeros(2), np.ones(2))
    assert np.all((ranges[:, 0] <= 0.5) & (ranges[:, 1] >= 0.5))
    # One target point among the rows of two sources: the nearer one, by all pairs.
    problem = gaussian_problem(55, sources=2, atoms=1)
    found = energy_mixture(pairs_of(problem), *problem.free)
    spread, near = cdist(problem.x, problem.x), cdist(problem.x, problem.y)[:, 0]
    means = [near[:20].mean(), near[20:].mean()]
    own = [spread[:20, :20].sum() / 380, spread[20:, 20:].sum() / 380]
    grid = np.linspace(0, 1, 2001)
    across = spread[:20, 20:].mean()
    values = (
        2 * (grid * means[0] + (1 - grid) * means[1])
        - (grid**2 * own[0] + (1 - grid) ** 2 * own[1] + 2 * grid * (1 - grid) * across)
    )  # fmt: skip
    assert found.weights[0] == pytest.approx(grid[values.argmin()], abs=1e-3)
    assert found.value == pytest.approx(values.min(), abs=1e-6)
    with pytest.raises(ValueError, match="source 1 has no rows"):
        energy_sums(np.eye(3), [0, 0, 2], np.eye(3), np.ones(3), "euclidean", 3).statistics()


def test_energy_mixture_of_many_sources_with_caps_is_the_least_by_linear_programmes():
    """f(q) >= f(p) + f'(p) (q - p) for all feasible q, least by HiGHS. Source: convexity."""
    rng = np.random.default_rng(56)
    centres = rng.normal(size=(300, 12))
    source = np.repeat(np.arange(300), 12)
    x = centres[source] + rng.normal(size=(3600, 12))
    y = centres[rng.integers(0, 5, 200)] + rng.normal(size=(200, 12))
    sums = energy_sums(x, source, y, np.ones(200), "euclidean", 300)
    to_target, between, _ = sums.statistics()
    # The stage's own programme: curvature that only noise made negative is none.
    basis = np.linalg.qr(np.column_stack([np.ones(300), np.eye(300)[:, 1:]]))[0][:, 1:]
    curvature, axes = np.linalg.eigh(-basis.T @ between @ basis)
    bent = basis @ axes @ np.diag(np.maximum(curvature, 0)) @ axes.T @ basis.T
    for high in (np.ones(300), np.full(300, 0.02)):
        p = energy_mixture(sums, np.zeros(300), high).weights
        assert p.sum() == pytest.approx(1, abs=1e-12)
        start = nearest_mixture(np.full(300, 1 / 300), np.zeros(300), high)
        slope = 2 * (to_target - between @ start) + 2 * bent @ (p - start)
        answer = linprog(
            slope, A_eq=np.ones((1, 300)), b_eq=[1.0], bounds=np.column_stack([0 * high, high])
        )
        assert slope @ p == pytest.approx(answer.fun, abs=1e-7)
        assert np.all(p <= high + 1e-12)


def test_energy_statistics_without_a_block_are_those_of_the_rows_left():
    """Means over the rows and targets of the other blocks. Source: definition of the jackknife."""
    problem = gaussian_problem(53, rows=21)
    sums = pairs_of(problem, blocks=4)
    place = np.arange(len(problem.x)) % 21
    left = place % 4 != 1
    there = np.arange(len(problem.y)) % 4 != 1
    alone = energy_sums(
        problem.x[left],
        problem.source[left],
        problem.y[there],
        problem.b[there],
        "euclidean",
        3,
    )
    for found, expected in zip(sums.statistics(1), alone.statistics(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    whole = pairs_of(problem)
    for found, expected in zip(sums.statistics(), whole.statistics(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_energy_ranges_hold_the_planted_weights_in_most_draws():
    """p +- 2 se holds p* about 95 times in 100 inside the simplex. Source: the jackknife."""
    truth, hits, wide = np.array([0.5, 0.3, 0.2]), 0, []
    centres = 2.0 * np.eye(3, 8)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        source, labels = np.repeat(np.arange(3), 60), rng.choice(3, 90, p=truth)
        x, y = (centres[k] + rng.normal(size=(k.size, 8)) for k in (source, labels))
        sums = energy_sums(x, source, y, np.ones(90), "euclidean", 3, blocks=8)
        weights = energy_mixture(sums, np.zeros(3), np.ones(3)).weights
        ranges = energy_ranges(sums, weights, np.zeros(3), np.ones(3))
        hits += int(((ranges[:, 0] <= truth) & (truth <= ranges[:, 1])).sum())
        wide.append(np.ptp(ranges, axis=1).mean())
    assert hits >= 0.8 * 36
    assert 0.02 < np.mean(wide) < 0.4


def test_low_variance_decoys_are_taken_by_plain_transport_alone():
    """T8: argmin F takes sources of half the spread; argmin D and ED don't. Source: measured."""
    rng = np.random.default_rng(52)
    centres = rng.normal(size=(2, 16)) / 2
    source = np.repeat(np.arange(4), 200)
    spread = np.array([1.0, 1.0, 0.5, 0.5])
    x = centres[source % 2] + spread[source, None] * rng.normal(size=(800, 16))
    y = centres[np.arange(200) % 2] + rng.normal(size=(200, 16))
    free, b = (np.zeros(4), np.ones(4)), np.ones(200) / 200
    plain = optimal_mixture(euclidean_cost(x, y), source, b, *free, 1e-3).weights
    energy = energy_mixture(energy_sums(x, source, y, b, "euclidean", 4), *free).weights
    starts = [plain, np.full(4, 0.25)]
    debiased = debiased_mixture(
        halves(x, source, 4), y, b, *free, Space("euclidean"), starts, 1e-3
    ).weights
    assert plain[2:].sum() > 0.9
    assert energy[2:].sum() < 0.1
    assert debiased[2:].sum() < 0.15


# Split-debiased transport


def test_self_transport_slope_lies_between_one_sided_differences():
    """S'(p; -d) <= s . d <= S'(p; d), at weight 0 too. Source: LP duality, S is convex in p."""
    rng = np.random.default_rng(60)
    source = np.repeat(np.arange(3), 24)
    x = np.eye(3, 4)[source] + rng.normal(size=(72, 4))
    one, other = halves(x, source, 3)
    cost = euclidean_cost(one.vectors, other.vectors)
    step = 1e-6
    for p in ([0.2, 0.5, 0.3], [0.6, 0.4, 0.0]):
        value, slope = self_transport(np.array(p), cost, one, other)
        for direction in ([-0.6, -0.4, 1.0], [0.5, -0.5, 0.0], [-0.5, 0.5, 0.0]):
            ahead, _ = self_transport(np.array(p) + step * np.array(direction), cost, one, other)
            assert slope @ direction <= (ahead - value) / step + 1e-6
    a = row_weights([0.2, 0.5, 0.3], one.source)
    b = row_weights([0.2, 0.5, 0.3], other.source)
    value, _ = self_transport(np.array([0.2, 0.5, 0.3]), cost, one, other)
    assert value == pytest.approx(ot.emd2(a, b, cost), rel=1e-9)


def test_debiased_mixture_is_no_worse_than_a_grid():
    """D at the mixture found <= D on a grid of mixtures, by POT. Source: definition of D."""
    problem = gaussian_problem(61, rows=24, atoms=30)
    one, other = halves(problem.x, problem.source, 3)
    cost = euclidean_cost(one.vectors, problem.y)
    between = euclidean_cost(one.vectors, other.vectors)
    grid = np.array([(i, j, 12 - i - j) for i in range(13) for j in range(13 - i)]) / 12

    def value(p: FloatArray) -> float:
        a, b = row_weights(p, one.source), row_weights(p, other.source)
        return float(ot.emd2(a, problem.b, cost)) - float(ot.emd2(a, b, between)) / 2

    values = [value(p) for p in grid]
    starts = [np.full(3, 1 / 3), *np.eye(3)]
    found = debiased_mixture(
        (one, other), problem.y, problem.b, *problem.free, Space("euclidean"), starts, 1e-6
    )
    assert found.value == pytest.approx(value(found.weights), abs=1e-9)
    assert found.value <= min(values) + 1e-3 * abs(min(values))


def test_halves_of_one_row_are_that_row_twice():
    """A source of one row is that point, in both halves; of none, nothing. Source: definition."""
    one, other = halves(np.eye(3), np.array([0, 0, 1]), 2)
    for half in (one, other):
        assert half.counts.tolist() == [1, 1]
        assert half.vectors[half.source == 1].tolist() == [[0.0, 0.0, 1.0]]
    assert one.vectors[0].tolist() != other.vectors[0].tolist()
    with pytest.raises(ValueError, match="source 1 has no rows"):
        halves(np.eye(3), np.array([0, 0, 2]), 3)


# Warm starts and reuse


def test_optimal_mixture_known_potentials_of_a_sample_save_solves():
    """Any g is a cut of any sample: fewer solves, the same optimum. Source: LP duality."""
    problem = gaussian_problem(62, sources=6, rows=60, atoms=60, d=8)
    sample = np.arange(360) % 60 < 20
    first = optimal_mixture(
        problem.cost[sample], problem.source[sample], problem.b, *problem.free, 1e-3
    )
    arguments = problem.cost, problem.source, problem.b, *problem.free, 1e-3
    cold, warm = optimal_mixture(*arguments), optimal_mixture(*arguments, known=first.potentials)
    assert warm.solves < cold.solves
    assert warm.value == pytest.approx(cold.value, rel=2e-3)
    assert warm.lower_bound <= cold.value


def test_optimal_mixture_in_groups_equals_joint_lp_of_merged_sources():
    """p = W q is a mixture of merged measures. Source: linearity of p -> sum_k p_k mu_k."""
    problem = gaussian_problem(63, sources=4)
    keep = {"a": 0.3, "c": 0.1}
    lower, upper = np.zeros(4), np.array([0.6, 1.0, 1.0, 1.0])
    groups, low, high = kept_in_proportion(["a", "b", "c", "d"], keep, lower, upper)
    found = optimal_mixture(problem.cost, problem.source, problem.b, low, high, 1e-8, groups=groups)
    assert found.weights[0] == pytest.approx(3 * found.weights[2], abs=1e-9)
    assert found.weights[0] <= 0.6 + 1e-9
    # The merged source has each row of a three times for one of c: all have 20 rows.
    rows = np.concatenate(
        [np.tile(np.arange(20), 3), np.arange(40, 60), np.arange(20, 40), np.arange(60, 80)]
    )
    merged = np.repeat([0, 1, 2], [80, 20, 20])
    joint = optimal_mixture_by_lp(problem.cost[rows], merged, problem.b, low, high)
    assert found.value == pytest.approx(joint.value, rel=1e-6)


def test_kept_proportions_outside_the_bounds_raise():
    """w_k q_0 within the bounds of k, for some q_0. Source: definition."""
    upper = np.array([0.2, 1.0, 1.0])
    with pytest.raises(ValueError, match="don't allow the proportions"):
        kept_in_proportion(["a", "b", "c"], {"a": 0.9, "b": 0.1}, np.array([0, 0.1, 0]), upper)


# A pull towards the natural mixture


@pytest.mark.parametrize("strength", [0.05, 0.5])
def test_optimal_mixture_with_a_pull_is_the_least_on_a_grid(strength):
    """min_p F(p) + tau KL(p | p0), F by POT, KL by its sum. Source: definitions."""
    problem = gaussian_problem(68)
    natural = np.array([0.1, 0.3, 0.6])
    pull = Pull(strength, natural)
    grid = np.array([(i, j, 60 - i - j) for i in range(61) for j in range(61 - i)]) / 60

    def value(p: FloatArray) -> float:
        divergence = sum(a * np.log(a / b) for a, b in zip(p, natural, strict=True) if a > 0)
        return float(
            ot.emd2(row_weights(p, problem.source), problem.b, problem.cost) + strength * divergence
        )

    found = optimal_mixture(problem.cost, problem.source, problem.b, *problem.free, 1e-5, pull=pull)
    assert found.value == pytest.approx(value(found.weights), rel=1e-9)
    values = np.array([value(p) for p in grid])
    assert found.lower_bound <= values.min()
    assert found.value <= values.min() * (1 + 1e-5)
    np.testing.assert_allclose(found.weights, grid[values.argmin()], atol=2 / 60)
    free = optimal_mixture(problem.cost, problem.source, problem.b, *problem.free, 1e-6)
    assert pull.divergence(found.weights) < pull.divergence(free.weights) - 1e-3
    strong = optimal_mixture(
        problem.cost, problem.source, problem.b, *problem.free, 1e-5, pull=Pull(1e3, natural)
    )
    np.testing.assert_allclose(strong.weights, natural, atol=0.01)


def test_planes_of_a_pull_lie_below_it_and_touch_it_where_they_are_taken():
    """KL(p | p0) >= sum p log(z / p0) + 1 - sum z for any z > 0. Source: convexity."""
    rng = np.random.default_rng(69)
    pull = Pull(0.7, np.array([0.2, 0.3, 0.1, 0.4]))
    points = np.vstack([rng.dirichlet(np.ones(4), 5), [0.0, 0.5, 0.5, 0.0], np.full(4, 0.1)])
    planes = pull.joined(Cuts(np.zeros((7, 4)), np.zeros(7)), points)
    mixtures = np.vstack([rng.dirichlet(np.full(4, 0.3), 200), np.eye(4)])
    exact = np.array([pull.value(p) for p in mixtures])
    assert np.all(mixtures @ planes.vertex_values().T <= exact[:, None] + 1e-9)
    at = (points * planes.slopes).sum(axis=1) + planes.constants
    np.testing.assert_allclose(at[:6], [pull.value(p) for p in points[:6]], atol=1e-9)


# Other weightings


def test_neighbour_shares_equal_brute_force_whatever_the_blocks():
    """p_k = sum_j b_j |N_j in S_k| / |N_j|. Source: definition."""
    problem = gaussian_problem(64)
    space, everything = Space("euclidean"), np.arange(60)
    order = np.random.default_rng(64).permutation(60)
    blocks = [
        nearest_rows(problem.x[part], problem.source[part], problem.y, space, 4)
        for part in np.array_split(order, 5)
    ]
    total = blocks[3] + blocks[0] + blocks[4] + blocks[1] + blocks[2]
    nearest = np.argsort(cdist(problem.y, problem.x), axis=1)[:, :4]
    expected = [(problem.b[:, None] / 4 * (problem.source[nearest] == k)).sum() for k in range(3)]
    np.testing.assert_allclose(neighbour_shares(total, problem.b, 3), expected, atol=1e-12)
    whole = nearest_rows(problem.x, problem.source[everything], problem.y, space, 100)
    assert neighbour_shares(whole, problem.b, 3) == pytest.approx([1 / 3] * 3)


def test_chameleon_weights_equal_ridge_leverages():
    """S_k = [G (G + lambda K I)^-1]_kk, by eigenvalues of G. Source: arXiv 2505.24844."""
    rng = np.random.default_rng(65)
    source = np.repeat(np.arange(4), 30)
    x = 5 * rng.normal(size=(4, 6))[source] + rng.normal(size=(120, 6))
    means = np.array([x[source == k].mean(axis=0) for k in range(4)])
    centred = means - means.mean(axis=0)
    values, vectors = np.linalg.eigh(centred @ centred.T)
    leverage = (vectors**2 * (values / (values + 10 * 4))).sum(axis=1)
    expected = np.exp(leverage / 0.2) / np.exp(leverage / 0.2).sum()
    found = chameleon_weights(x, source, np.full(4, 30))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.ptp(found) > 0.02


# Space


def test_principal_projection_spans_what_varies_and_repeats_exactly():
    """Rows of rank 3 lose no distance in 3 dimensions. Source: principal components."""
    rng = np.random.default_rng(66)
    basis = np.linalg.qr(rng.normal(size=(10, 3)))[0].T
    x, y = (rng.normal(size=(n, 3)) @ basis for n in (50, 20))
    projection = principal_projection(x, y, np.full(20, 1 / 20), 3)
    np.testing.assert_allclose(cdist(projection.of(x), projection.of(y)), cdist(x, y), atol=1e-10)
    assert projection.share == pytest.approx(1)
    again = projection_of(principal_projection(x, y, np.full(20, 1 / 20), 3).table())
    np.testing.assert_array_equal(again.directions, projection.directions)
    np.testing.assert_array_equal(again.mean, projection.mean)
    with pytest.raises(ValueError, match="11 of 10 dimensions"):
        principal_projection(x, y, np.full(20, 1 / 20), 11)


def test_task_penalty_counts_in_the_certificate_as_in_the_cost():
    """c + lambda [task not served]: h_k over the whole cost. Source: definition."""
    problem = gaussian_problem(67)
    tasks = ["a" if j < 12 else "b" for j in range(25)]
    penalty = task_penalty(["s", "t", "u"], tasks, {"s": ["a"], "u": ["a", "b"]}, 0.7)
    assert penalty is not None
    assert penalty.sum(axis=1).tolist() == pytest.approx([0.7 * 13, 0, 0])
    cost = problem.cost + penalty[problem.source]
    bundle = optimal_mixture(cost, problem.source, problem.b, *problem.free, 1e-6)
    sums = cut_sums(
        problem.x, problem.source, problem.y, bundle.potentials, "euclidean", 3, 16, penalty
    )
    np.testing.assert_allclose(sums.means(), bundle.cuts.slopes, atol=1e-12)
