"""The mixture stage on planted sources: the right weights, and bounds that hold."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from sharded import Tables

from pipeline.backend import LocalBackend
from pipeline.rundir import RunColumns
from stages.base import in_turn
from stages.errors import StageError
from stages.mixture.certificate import CutSums
from stages.mixture.certified import Problem, sums_over_all_rows
from stages.mixture.cost import cost_matrix
from stages.mixture.emitted import emitted_value
from stages.mixture.joint_lp import optimal_mixture_by_lp
from stages.mixture.problem import target_cloud, weight_bounds
from stages.mixture.settings import MixtureSettings
from stages.mixture.space import Space
from stages.mixture.stage import MixtureStage, Supply
from stages.storage import Store


def planted(per_source: int, targets: int, share: Sequence[float], seed: int = 0) -> Any:
    """Sources around far-apart centres; targets drawn from them in known shares."""
    draws = np.random.default_rng(seed)
    centres = 6 * np.eye(len(share), 5)
    names = [f"s{k}" for k in range(len(share))]

    def cloud(k: int, n: int) -> np.ndarray:
        return centres[k] + 0.5 * draws.normal(size=(n, 5))

    vectors = np.concatenate([cloud(k, per_source) for k in range(len(share))])
    source = np.repeat(np.arange(len(share)), per_source)
    ids = [f"{i:032x}" for i in range(len(vectors))]
    rows = pa.table({"id": ids, "embedding": list(vectors.astype(np.float32))})
    counts = [round(targets * value) for value in share]
    points = np.concatenate([cloud(k, n) for k, n in enumerate(counts)])
    wanted = pa.table(
        {
            "id": [f"t{i}" for i in range(len(points))],
            "task": ["only"] * len(points),
            "embedding": list(points.astype(np.float32)),
        }
    )
    decisions = pa.table(
        {
            "id": ids,
            "source": [names[k] for k in source],
            "keep": [True] * len(ids),
            "reason": ["kept"] * len(ids),
            "tokens": [10] * len(ids),
        }
    )
    return rows, wanted, decisions, vectors, source, points


def solve(
    tmp_path: Path, data: Any, shard: int = 97, supply: Supply | None = None, **settings: Any
) -> Any:
    rows, wanted, decisions, *_ = data
    store = Store(str(tmp_path / "selection"))
    store.write_table("decisions.parquet", decisions)
    free = Supply(None, "rows", {}, frozenset())
    asked = MixtureSettings(**{"method": "transport", **settings})
    stage = MixtureStage(asked, supply or free, seed=1)
    outcome = stage.decide(Tables(rows, shard), Tables(wanted, 50), {"selection": store})
    return outcome.report


def test_planted_shares_are_found_and_the_certificate_holds(tmp_path: Path) -> None:
    data = planted(150, 100, (0.5, 0.3, 0.2, 0.0))
    report = solve(tmp_path, data, rows_per_source=60, max_rows_per_source=60, tolerance=0.5)
    found = [report["weights"][f"s{k}"] for k in range(4)]
    assert found == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.02)
    _, _, _, vectors, source, points = data
    # The exact optimum over all 600 rows, by a linear programme that never saw the sample.
    cost = cost_matrix(vectors.astype(np.float32), points.astype(np.float32), "euclidean")
    exact = optimal_mixture_by_lp(cost, source, np.ones(100) / 100, np.zeros(4), np.ones(4))
    assert report["lower_bound"] <= exact.value + 1e-9
    low, high = report["upper_interval"]
    assert exact.value <= high + 0.02 * exact.value
    assert report["gap"] == pytest.approx(
        (report["upper_estimate"] - report["lower_bound"]) / report["lower_bound"]
    )
    assert low <= report["upper_estimate"] <= high


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["transport", "energy"])
def test_fresh_rows_estimate_from_above_what_all_rows_cost(
    tmp_path: Path, seed: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5: bound <= exact value over all rows <= estimate, on rows that no solve saw."""
    monkeypatch.setattr("stages.mixture.certified._EXACT_ENTRIES", 0)
    data = planted(300, 40, (0.5, 0.3, 0.2), seed)
    report = solve(tmp_path, data, method=method, rows_per_source=50, max_rows_per_source=50)
    assert report["upper_from"] == "fresh rows"
    _, _, _, vectors, source, points = data
    cost = cost_matrix(vectors.astype(np.float32), points.astype(np.float32), "euclidean")
    given = np.array([report["weights"][f"s{k}"] for k in range(3)])
    value = optimal_mixture_by_lp(cost, source, np.ones(40) / 40, given, given).value
    assert report["lower_bound"] <= value
    assert value <= report["upper_interval"][1]
    assert report["upper_interval"][0] < report["upper_estimate"] < report["upper_interval"][1]
    assert report["upper_estimate"] <= value * 1.1, "an estimate this loose estimates nothing"


def test_report_does_not_depend_on_shards(tmp_path: Path) -> None:
    data = planted(80, 60, (0.6, 0.4))
    first, second = (solve(tmp_path, data, shard, rows_per_source=30) for shard in (11, 160))
    assert first["weights"] == second["weights"]
    assert first["lower_bound"] == pytest.approx(second["lower_bound"], rel=1e-12)


def test_shards_without_a_kept_row_are_passed_over(tmp_path: Path) -> None:
    rows, wanted, decisions, *rest = planted(80, 60, (0.6, 0.4))
    kept = [not 20 <= i < 60 for i in range(160)]
    some = decisions.set_column(2, "keep", pa.array(kept))
    dropped = solve(tmp_path, (rows, wanted, some, *rest), 10, rows_per_source=30)
    absent = (rows.filter(kept), wanted, decisions.filter(kept), *rest)
    assert dropped == solve(tmp_path, absent, 10, rows_per_source=30)


def test_sample_grows_until_the_gap_is_met_or_the_limit(tmp_path: Path) -> None:
    data = planted(400, 100, (0.6, 0.4))
    loose = solve(tmp_path, data, rows_per_source=20, tolerance=10)
    assert loose["rows_per_source"] == 20
    assert loose["certified"]
    tight = solve(tmp_path, data, rows_per_source=20, max_rows_per_source=80, tolerance=1e-9)
    assert tight["rows_per_source"] == 80
    assert not tight["certified"]
    assert tight["gap"] < loose["gap"]


def test_caps_of_rows_and_budget_hold(tmp_path: Path) -> None:
    data = planted(50, 60, (0.9, 0.1))
    supply = Supply(80.0, "rows", {}, frozenset())
    report = solve(tmp_path, data, supply=supply)
    assert report["weights"]["s0"] == pytest.approx(50 / 80, abs=1e-3)
    report = solve(tmp_path, data, supply=Supply(80.0, "rows", {"s0": 2.0}, frozenset()))
    assert report["weights"]["s0"] == pytest.approx(0.9, abs=0.05)
    report = solve(tmp_path, data, caps={"s0": 0.3})
    assert report["weights"]["s0"] == pytest.approx(0.3, abs=1e-3)


def test_anchor_rows_count_and_take_no_weight(tmp_path: Path) -> None:
    """What the user already trains on covers s0, so the rest should come from s1."""
    data = planted(100, 100, (0.5, 0.5))
    decisions = data[2]
    anchored = [source == "s0" for source in decisions["source"].to_pylist()]
    decisions = decisions.set_column(2, "keep", pa.array([not a for a in anchored]))
    decisions = decisions.set_column(
        3, "reason", pa.array(["anchor" if a else "kept" for a in anchored])
    )
    supply = Supply(100.0, "rows", {}, frozenset({"s0"}))
    report = solve(tmp_path, (data[0], data[1], decisions, *data[3:]), supply=supply)
    assert report["weights"] == {"s1": pytest.approx(1.0)}
    assert report["anchors"] == {"s0": 100.0}


def test_impossible_bounds_are_named() -> None:
    free: dict[str, float] = {}
    with pytest.raises(StageError, match=r"floors\.a = 0\.9"):
        weight_bounds(["a", "b"], {"a": 10, "b": 90}, 100, free, {"a": 0.9}, free, free)
    with pytest.raises(StageError, match=r"caps allow only 0\.500"):
        weight_bounds(["a", "b"], {"a": 10, "b": 40}, 100, free, free, free, free)
    with pytest.raises(StageError, match="floors exceed 1"):
        weight_bounds(["a", "b"], {"a": 99, "b": 99}, 99, free, {"a": 0.7, "b": 0.7}, free, free)


def test_equal_targets_are_one_point_with_their_joint_mass() -> None:
    wanted = pa.table(
        {
            "id": ["1", "2", "3", "4"],
            "task": ["a", "a", "a", "b"],
            "embedding": [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]],
        }
    )
    equal = target_cloud(Tables(wanted, 3), 100, 0, "equal")
    assert dict(zip(map(tuple, equal.vectors.tolist()), equal.mass.tolist(), strict=True)) == {
        (0.0, 1.0): pytest.approx(1 / 6),
        (1.0, 0.0): pytest.approx(1 / 3),
        (2.0, 2.0): pytest.approx(1 / 2),
    }
    rows = target_cloud(Tables(wanted, 3), 100, 0, "proportional")
    assert sorted(rows.mass.tolist()) == pytest.approx([0.25, 0.25, 0.5])


def test_value_of_emitted_rows_is_that_of_a_linear_programme(tmp_path: Path) -> None:
    rows, wanted, decisions, vectors, _, points = planted(40, 30, (0.6, 0.4))
    lines = np.array([0, 0, 3, 5, 41, 50, 77])
    report = {"weights": {"s0": 0.5, "s1": 0.5}, "available": {"s0": 40, "s1": 40}}
    found = emitted_value(
        Tables(rows, 9), Tables(wanted, 50), lines, decisions["source"].to_pylist(), report,
        MixtureSettings(), 1, Store(str(tmp_path)),
    )  # fmt: skip
    # One source holding exactly these lines: the joint LP has no weight left to choose.
    cost = cost_matrix(vectors[lines].astype(np.float32), points.astype(np.float32), "euclidean")
    exact = optimal_mixture_by_lp(
        cost, np.zeros(7, dtype=int), np.ones(30) / 30, np.ones(1), np.ones(1)
    )
    assert found["value_emitted"] == pytest.approx(exact.value, rel=1e-9)
    assert found["value_emitted_lines"] == 7


METHODS = ("transport", "debiased", "energy", "nearest", "chameleon", "uniform", "proportional")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_bounds_and_the_certificate(tmp_path: Path, method: str) -> None:
    data = planted(40, 40, (0.7, 0.3, 0.0))
    report = solve(tmp_path, data, method=method, caps={"s0": 0.5}, floors={"s2": 0.1})
    weights = report["weights"]
    assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
    assert weights["s0"] <= 0.5 + 1e-9
    assert weights["s2"] >= 0.1 - 1e-9
    vectors, source, points = data[3:]
    cost = cost_matrix(vectors.astype(np.float32), points.astype(np.float32), "euclidean")
    given = np.array([weights[f"s{k}"] for k in range(3)])
    # All rows fit, so the value is exact: that of a linear programme with the weights fixed.
    value = optimal_mixture_by_lp(cost, source, np.ones(40) / 40, given, given).value
    assert report["upper_estimate"] == pytest.approx(value, rel=1e-6)
    least = optimal_mixture_by_lp(cost, source, np.ones(40) / 40, [0, 0, 0.1], [0.5, 1, 1]).value
    assert report["lower_bound"] <= least * (1 + 1e-9)


@pytest.mark.parametrize("method", ["transport", "debiased", "energy"])
def test_planted_shares_are_found_by_every_measure(tmp_path: Path, method: str) -> None:
    report = solve(tmp_path, planted(120, 100, (0.5, 0.3, 0.2, 0.0)), method=method)
    found = [report["weights"][f"s{k}"] for k in range(4)]
    assert found == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.03)
    for name, (low, high) in report["ranges"].items():
        assert low - 1e-9 <= report["weights"][name] <= high + 1e-9


def test_nearest_shares_are_those_of_the_nearest_rows(tmp_path: Path) -> None:
    data = planted(50, 30, (0.6, 0.4, 0.0))
    report = solve(tmp_path, data, method="nearest", neighbours=3)
    cost = cost_matrix(data[3].astype(np.float32), data[5].astype(np.float32), "euclidean")
    nearest = data[4][np.argsort(cost, axis=0)[:3]]
    for k in range(3):
        assert report["weights"][f"s{k}"] == pytest.approx((nearest == k).mean(), abs=1e-9)


def test_kept_sources_keep_their_proportions_and_the_loss_is_bounded(tmp_path: Path) -> None:
    data = planted(60, 100, (0.5, 0.2, 0.3))
    free = solve(tmp_path, data)
    report = solve(tmp_path, data, keep={"s0": 0.2, "s1": 0.2})
    assert report["weights"]["s0"] == pytest.approx(report["weights"]["s1"], rel=1e-6)
    assert report["free_lower_bound"] <= free["upper_estimate"] * (1 + 1e-9)
    true_loss = report["upper_estimate"] / free["upper_estimate"] - 1
    assert true_loss > 0.05
    assert true_loss <= report["loss_of_keeping"] + 1e-9


def test_a_pull_to_the_natural_mixture_is_certified_with_it(tmp_path: Path) -> None:
    data = planted(60, 100, (0.8, 0.2))
    free = solve(tmp_path, data)
    report = solve(tmp_path, data, kl=10.0, tolerance=1e-3)
    assert free["weights"]["s0"] > 0.75
    assert 0.5 < report["weights"]["s0"] < free["weights"]["s0"] - 0.05
    vectors, source, points = data[3:]
    cost = cost_matrix(vectors.astype(np.float32), points.astype(np.float32), "euclidean")

    def objective(share: float) -> float:
        fixed = np.array([share, 1 - share])
        value = optimal_mixture_by_lp(cost, source, np.full(100, 0.01), fixed, fixed).value
        return value + 10.0 * float(fixed @ np.log(2 * fixed))

    values = [objective(share) for share in np.linspace(0.5, 0.8, 31)]
    assert report["objective_lower_bound"] <= min(values)
    assert report["objective_estimate"] <= min(values) * (1 + 1e-4)
    assert report["objective_estimate"] == pytest.approx(
        objective(report["weights"]["s0"]), rel=1e-6
    )
    assert report["upper_estimate"] == pytest.approx(
        report["objective_estimate"] - 10.0 * report["divergence"]
    )
    assert report["lower_bound"] <= free["upper_estimate"]
    assert report["certified"]
    assert report["gap"] > report["tolerance"], "in transport alone it isn't the least"
    low, high = report["ranges"]["s0"]
    near = [s for s, v in zip(np.linspace(0.5, 0.8, 31), values, strict=True)
            if v <= 1.01 * report["objective_lower_bound"]]  # fmt: skip
    assert low <= min(near)
    assert max(near) <= high


def test_principal_components_are_kept_and_serve_emission(tmp_path: Path) -> None:
    data = planted(60, 60, (0.6, 0.4))
    rows, wanted, decisions, _, source, _ = data
    store = Store(str(tmp_path / "selection"))
    store.write_table("decisions.parquet", decisions)
    settings = MixtureSettings(method="transport", pca=2)
    stage = MixtureStage(settings, Supply(None, "rows", {}, frozenset()), seed=1)
    outcome = stage.decide(Tables(rows, 7), Tables(wanted, 50), {"selection": store})
    again = stage.decide(Tables(rows, 50), Tables(wanted, 50), {"selection": store})
    assert outcome.tables["projection.parquet"].equals(again.tables["projection.parquet"])
    mixture = Store(str(tmp_path / "mixture"))
    mixture.write_table("projection.parquet", outcome.tables["projection.parquet"])
    value = emitted_value(
        Tables(rows, 9), Tables(wanted, 50), np.arange(len(source)),
        decisions["source"].to_pylist(), outcome.report, settings, 1, mixture,
    )["value_emitted"]  # fmt: skip
    found = outcome.tables["projection.parquet"]["vector"].to_pylist()
    mean, directions = np.array(found[0]), np.array(found[1:])
    x, y = (
        (np.array(table["embedding"].to_pylist()) - mean) @ directions.T for table in (rows, wanted)
    )
    uniform = np.ones(1)
    exact = optimal_mixture_by_lp(
        cost_matrix(x, y, "euclidean"), np.zeros(120, int), np.ones(60) / 60, uniform, uniform
    ).value
    assert value == pytest.approx(exact, rel=1e-6)


def test_a_task_that_a_source_does_not_serve_costs_it_weight(tmp_path: Path) -> None:
    data = planted(40, 40, (0.5, 0.5))
    wanted = data[1].set_column(1, "task", pa.array(["a"] * 20 + ["b"] * 20))
    data = (data[0], wanted, *data[2:])
    plain = solve(tmp_path, data, method="transport")
    priced = solve(
        tmp_path, data, method="transport", serves={"s0": ["b"], "s1": ["a"]}, task_cost=100
    )
    assert plain["lower_bound"] < priced["lower_bound"]
    # Both sources are now far from what they resemble: crossing over costs 6 * sqrt(2), not 100.
    assert priced["upper_estimate"] < 100
    with pytest.raises(StageError, match="names the task 'c'"):
        solve(tmp_path, data, serves={"s0": ["c"]}, task_cost=1)


def test_settings_that_disagree_are_refused() -> None:
    for wrong in (
        {"method": "energy", "keep": {"a": 0.5}},
        {"keep": {"a": 0.0}, "method": "transport"},
        {"kl": 0.1, "method": "energy"},
        {"kl": 0.1, "keep": {"a": 0.5}, "method": "transport"},
        {"serves": {"a": ["b"]}},
        {"task_cost": 1.0},
        {"rows_per_source": 50, "max_rows_per_source": 40},
    ):
        with pytest.raises(ValidationError):
            MixtureSettings(**wrong)


# Bad input


def test_one_source_has_weight_one_and_a_bound(tmp_path: Path) -> None:
    for method in METHODS:
        report = solve(tmp_path, planted(30, 20, (1.0,)), method=method)
        assert report["weights"] == {"s0": pytest.approx(1)}
        assert report["gap"] == pytest.approx(0, abs=1e-9)


BOTH = pytest.mark.parametrize("method", ["transport", "energy"])


@BOTH
def test_a_floor_above_what_its_source_has_is_named(tmp_path: Path, method: str) -> None:
    data = planted(30, 20, (0.5, 0.5))
    supply = Supply(50.0, "rows", {}, frozenset())
    with pytest.raises(StageError, match=r"floors\.s1 = 0\.7 asks for more than the 30 available"):
        solve(tmp_path, data, supply=supply, method=method, floors={"s1": 0.7})


@BOTH
def test_caps_that_leave_too_little_are_named(tmp_path: Path, method: str) -> None:
    data = planted(30, 20, (0.5, 0.5))
    with pytest.raises(StageError, match=r"caps allow only 0\.700.* s0: 30, s1: 30"):
        solve(tmp_path, data, method=method, caps={"s0": 0.3, "s1": 0.4})


@pytest.mark.parametrize("method", ["transport", "energy", "debiased"])
@pytest.mark.parametrize("rows", [1, 20])
def test_targets_all_alike_get_the_nearest_source(tmp_path: Path, method: str, rows: int) -> None:
    data = planted(30, 20, (0.5, 0.5))
    same = data[1].set_column(2, "embedding", pa.array([[6.0, 0, 0, 0, 0]] * 20))
    report = solve(tmp_path, (data[0], same.slice(0, rows), *data[2:]), method=method)
    assert report["weights"]["s0"] == pytest.approx(1, abs=1e-3)
    vectors = data[3][:30].astype(np.float32)
    nearest = np.linalg.norm(vectors - np.array([6.0, 0, 0, 0, 0]), axis=1).mean()
    # Transport's own weights are optimal to 1e-4, and the other source is eight times as far.
    assert report["upper_estimate"] == pytest.approx(nearest, rel=1e-4)
    assert report["lower_bound"] <= nearest * (1 + 1e-9)
    assert report["energy_ranges"] is None, "one point says nothing of how targets vary"


@pytest.mark.parametrize("method", ["transport", "energy", "debiased"])
def test_a_source_of_one_row_is_weighed(tmp_path: Path, method: str) -> None:
    """The target is half of s0 and half of the very row that s1 has."""
    data = planted(30, 20, (1.0, 0.0))
    first = [i <= 30 for i in range(60)]
    decisions = data[2].set_column(2, "keep", pa.array(first))
    reasons = pa.array(["kept" if kept else "cut" for kept in first])
    decisions = decisions.set_column(3, "reason", reasons)
    row = data[0]["embedding"].to_pylist()[30]
    twice = pa.table(
        {
            "id": [f"t{i}" for i in range(40)],
            "task": ["only"] * 40,
            "embedding": pa.array(data[1]["embedding"].to_pylist() + [row] * 20),
        }
    )
    report = solve(
        tmp_path, (data[0], twice, decisions, *data[3:]), method=method,
        task_weights="proportional",
    )  # fmt: skip
    assert report["weights"]["s1"] == pytest.approx(0.5, abs=0.05)
    if method == "energy":
        low, high = report["ranges"]["s1"]
        assert low <= 0.5 <= high


def with_vector(data: Any, table: int, place: int, vector: list[float]) -> Any:
    """The data, one vector of its rows (0) or targets (1) replaced."""
    where = data[table].schema.get_field_index("embedding")
    vectors = data[table]["embedding"].to_pylist()
    vectors[place] = vector
    column = pa.array(vectors, pa.list_(pa.float32()))
    changed = list(data)
    changed[table] = data[table].set_column(where, "embedding", column)
    return tuple(changed)


@BOTH
@pytest.mark.parametrize("table", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_an_error(
    tmp_path: Path, bad: float, table: int, method: str
) -> None:
    data = with_vector(planted(10, 10, (0.5, 0.5)), table, 3, [0.0, bad, 0.0, 0.0, 0.0])
    with pytest.raises(StageError, match="NaN"):
        solve(tmp_path, data, method=method)


@BOTH
@pytest.mark.parametrize("table", [0, 1])
def test_a_zero_vector_has_no_cosine(tmp_path: Path, table: int, method: str) -> None:
    data = with_vector(planted(10, 10, (0.5, 0.5)), table, 3, [0.0] * 5)
    with pytest.raises(StageError, match="zero vector"):
        solve(tmp_path, data, metric="cosine", method=method)
    assert solve(tmp_path, data, method=method)["lower_bound"] > 0


def test_a_source_without_vectors_is_named(tmp_path: Path) -> None:
    data = planted(10, 10, (0.5, 0.5))
    vectors = [None if i >= 10 else v for i, v in enumerate(data[0]["embedding"].to_pylist())]
    rows = data[0].set_column(1, "embedding", pa.array(vectors, pa.list_(pa.float32())))
    with pytest.raises(StageError, match="source s1 has no kept row"):
        solve(tmp_path, (rows, *data[1:]))


def test_decisions_of_other_rows_are_refused(tmp_path: Path) -> None:
    data = planted(10, 10, (0.5, 0.5))
    ids = data[2]["id"].to_pylist()
    decisions = data[2].set_column(0, "id", pa.array(ids[::-1]))
    with pytest.raises(StageError, match="other rows"):
        solve(tmp_path, (data[0], data[1], decisions, *data[3:]))


def test_hundreds_of_sources_get_right_weights(tmp_path: Path) -> None:
    """The optimum by the joint linear programme over all rows, of 240 sources of two rows."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(480, 4)), rng.normal(size=(12, 4))
    source = np.repeat(np.arange(240), 2)
    ids = [f"{i:032x}" for i in range(480)]
    rows = pa.table({"id": ids, "embedding": list(x.astype(np.float32))})
    wanted = pa.table(
        {
            "id": [f"t{j}" for j in range(12)],
            "task": ["a"] * 12,
            "embedding": list(y.astype(np.float32)),
        }
    )
    decisions = pa.table(
        {
            "id": ids,
            "source": [f"s{k:03d}" for k in source],
            "keep": [True] * 480,
            "reason": ["kept"] * 480,
            "tokens": [1] * 480,
        }
    )
    report = solve(tmp_path, (rows, wanted, decisions), method="transport")
    by_energy = solve(tmp_path, (rows, wanted, decisions), method="energy")
    cost = cost_matrix(x.astype(np.float32), y.astype(np.float32), "euclidean")
    exact = optimal_mixture_by_lp(cost, source, np.ones(12) / 12, np.zeros(240), np.ones(240))
    assert report["upper_estimate"] == pytest.approx(exact.value, rel=1e-3)
    assert report["lower_bound"] <= exact.value * (1 + 1e-9)
    assert report["energy_weights"] is None
    assert by_energy["lower_bound"] == report["lower_bound"]
    assert by_energy["upper_estimate"] >= report["lower_bound"]
    p = np.array([by_energy["weights"][f"s{k:03d}"] for k in range(240)])
    assert p.sum() == pytest.approx(1, abs=1e-9)
    value = optimal_mixture_by_lp(cost, source, np.ones(12) / 12, p, p).value
    assert by_energy["upper_estimate"] == pytest.approx(value, rel=1e-6)
    with pytest.raises(StageError, match="debiased takes at most 200 sources, and there are 240"):
        solve(tmp_path, (rows, wanted, decisions), method="debiased")


class NotRead(Tables):
    """Rows that nobody may read: what is refused must be refused before any work."""

    def iter(self, names: Sequence[str]) -> Any:
        raise AssertionError("vectors were read")

    def map(self, names: Sequence[str], fn: Any, merge: Any, *, beside: pa.Table) -> Any:
        raise AssertionError("vectors were read")


@pytest.mark.parametrize(
    ("method", "sources", "said"),
    [
        ("energy", 2501, "energy takes at most 2,500 sources, and there are 2,501; .*transport"),
        ("debiased", 201, "debiased takes at most 200 sources, and there are 201; .*energy or"),
        ("transport", 8001, r"8,001 sources and 2,000 target points: .*target_rows to 1,999"),
    ],
)
def test_too_many_sources_are_refused_before_any_vector_is_read(
    tmp_path: Path, method: str, sources: int, said: str
) -> None:
    rng = np.random.default_rng(0)
    names = [f"s{k:05d}" for k in range(sources)]
    decisions = pa.table(
        {
            "id": names,
            "source": names,
            "keep": [True] * sources,
            "reason": ["kept"] * sources,
            "tokens": [1] * sources,
        }
    )
    wanted = pa.table(
        {
            "id": [f"t{j}" for j in range(2000)],
            "task": ["a"] * 2000,
            "embedding": list(rng.normal(size=(2000, 2)).astype(np.float32)),
        }
    )
    store = Store(str(tmp_path))
    store.write_table("decisions.parquet", decisions)
    settings = MixtureSettings(method=method, target_rows=2000)
    stage = MixtureStage(settings, Supply(None, "rows", {}, frozenset()), seed=1)
    with pytest.raises(StageError, match=said):
        stage.decide(NotRead(decisions, 100), Tables(wanted, 500), {"selection": store})


# Shards on workers


def test_shards_of_a_run_taken_elsewhere_give_the_same_sums(tmp_path: Path) -> None:
    """T10: count, total and squares add up, whatever the shards and wherever they are taken."""
    rows, wanted, decisions, *_ = planted(40, 20, (0.5, 0.5))
    cloud = target_cloud(Tables(wanted, 50), 100, 1, "equal")
    free = np.zeros(2), np.ones(2)

    def sums(shard: int, each: Any) -> CutSums:
        run = Store(str(tmp_path / str(shard)))
        for number, start in enumerate(range(0, 80, shard)):
            part = rows.slice(start, shard)
            run.write_table(f"ingest/part-{number:05d}.parquet", part.select(["id"]))
            run.write_table(f"embedding/part-{number:05d}.parquet", part)
        names = tuple(run.names("ingest"))
        columns = RunColumns(run, names, {"id": "ingest", "embedding": "embedding"}, 80, each=each)
        problem = Problem(
            columns, decisions, ["s0", "s1"], cloud.vectors, cloud.mass, Space("euclidean"),
            np.eye(2), *free, seed=1,
        )  # fmt: skip
        return sums_over_all_rows(problem, np.random.default_rng(0).normal(size=(3, 20)))

    def elsewhere(fn: Any, tasks: Any) -> Any:
        fn = pickle.loads(pickle.dumps(fn))
        for task in tasks:
            sent = pickle.dumps(task)
            assert len(sent) < 40 * 33 + 2000, "a task brings its own rows, not everybody's"
            yield fn(pickle.loads(sent))

    whole = sums(80, in_turn)
    for shard, each in ((7, in_turn), (33, elsewhere)):
        parts = sums(shard, each)
        np.testing.assert_array_equal(parts.count, whole.count)
        np.testing.assert_allclose(parts.total, whole.total, rtol=1e-12)
        np.testing.assert_allclose(parts.squares, whole.squares, rtol=1e-12)


def test_a_run_maps_large_mixtures_over_its_backend(
    recipe: Any, execute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute()
    folder = Store(str(recipe.run_folder / "mixture"))
    here = folder.read_json("manifest.json")["report"]
    monkeypatch.setattr("pipeline.runner._ROWS_ON_WORKERS", 1)
    mapped: list[int] = []
    plain = LocalBackend.map

    def counted(self: Any, fn: Any, tasks: Any, gpus: float) -> Any:
        listed = list(tasks)
        mapped.append(len(listed))
        return plain(self, fn, listed)

    monkeypatch.setattr(LocalBackend, "map", counted)
    execute(restart_from="mixture")
    assert mapped
    assert set(mapped) == {3}, "a task is a shard"
    assert folder.read_json("manifest.json")["report"] == here


def test_a_gpu_that_is_not_there_is_said(recipe: Any, execute: Any) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe.value["execution"]["pass_gpus"] = 0.5
    with pytest.raises(StageError, match=r"execution\.pass_gpus asks for a GPU"):
        execute()
