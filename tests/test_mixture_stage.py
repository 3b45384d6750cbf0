"""The mixture stage on planted sources: the right weights, and bounds that hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sharded import Tables

from stages.errors import StageError
from stages.mixture.cost import cost_matrix
from stages.mixture.emitted import emitted_value
from stages.mixture.joint_lp import optimal_mixture_by_lp
from stages.mixture.problem import target_cloud, weight_bounds
from stages.mixture.settings import MixtureSettings
from stages.mixture.stage import MixtureStage, Supply, mixture_value
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
    stage = MixtureStage(MixtureSettings(**settings), supply or free, seed=1)
    outcome = stage.decide(Tables(rows, shard), Tables(wanted, 50), {"selection": store})
    return outcome.report


def test_planted_shares_are_found_and_the_certificate_holds(tmp_path: Path) -> None:
    data = planted(300, 200, (0.5, 0.3, 0.2, 0.0))
    report = solve(tmp_path, data, rows_per_source=60, max_rows_per_source=60, tolerance=0.5)
    found = [report["weights"][f"s{k}"] for k in range(4)]
    assert found == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.02)
    _, _, _, vectors, source, points = data
    # The exact optimum over all 1,200 rows, by a linear programme that never saw the sample.
    cost = cost_matrix(vectors.astype(np.float32), points.astype(np.float32), "euclidean")
    exact = optimal_mixture_by_lp(cost, source, np.ones(200) / 200, np.zeros(4), np.ones(4))
    assert report["lower_bound"] <= exact.value + 1e-9
    low, high = report["upper_interval"]
    assert exact.value <= high + 0.02 * exact.value
    assert report["gap"] == pytest.approx(
        (report["upper_estimate"] - report["lower_bound"]) / report["lower_bound"]
    )
    assert low <= report["upper_estimate"] <= high


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
        MixtureSettings(), seed=1,
    )  # fmt: skip
    # One source holding exactly these lines: the joint LP has no weight left to choose.
    cost = cost_matrix(vectors[lines].astype(np.float32), points.astype(np.float32), "euclidean")
    exact = optimal_mixture_by_lp(
        cost, np.zeros(7, dtype=int), np.ones(30) / 30, np.ones(1), np.ones(1)
    )
    assert found["value_emitted"] == pytest.approx(exact.value, rel=1e-9)
    assert found["value_emitted_lines"] == 7


def test_mixture_value_weighs_sources_not_rows() -> None:
    x = np.array([[0.0], [0.0], [0.0], [1.0]])
    cloud = target_cloud(
        Tables(pa.table({"id": ["t"], "task": ["a"], "embedding": [[0.0]]}), 1), 1, 0, "equal"
    )
    source = np.array([0, 0, 0, 1])
    value = mixture_value(x, source, np.array([0.25, 0.75]), cloud, "euclidean")
    assert value == pytest.approx(0.75)
