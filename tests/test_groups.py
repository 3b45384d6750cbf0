"""Difficulty groups and cost-of-pass, by hand, by brute force and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from stages.groups.cost import (
    attempt_price,
    attempt_tokens,
    cost_of_pass,
    median_cost_of_solved,
    pooled_cost_of_pass,
    success_rate,
)
from stages.groups.groups import UNSOLVED, difficulty_groups, easiest_first, pass_rate_curve
from stages.groups.meanshift import (
    OUTLIER,
    ROUNDING,
    FloatArray,
    IntArray,
    group_radius,
    largest_radius,
    mean_shift_groups,
)


def column(*rates: float) -> FloatArray:
    return np.array(rates, dtype=np.float64)[:, None]


def brute_force(vectors: FloatArray, radius: float, min_size: int) -> IntArray:
    """Algorithm 1 with a mean shift of its own, every row a seed."""
    reach = radius + ROUNDING
    labels = np.full(len(vectors), OUTLIER)
    while True:
        loose = np.flatnonzero(labels == OUTLIER)
        points = vectors[loose]
        modes: dict[tuple[float, ...], int] = {}
        for seed in points:
            centre, moved = seed, np.inf
            while moved > 1e-3 * reach:
                near = points[np.linalg.norm(points - centre, axis=1) <= reach]
                centre, moved = near.mean(axis=0), float(np.linalg.norm(near.mean(axis=0) - centre))
            modes[tuple(centre)] = len(near)
        kept: list[FloatArray] = []
        for mode, _ in sorted(modes.items(), key=lambda item: (item[1], item[0]), reverse=True):
            if all(np.linalg.norm(np.array(mode) - other) > reach for other in kept):
                kept.append(np.array(mode))
        grew = False
        distances = cdist(points, np.array(kept)) if kept else np.empty((0, 0))
        for number in range(len(kept)):
            mine = (distances.argmin(axis=1) == number) & (distances[:, number] <= reach)
            if mine.sum() >= min_size:
                labels[loose[mine]] = labels.max() + 1
                grew = True
        if not grew:
            return labels


def partition(labels: IntArray) -> set[tuple[int, ...]]:
    return {tuple(np.flatnonzero(labels == label)) for label in set(labels.tolist()) - {OUTLIER}}


class TestMeanShift:
    def test_member_beyond_the_radius_goes_back(self) -> None:
        # Modes 0.513 (of 0.5 and 0.58) and 0.603 (of 0.58 and 0.65) are nearer than 0.1, so only
        # the fuller one stays; 0.65 is nearest to it, but 0.137 away.
        rates = column(*[0.5] * 10, *[0.58] * 2, 0.65)
        assert mean_shift_groups(rates, 0.1, 2).tolist() == [0] * 12 + [OUTLIER]

    def test_what_went_back_can_form_a_group_of_its_own(self) -> None:
        # All climb to 0.526; 0.655 is 0.129 away, and alone in the second round.
        rates = column(*[0.5] * 10, *[0.57] * 6, *[0.655] * 2)
        assert mean_shift_groups(rates, 0.1, 2).tolist() == [0] * 16 + [1] * 2
        assert mean_shift_groups(rates, 0.1, 3).tolist() == [0] * 16 + [OUTLIER] * 2

    def test_small_groups_are_dissolved(self) -> None:
        rates = column(*[0.1] * 4, *[0.5] * 5, *[0.9] * 6)
        assert partition(mean_shift_groups(rates, 0.1, 5)) == {(4, 5, 6, 7, 8), tuple(range(9, 15))}
        assert (mean_shift_groups(rates, 0.1, 7) == OUTLIER).all()
        assert (mean_shift_groups(rates, 0.1, 16) == OUTLIER).all()
        assert len(partition(mean_shift_groups(rates, 0.1, 1))) == 3

    @pytest.mark.parametrize("seed", range(40))
    def test_agrees_with_brute_force(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        models, rollouts = int(rng.integers(1, 5)), int(rng.choice([3, 8, 100]))
        skill = rng.random((int(rng.integers(5, 90)), 1)) ** np.linspace(2, 0.5, models)
        rates = (rng.binomial(rollouts, skill) / rollouts).astype(np.float32).astype(np.float64)
        radius = float(rng.uniform(0.02, 0.4))
        min_size = int(rng.integers(1, 8))
        found = mean_shift_groups(rates, radius, min_size)
        assert partition(found) == partition(brute_force(rates, radius, min_size))
        assert sorted(set(found.tolist()) - {OUTLIER}) == list(range(len(partition(found))))

    @given(
        st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=40),
        st.floats(0.01, 0.6),
        st.integers(1, 5),
    )
    @settings(max_examples=60)
    def test_every_group_is_large_and_narrow(
        self, counts: list[tuple[int, ...]], radius: float, min_size: int
    ) -> None:
        rates = np.array(counts) / 4
        for members in partition(mean_shift_groups(rates, radius, min_size)):
            assert len(members) >= min_size
            assert cdist(rates[list(members)], rates[list(members)]).max() <= 2 * radius + 1e-5

    @pytest.mark.parametrize("step", range(1, 5))
    def test_one_step_apart_at_the_radius_is_within_it(self, step: int) -> None:
        # Rates of 5 rollouts in float32: some neighbours differ by more than 0.2, some by less.
        rates = np.full((12, 4), 0.6)
        rates[:6, 0], rates[6:, 0] = np.float32(step / 5), np.float32((step + 1) / 5)
        assert largest_radius(4) == pytest.approx(0.2)
        assert mean_shift_groups(rates, largest_radius(4), 2).tolist() == [0] * 12


class TestRadius:
    def test_bound_from_above(self) -> None:
        # Nine models: 0.3, as published.
        assert largest_radius(9) == pytest.approx(0.3)
        spread = np.random.default_rng(0).random((50, 9))
        assert group_radius(spread, 0.5, 0.01) == largest_radius(9)

    def test_between_the_bounds_it_is_the_mean_distance_to_the_nearest_share(self) -> None:
        rates = np.random.default_rng(1).random((200, 3)) * 0.3
        to_nearest = np.sort(cdist(rates, rates), axis=1)[:, 19]
        assert 0.01 < to_nearest.mean() < largest_radius(3)
        assert group_radius(rates, 0.1, 0.01) == pytest.approx(to_nearest.mean(), rel=1e-9)

    def test_equal_vectors_leave_a_step_of_the_rates(self) -> None:
        # A tenth of these rows, and more, are equal: the estimate is 0.
        rates = np.repeat([[0.25, 0.5], [0.5, 0.75], [1.0, 1.0]], 20, axis=0)
        assert group_radius(rates, 0.1, 0.125) == 0.125
        assert group_radius(rates, 0.1, 0.25) == largest_radius(2)


class TestDifficultyGroups:
    def test_worked_example(self) -> None:
        hard = [[0.0, 0.2], [0.02, 0.22], [0.01, 0.19], [0.0, 0.21]]
        easy = [[0.9, 1.0], [0.92, 0.98], [0.91, 0.99]]
        vectors = np.array([*hard, [0.0, 0.0], *easy, [0.9, 0.3]])
        found = difficulty_groups(vectors, resolution=0.01, quantile=0.4, min_size=3)
        assert found.labels.tolist() == [1] * 4 + [UNSOLVED] + [0] * 3 + [OUTLIER]
        assert found.count == 2
        assert pass_rate_curve(vectors[found.labels == 1]) == pytest.approx([0.0075, 0.205])

    def test_unsolved_rows_bear_on_no_group(self) -> None:
        rng = np.random.default_rng(3)
        vectors = rng.binomial(10, 0.5, (60, 2)) / 10
        vectors[0] = 0.1
        more = np.concatenate([vectors, np.zeros((500, 2))])
        alone, together = (difficulty_groups(v, resolution=0.1) for v in (vectors, more))
        assert together.radius == alone.radius
        assert together.labels[:60].tolist() == alone.labels.tolist()
        assert set(together.labels[60:].tolist()) == {UNSOLVED}

    def test_nothing_solved(self) -> None:
        found = difficulty_groups(np.zeros((20, 3)), resolution=0.25)
        assert (found.labels == UNSOLVED).all()
        assert (found.radius, found.count) == (None, 0)

    def test_groups_are_numbered_from_the_easiest(self) -> None:
        vectors = np.array([[0.2, 0.4], [0.9, 0.9], [0.4, 0.2], [0.1, 0.1], [0.0, 1.0]])
        # Equal means: the one that the last model solves more often comes first.
        assert easiest_first(np.array([0, 1, 2, 3, OUTLIER]), vectors).tolist() == [1, 0, 2, 3, -1]

    @pytest.mark.parametrize(
        ("vectors", "options"),
        [
            ([[1.2, 0.1]], {}),
            ([[float("nan"), 0.1]], {}),
            ([0.5, 0.1], {}),
            ([[0.5]], {"resolution": 0.0}),
            ([[0.5]], {"quantile": 1.5}),
            ([[0.5]], {"min_size": 0}),
        ],
    )
    def test_senseless_arguments(self, vectors: list[object], options: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=r"rates|shape|need"):
            difficulty_groups(np.array(vectors), **{"resolution": 0.1, **options})  # type: ignore[arg-type]


class TestCostOfPass:
    # Prompts of 10, 20 and 30 tokens, 4 rollouts each; 2, 1 and 0 of them correct.
    prompt, rollouts = np.array([10, 20, 30]), np.array([4, 4, 4])
    generated, correct = np.array([40, 80, 120]), np.array([2, 1, 0])

    def test_by_hand(self) -> None:
        taken, given_out = attempt_tokens(self.prompt, self.rollouts, self.generated)
        success = success_rate(self.correct, self.rollouts)
        attempts = taken + given_out
        assert attempts.tolist() == [20, 40, 60]
        costs = cost_of_pass(attempts, success)
        assert costs.tolist() == [40, 160, np.inf]
        # 4 * (10 + 20 + 30) + 40 + 80 + 120 tokens paid for 3 correct solutions.
        assert pooled_cost_of_pass(attempts, success) == pytest.approx(480 / 3)
        assert median_cost_of_solved(costs) == 100
        money = attempt_price(taken, given_out, 1.0, 3.0)
        assert money * 1e6 == pytest.approx([40, 80, 120])
        assert pooled_cost_of_pass(money, success) * 1e6 == pytest.approx(4 * 240 / 3)

    def test_nothing_solved(self) -> None:
        nothing = np.zeros(3)
        costs = cost_of_pass(np.ones(3), nothing)
        assert np.isinf(costs).all()
        assert pooled_cost_of_pass(np.ones(3), nothing) == np.inf
        assert np.isnan(median_cost_of_solved(costs))

    def test_rows_with_more_rollouts_weigh_no_more(self) -> None:
        # The same two rows; the second was tried ten times as often.
        few = pooled_cost_of_pass(
            np.array([10.0, 50.0]), success_rate(np.array([2, 1]), np.array([4, 4]))
        )
        many = pooled_cost_of_pass(
            np.array([10.0, 50.0]), success_rate(np.array([2, 10]), np.array([4, 40]))
        )
        assert few == many == 80

    def test_simulated_attempts_cost_as_much(self) -> None:
        rng = np.random.default_rng(7)
        attempts, success = np.array([20.0, 40.0, 90.0]), np.array([0.5, 0.25, 0.0])
        tries = rng.geometric(0.25, 40_000)
        assert cost_of_pass(attempts, success)[1] == pytest.approx(40 * tries.mean(), rel=0.03)
        rows = rng.integers(0, 3, 400_000)
        solved = rng.random(400_000) < success[rows]
        paid = attempts[rows[: np.flatnonzero(solved)[-1] + 1]].sum()
        assert pooled_cost_of_pass(attempts, success) == pytest.approx(
            paid / solved.sum(), rel=0.03
        )
