"""Budgeted rollouts: the rule against its definition, whole numbers, and both stages on tables."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, STUDENT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import binomtest
from sharded import Tables

from stages.allocation.integers import allocated, capacity, water_filled
from stages.allocation.rollouts import RolloutsStage
from stages.allocation.settings import AllocationSettings, RolloutsSettings
from stages.allocation.stage import AllocationStage
from stages.allocation.weights import (
    allocation_weights,
    predicted_ratio,
    predicted_variance,
    regularised_variance,
)
from stages.base import Artifact, checked_columns
from stages.engines import Completion, GenerationRequest, Sampling
from stages.engines.generation_cache import CachedGenerator
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, StageError
from stages.pass_rate.settings import PassRateSettings
from stages.pass_rate.stage import PassRateStage
from stages.rows import MESSAGES, NOT_REQUESTED, OK
from stages.storage import Store

SEED = 3


class TestWeights:
    def test_worked_example(self) -> None:
        p = np.array([1 / 8, 2 / 8, 4 / 8, 6 / 8, 1.0])
        w = allocation_weights(p, np.full(5, 2.0), 1e-3, 2.0)
        # p + 0.001 / p is 0.133, 0.254, 0.502, 0.751333 and 1.001.
        assert w == pytest.approx([5.484, 3.968, 2.823, 2.307, 1.999], abs=5e-4)

    def test_nothing_where_no_rollout_was_correct_or_nothing_is_known(self) -> None:
        p = np.array([0.0, np.nan, 0.5, 0.5, 0.5])
        g = np.array([np.nan, 1.0, 0.0, np.nan, 1.0])
        w = allocation_weights(p, g, 1e-3, 2.0)
        assert w[:4].tolist() == [0, 0, 0, 0]
        assert w[4] > 0

    @pytest.mark.parametrize(("alpha", "beta"), [(1e-3, 2.0), (0.01, 3.0)])
    def test_largest_where_the_derivative_is_zero(self, alpha: float, beta: float) -> None:
        # d/dp (p + alpha p^(1 - beta)) = 0 at p = (alpha (beta - 1))^(1 / beta).
        p = np.linspace(0.001, 1, 100_000)
        w = allocation_weights(p, np.ones_like(p), alpha, beta)
        assert p[w.argmax()] == pytest.approx((alpha * (beta - 1)) ** (1 / beta), abs=2e-5)

    def test_rule_minimises_the_regularised_objective(self) -> None:
        """GVM-RAFT (arXiv 2505.02391), Eq. 7, minimised by a solver that doesn't know Prop. 1."""
        rng = np.random.default_rng(SEED)
        p, g, total, alpha, beta = rng.uniform(0.02, 1, 6), rng.lognormal(size=6), 60, 0.01, 2.5

        def objective(n: Any) -> float:
            return float(np.sum(g**2 / (p * n) / (1 + alpha / p**beta)))

        found = minimize(
            objective,
            np.full(6, 10.0),
            bounds=[(0.1, total)] * 6,
            constraints={"type": "eq", "fun": lambda n: n.sum() - total},
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        w = allocation_weights(p, g, alpha, beta)
        assert total * w / w.sum() == pytest.approx(found.x, rel=1e-3)
        assert regularised_variance(w, found.x) == pytest.approx(objective(found.x))

    @pytest.mark.parametrize("mean", [0.0, 0.6])
    def test_variance_of_every_outcome_enumerated(self, mean: float) -> None:
        """One prompt, gradients +G or -G: each of the outcomes of 3 rollouts, by its chance."""
        p, g, n = 0.3, 2.0, 3
        outcomes = {0.0: 1 - p, g: p * (1 + mean) / 2, -g: p * (1 - mean) / 2}
        first = second = 0.0
        for drawn in itertools.product(outcomes, repeat=n):
            chance = np.prod([outcomes[value] for value in drawn])
            estimate = -sum(drawn) / (n * p)
            first += chance * estimate
            second += chance * estimate**2
        bound = predicted_variance(np.array([p]), np.array([g]), np.array([float(n)]))
        assert first == pytest.approx(-mean * g)
        assert second - first**2 == pytest.approx(bound - (mean * g) ** 2 / n)

    @given(
        st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.1, 10)), min_size=1, max_size=20),
        st.floats(1, 100),
    )
    def test_ratio_of_the_plain_rule(self, pairs: list[tuple[float, float]], budget: float) -> None:
        p, g = np.array(pairs).T
        a = g / np.sqrt(p)
        ratio = predicted_ratio(p, g, budget * a / a.sum())
        assert ratio == pytest.approx(len(a) * np.sum(a**2) / np.sum(a) ** 2)
        assert ratio >= 1 - 1e-12

    def test_row_without_rollouts_has_no_bound(self) -> None:
        assert predicted_variance(np.ones(2), np.ones(2), np.array([1.0, 0.0])) == np.inf


moderate = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


@st.composite
def problems(draw: Any, weight: Any = moderate) -> tuple[np.ndarray, int, int | None, int]:
    weights = np.array(draw(st.lists(weight, min_size=1, max_size=12)))
    floor = draw(st.integers(0, 4))
    cap = draw(st.one_of(st.none(), st.integers(floor, 40)))
    total = draw(st.integers(floor * len(weights), floor * len(weights) + 200))
    return weights, total, cap, floor


class TestWholeNumbers:
    def test_textbook_election(self) -> None:
        """The usual example of the method: quotas 4.7, 1.6, 1.58, 1.2, 0.61, 0.31 of 10 seats."""
        votes = np.array([47_000, 16_000, 15_800, 12_000, 6_100, 3_100], float)
        assert allocated(votes, 10).tolist() == [5, 2, 1, 1, 1, 0]

    def test_ties_fall_in_order(self) -> None:
        assert allocated(np.ones(4), 6).tolist() == [2, 2, 1, 1]

    def test_surplus_of_a_cap_goes_to_the_others_in_proportion(self) -> None:
        # 60, 20, 10, 10 of 100: 30 too many for the first, then 15 for the second.
        assert allocated(np.array([6.0, 2, 1, 1]), 100, cap=30).tolist() == [30, 30, 20, 20]
        assert allocated(np.array([6.0, 2, 1, 1]), 70, cap=30).tolist() == [30, 20, 10, 10]

    def test_floor_is_paid_by_the_others_in_proportion(self) -> None:
        assert allocated(np.array([8.0, 4, 0.1, 0]), 20, floor=4).tolist() == [8, 4, 4, 4]

    def test_no_more_than_fits(self) -> None:
        weights = np.array([5.0, 1.0, 0.0])
        assert allocated(weights, 100, cap=8).tolist() == [8, 8, 0]
        assert allocated(weights, 100, cap=8, floor=2).tolist() == [8, 8, 2]
        assert allocated(np.zeros(3), 100, floor=2).tolist() == [2, 2, 2]
        assert allocated(np.zeros(0), 5).tolist() == []

    @given(problems(st.one_of(moderate, st.floats(0, 1.7e308))))
    @settings(max_examples=400)
    def test_sums_and_bounds(self, problem: tuple[np.ndarray, int, int | None, int]) -> None:
        weights, total, cap, floor = problem
        numbers = allocated(*problem)
        most = capacity(weights, cap, floor)
        weighted = np.count_nonzero(weights)
        if cap is not None:
            assert most == weighted * cap + (len(weights) - weighted) * floor
        assert numbers.sum() == (total if most is None else min(total, most))
        assert (numbers >= floor).all()
        assert (numbers[weights == 0] == floor).all()
        assert cap is None or (numbers <= cap).all()
        # The quota rule: nothing is a whole rollout away from its share.
        assert (np.abs(numbers - water_filled(*problem)) < 1 + 1e-9).all()

    @given(problems(st.one_of(moderate, st.floats(0, 1.7e308))))
    @settings(max_examples=400)
    def test_larger_weights_never_get_less(
        self, problem: tuple[np.ndarray, int, int | None, int]
    ) -> None:
        numbers = allocated(*problem)
        order = np.argsort(-problem[0], kind="stable")
        assert (np.diff(numbers[order]) <= 0).all()

    @given(problems())
    @settings(max_examples=400)
    def test_shares_meet_the_conditions_of_an_optimum(
        self, problem: tuple[np.ndarray, int, int | None, int]
    ) -> None:
        """KKT of min sum w^2 / n: one level n / w between the bounds, none better at them."""
        weights, _, cap, floor = problem
        shares = water_filled(*problem)
        top = np.inf if cap is None else cap
        weighted = weights > 0
        level = shares[weighted] / weights[weighted]
        below = shares[weighted] < top * (1 - 1e-9)
        above = shares[weighted] > floor * (1 + 1e-9)
        if below.any() and above.any():
            # Whoever could still get more has at least the level of whoever could give.
            assert level[below].min() >= level[above].max() * (1 - 1e-7)

    @pytest.mark.parametrize("seed", range(5))
    def test_no_allocation_in_whole_numbers_beats_the_shares(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        weights, total, cap, floor = rng.lognormal(sigma=1.5, size=4), 12, 5, 1
        best = min(
            regularised_variance(weights, np.array(n, float))
            for n in itertools.product(range(floor, cap + 1), repeat=4)
            if sum(n) == total
        )
        shares = water_filled(weights, total, cap, floor)
        assert shares.sum() == pytest.approx(total)
        assert regularised_variance(weights, shares) <= best * (1 + 1e-12)
        rounded = allocated(weights, total, cap, floor).astype(float)
        # Rounding costs something, but less than a rollout a row taken away.
        assert best <= regularised_variance(weights, rounded) * (1 + 1e-12)
        assert regularised_variance(weights, rounded) <= regularised_variance(
            weights, np.maximum(shares - 1, floor)
        )

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ((np.array([1.0, np.inf]), 5), r"weights\[1\] is inf"),
            ((np.array([-1.0]), 5), "at least 0"),
            ((np.ones(2), 5, 1, 2), "below the floor"),
            ((np.ones(3), 5, None, 2), "can't pay"),
        ],
    )
    def test_impossible_problems(self, arguments: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            allocated(*arguments)


PILOT = PassRateSettings(rollouts=4, gradient=True)


def pilot_table(rows: Sequence[tuple[str, float | None, float | None, str]]) -> pa.Table:
    names = ("id", "pass_rate", "gradient_norm", "pass_rate_status")
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("pass_rate", pa.float32()),
            ("gradient_norm", pa.float32()),
            ("pass_rate_status", pa.string()),
        ]
    )
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema)


ROWS = [
    ("e", 1.0, 2.0, OK),
    ("a", 0.25, 3.0, OK),
    ("d", 0.0, None, OK),
    ("c", None, None, "undecided: every rollout was truncated"),
    ("b", 0.25, 6.0, OK),
    ("f", None, None, "failed: prompt_too_long: 99 tokens, over 50"),
    ("g", None, None, NOT_REQUESTED),
]


def fitted(table: pa.Table, shard: int = 3, **options: Any) -> Artifact:
    stage = AllocationStage(AllocationSettings(**options), PILOT)
    return asyncio.run(stage.fit(Tables(table, shard), Tables(table.slice(0, 0), 1), {}))


def numbers_of(artifact: Artifact) -> dict[str, int]:
    table = pq.read_table(BytesIO(artifact.files["allocation.parquet"]))
    return dict(zip(table["id"].to_pylist(), table["rollouts"].to_pylist(), strict=True))


class TestAllocationStage:
    def test_numbers_by_hand(self) -> None:
        # Without regularisation w = G / sqrt(p): e 2, a 6, b 12.
        artifact = fitted(pilot_table(ROWS), total=40, alpha=0.0)
        assert numbers_of(artifact) == {"a": 12, "b": 24, "e": 4}
        report = artifact.report
        assert report["rows"] == 7
        assert report["allocated"] == report["budget"] == 40
        assert (report["allocated_rows"], report["most_for_one_row"]) == (3, 24)
        assert report["never_solved"] == 1
        assert report["pilot"] == {
            "failed: prompt_too_long": 1,
            "not_requested": 1,
            "ok": 4,
            "undecided: every rollout was truncated": 1,
        }
        # 3 (2^2 + 6^2 + 12^2) / (2 + 6 + 12)^2
        assert report["predicted_ratio"] == pytest.approx(3 * 184 / 400)
        json.dumps(report, allow_nan=False)

    def test_gradient_one_counts_pass_rates_alone(self) -> None:
        artifact = fitted(pilot_table(ROWS), total=10, alpha=0.0, gradient="one")
        assert numbers_of(artifact) == {"a": 4, "b": 4, "e": 2}

    def test_cap_floor_and_highest_pass_rate(self) -> None:
        table = pilot_table(ROWS)
        assert numbers_of(fitted(table, total=40, alpha=0.0, cap=16)) == {"a": 16, "b": 16, "e": 8}
        # A row never solved has a pilot; undecided, failed and unrequested rows have none.
        floored = fitted(table, total=40, alpha=0.0, floor=2)
        assert numbers_of(floored) == {"a": 11, "b": 23, "d": 2, "e": 4}
        below = fitted(table, total=40, alpha=0.0, floor=2, max_pass_rate=0.9)
        assert set(numbers_of(below)) == {"a", "b", "d"}
        assert below.report["above_max_pass_rate"] == 1
        assert below.report["allocated"] == 40

    def test_rate_that_equals_the_highest_is_let_in(self) -> None:
        table = pilot_table([("x", 0.8, 1.0, OK), ("y", 0.9, 1.0, OK)])
        assert numbers_of(fitted(table, total=5, max_pass_rate=0.8)) == {"x": 5}

    def test_caps_leave_part_of_the_budget(self) -> None:
        report = fitted(pilot_table(ROWS), total=40, cap=5).report
        assert (report["budget"], report["allocated"]) == (40, 15)

    @pytest.mark.parametrize("shard", [1, 2, 7])
    def test_same_bytes_however_rows_are_sharded(self, shard: int) -> None:
        rng = np.random.default_rng(SEED)
        rows = [(f"{i:02d}", float(rng.integers(5) / 4), 1.0, OK) for i in rng.permutation(25)]
        one = fitted(pilot_table(rows), 25, total=31).files
        assert fitted(pilot_table(rows[::-1]), shard, total=31).files == one

    def test_nothing_to_allocate_says_why(self) -> None:
        with pytest.raises(StageError, match="of 2 rows 1 have a pass rate, 1 up to"):
            fitted(pilot_table([ROWS[2], ROWS[3]]), total=5)

    def test_solved_row_without_gradient_is_counted_and_left_out(self) -> None:
        artifact = fitted(pilot_table([("x", 0.5, None, OK), ("y", 0.5, 1.0, OK)]), total=5)
        assert numbers_of(artifact) == {"y": 5}
        assert artifact.report["without_gradient"] == 1

    def test_gradient_that_overflowed_stops_the_run(self) -> None:
        rows = [("x", 0.5, float("inf"), OK), ("y", 0.5, 1.0, OK)]
        with pytest.raises(StageError, match="gradient norm of row x isn't finite"):
            fitted(pilot_table(rows), total=5)

    def test_floors_beyond_the_budget_stop_the_run(self) -> None:
        with pytest.raises(StageError, match=r"raise allocation\.total to 8"):
            fitted(pilot_table(ROWS), total=7, floor=2)

    def test_measured_gradients_need_a_pilot_that_measures(self) -> None:
        unmeasured = PassRateSettings(rollouts=4)
        with pytest.raises(ConfigError, match=r"pass_rate\.gradient: true"):
            AllocationStage(AllocationSettings(total=5), unmeasured)
        AllocationStage(AllocationSettings(total=5, gradient="one"), unmeasured)

    def test_greedy_pilots_have_no_further_rollouts(self) -> None:
        greedy = PassRateSettings(rollouts=1, temperature=0.0, gradient=True)
        with pytest.raises(ConfigError, match="temperature"):
            AllocationStage(AllocationSettings(total=5), greedy)

    def test_cap_below_floor_is_refused(self) -> None:
        with pytest.raises(ValueError, match="cap 1 is below floor 2"):
            AllocationSettings(total=5, cap=1, floor=2)


STUDENT_SETTINGS = ModelSettings(model=STUDENT, max_length=256, generation_chunk=4, threads=1)
PASS_RATE = PassRateSettings(rollouts=3, max_new_tokens=8, check="exact")


class Scripted:
    """Answers by the row that asks and the seed, as a model would: some right, some cut."""

    def __init__(self) -> None:
        self.asked: list[GenerationRequest] = []

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        self.asked += requests
        return [self.completion(request) for request in requests]

    def completion(self, request: GenerationRequest) -> Completion:
        kind = (request.seed + sum(request.prompt)) % 5
        if kind == 0:
            return Completion((1, 2), "I was about to", "length", -1.0)
        return Completion((1,), "yes" if kind < 3 else "no", "stop", -1.0)


def questions(number: int) -> pa.Table:
    messages = [
        [
            {"role": "user", "content": f"Is {i} a number?"},
            {"role": "assistant", "content": "Yes."},
        ]
        for i in range(number)
    ]
    return pa.table(
        {
            "id": [f"{i:032x}" for i in range(number)],
            "source": ["questions"] * number,
            "messages": pa.array(messages, MESSAGES),
            "answer": ["yes"] * number,
        }
    )


def pass_rates(rows: pa.Table, generator: Any, settings: PassRateSettings) -> pa.Table:
    stage = PassRateStage(settings, {"student": STUDENT_SETTINGS}, SEED)
    return asyncio.run(stage.process(rows, {"model": generator}, {}))


def budgeted(
    rows: pa.Table, pilot: pa.Table, generator: Any, numbers: dict[str, int], store: Store
) -> pa.Table:
    table = pa.table({"id": list(numbers), "rollouts": pa.array(numbers.values(), pa.int32())})
    store.write_table("allocation.parquet", table)
    stage = RolloutsStage(RolloutsSettings(), PASS_RATE, {"student": STUDENT_SETTINGS}, SEED)
    both = pa.Table.from_arrays(
        [*rows.columns, *pilot.columns], names=[*rows.column_names, *pilot.column_names]
    )
    given = both.select(list(stage.columns().needs))
    made = asyncio.run(stage.process(given, {"model": generator}, {"allocation": store}))
    return checked_columns("rollouts", rows.num_rows, stage.columns().adds, made)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Any:
    store = Store(f"memory://allocation/{request.node.name}")
    yield store
    store.remove("")


class TestRolloutsStage:
    def test_further_rollouts_are_those_of_a_larger_pilot(self, store: Store) -> None:
        rows = questions(6)
        ids = rows["id"].to_pylist()
        pilot = pass_rates(rows, Scripted(), PASS_RATE)
        made = budgeted(rows, pilot, Scripted(), {ids[1]: 4, ids[4]: 1}, store)
        larger = pass_rates(rows, Scripted(), PASS_RATE.model_copy(update={"rollouts": 7}))
        seven = larger["rollout_verdicts"].to_pylist()
        lengths = [3, 7, 3, 3, 4, 3]
        expected = [verdicts[:n] for verdicts, n in zip(seven, lengths, strict=True)]
        assert made["budgeted_verdicts"].to_pylist() == expected
        assert made["budgeted_rollouts"].to_pylist() == lengths
        assert len({verdict for row in expected for verdict in row}) == 3
        for row, verdicts in zip(made.to_pylist(), expected, strict=True):
            correct, cut = verdicts.count("correct"), verdicts.count("truncated")
            assert row["budgeted_correct"] == correct
            assert row["budgeted_truncated"] == cut
            finished = len(verdicts) - cut
            if not finished:
                continue
            interval = binomtest(correct, finished).proportion_ci(method="wilson")
            assert row["rollouts_status"] == OK
            assert row["budgeted_pass_rate"] == pytest.approx(correct / finished)
            assert row["budgeted_pass_rate_low"] == pytest.approx(interval.low, abs=1e-6)
            assert row["budgeted_pass_rate_high"] == pytest.approx(interval.high, abs=1e-6)

    def test_only_allocated_rollouts_are_asked_for(self, store: Store) -> None:
        """Through the cache that the runner puts between: a larger pilot then asks for nothing."""
        rows = questions(4)
        ids = rows["id"].to_pylist()
        engine = Scripted()

        def cached() -> CachedGenerator:
            return CachedGenerator(engine, store.child("cache"), "model", 4)

        pilot = pass_rates(rows, cached(), PASS_RATE)
        assert len(engine.asked) == 4 * 3
        budgeted(rows, pilot, cached(), dict.fromkeys(ids, 2), store)
        assert len(engine.asked) == 4 * 5
        pass_rates(rows, cached(), PASS_RATE.model_copy(update={"rollouts": 5}))
        assert len(engine.asked) == 4 * 5

    def test_rows_without_further_rollouts_keep_the_pilot(self, store: Store) -> None:
        rows = questions(3)
        pilot = pass_rates(rows, Scripted(), PASS_RATE)
        engine = Scripted()
        made = budgeted(rows, pilot, engine, {"another row": 5}, store)
        assert engine.asked == []
        for column in ("rollouts", "correct", "truncated", "pass_rate", "pass_rate_low"):
            assert made[f"budgeted_{column}"].to_pylist() == pilot[column].to_pylist()
        statuses = pilot["pass_rate_status"].to_pylist()
        assert made["rollouts_status"].to_pylist() == statuses

    def test_rows_without_a_pilot_keep_its_status(self, store: Store) -> None:
        rows = questions(3)
        answers = pa.array(["yes", None, "yes"])
        rows = rows.set_column(rows.column_names.index("answer"), "answer", answers)
        pilot = pass_rates(rows, Scripted(), PASS_RATE)
        statuses = [*pilot["pass_rate_status"].to_pylist()[:2], NOT_REQUESTED]
        verdicts = pa.array([*pilot["rollout_verdicts"].to_pylist()[:2], None])
        for name, column in (("pass_rate_status", statuses), ("rollout_verdicts", verdicts)):
            pilot = pilot.set_column(pilot.column_names.index(name), name, [column])
        made = budgeted(rows, pilot, Scripted(), {rows["id"][0].as_py(): 1}, store)
        assert made["rollouts_status"].to_pylist()[1:] == [statuses[1], NOT_REQUESTED]
        assert statuses[1].startswith("failed: no_answer")
        assert made["budgeted_rollouts"].to_pylist() == [4, None, None]
        assert made["budgeted_pass_rate"].to_pylist()[1:] == [None, None]

    def test_from_pilot_to_budget(self, store: Store) -> None:
        """Pilot, allocation and further rollouts in a row, by the stages' own columns."""
        rows = questions(8)
        pilot = pass_rates(rows, Scripted(), PASS_RATE)
        stage = AllocationStage(AllocationSettings(total=20, cap=6, gradient="one"), PASS_RATE)
        table = pilot.append_column("id", rows["id"])
        artifact = asyncio.run(stage.fit(Tables(table, 3), Tables(table.slice(0, 0), 1), {}))
        made = budgeted(rows, pilot, Scripted(), numbers_of(artifact), store)
        more = np.array(made["budgeted_rollouts"]) - np.array(pilot["rollouts"])
        assert more.sum() == 20
        assert more.max() <= 6
        never = np.array([rate in (None, 0) for rate in pilot["pass_rate"].to_pylist()])
        assert (more[never] == 0).all()


def test_stages_import_no_model_library() -> None:
    code = (
        "import stages.allocation.stage, stages.allocation.rollouts, sys;"
        "print([m for m in ('torch', 'ray', 'transformers', 'vllm') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert found.stdout.strip() == "[]"


def test_benchmark_finds_the_predicted_factor(tmp_path: Path) -> None:
    """Few prompts and repetitions; a rule that isn't the right one doesn't reach its factor."""
    command = [sys.executable, "benchmarks/allocation.py", "--check", "--json"]
    small = ["--prompts", "20", "--width", "4", "--repetitions", "400"]
    subprocess.run([*command, str(tmp_path / "a.json"), *small], check=True, cwd=ROOT)
    found = json.loads((tmp_path / "a.json").read_text())
    first = found["rows"][0]
    assert first["factor"] == pytest.approx(first["exact"], rel=0.15)
    assert found["predicted"] > 1.2
