"""Values of rows: derivatives of transport, the selection that they stand for, and the stages."""

from __future__ import annotations

import asyncio
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import linprog
from sharded import Tables

from stages.errors import StageError
from stages.mixture.cost import cost_matrix
from stages.mixture.transport import transport
from stages.storage import Store
from stages.valuation.potentials import FILE, PotentialsStage, read_potentials
from stages.valuation.settings import ValuationSettings
from stages.valuation.stage import ValuationStage
from stages.valuation.values import calibrated_gradient, row_values, selection_potentials


def clouds(seed: int, n: int = 14, m: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    # Generic masses: with equal ones optimal potentials aren't unique, and transport has kinks.
    return draws.normal(size=(n, 3)), draws.normal(size=(m, 3)), draws.dirichlet(3 * np.ones(m))


def moved(x: np.ndarray, y: np.ndarray, b: np.ndarray, to: np.ndarray, share: float) -> float:
    """Transport after a share of the pool has moved to one row."""
    a = np.append(np.full(len(x), (1 - share) / len(x)), share)
    return transport(cost_matrix(np.vstack([x, to]), y, "euclidean"), a, b).value


@pytest.mark.parametrize("seed", range(6))
def test_value_is_how_fast_transport_falls(seed: int) -> None:
    """By brute force: the transport solved again with a little more of the row in the pool."""
    x, y, b = clouds(seed)
    solved = calibrated_gradient(x, y, b, "euclidean")
    fresh = np.random.default_rng(seed + 100).normal(size=(4, 3))
    rows = np.vstack([x[:4], fresh])
    values = row_values(rows, solved.potentials, "euclidean")
    step = 1e-6
    for row, value in zip(rows, values.tolist(), strict=True):
        fall = (solved.transport - moved(x, y, b, row, step)) / step
        assert fall == pytest.approx(value, abs=1e-5)
    assert solved.values == pytest.approx(row_values(x, solved.potentials, "euclidean"))


def test_values_of_the_sample_are_lava_s_but_for_sign_and_scale() -> None:
    """LAVA's: the derivative as a row gains mass and all others lose it evenly."""
    x, y, b = clouds(3)
    n = len(x)
    cost = cost_matrix(x, y, "euclidean")
    solved = calibrated_gradient(x, y, b, "euclidean")
    step = 1e-6
    for i in range(n):
        towards = np.full(n, -1 / (n - 1))
        towards[i] = 1.0
        up, down = (transport(cost, 1 / n + s * towards, b).value for s in (step, -step))
        lava = (up - down) / (2 * step)
        assert -solved.values[i] * n / (n - 1) == pytest.approx(lava, abs=1e-5)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_positive_value_are_the_linear_programme_s_selection(
    seed: int, share: float
) -> None:
    """min <C, P> with row sums at most 1 / (share n), by HiGHS."""
    x, y, b = clouds(seed)
    n, m = len(x), len(y)
    cost = cost_matrix(x, y, "euclidean")
    answer = linprog(
        cost.ravel(),
        A_ub=np.kron(np.eye(n), np.ones(m)),
        b_ub=np.full(n, 1 / (share * n)),
        A_eq=np.kron(np.ones(n), np.eye(m)),
        b_eq=b,
        method="highs",
    )
    solved = selection_potentials(x, y, b, "euclidean", share)
    assert solved.transport == pytest.approx(answer.fun, rel=1e-9)
    used = answer.x.reshape(n, m).sum(axis=1) * share * n
    assert (used[solved.values > 1e-9] > 1 - 1e-6).all()
    assert (used[solved.values < -1e-9] < 1e-6).all()
    # A price of a place below zero would mean that rows are taken against their cost.
    assert (-answer.ineqlin.marginals >= -1e-12).all()


def test_selection_is_near_the_best_subset() -> None:
    """All subsets of 4 of 11 rows tried; the linear programme is below every one of them."""
    ratios = []
    for seed in range(8):
        x, y, b = clouds(seed, n=11, m=5)
        b = np.full(5, 0.2)

        def nearness(rows: Any, x: Any = x, y: Any = y, b: Any = b) -> float:
            return transport(cost_matrix(x[list(rows)], y, "euclidean"), np.ones(4), b).value

        best = min(nearness(rows) for rows in combinations(range(11), 4))
        solved = selection_potentials(x, y, b, "euclidean", 4 / 11)
        assert solved.transport <= best + 1e-9
        ratios.append(nearness(np.argsort(-solved.values, kind="stable")[:4]) / best)
    assert np.mean(ratios) < 1.1


def test_many_rows_of_one_kind_lose_their_value() -> None:
    """Nine in ten rows are near one of two targets; half of the places belong to the other."""
    draws = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [8.0, 0.0]])
    common = centres[0] + 0.1 * draws.normal(size=(180, 2))
    rare = centres[1] + 2.0 * draws.normal(size=(20, 2))
    x = np.vstack([common, rare])
    y = np.vstack([c + 0.1 * draws.normal(size=(10, 2)) for c in centres])
    b = np.full(20, 0.05)
    values = selection_potentials(x, y, b, "euclidean", 0.2).values
    chosen = np.argsort(-values, kind="stable")[:40]
    assert 18 <= (chosen >= 180).sum() <= 20
    assert (values[:180] > 1e-9).sum() <= 22

    def nearness(rows: np.ndarray) -> float:
        return transport(cost_matrix(x[rows], y, "euclidean"), np.ones(len(rows)), b).value

    single = np.argsort(-calibrated_gradient(x, y, b, "euclidean").values, kind="stable")[:40]
    assert nearness(chosen) < nearness(single)


# Stages


def tables(seed: int, n: int = 60) -> tuple[pa.Table, pa.Table]:
    draws = np.random.default_rng(seed)
    vectors = draws.normal(size=(n, 4)).astype(np.float32)
    rows = pa.table(
        {
            "id": [f"{i:032x}" for i in range(n)],
            "embedding": pa.array([*vectors[:-1].tolist(), None], pa.list_(pa.float32())),
        }
    )
    targets = pa.table(
        {
            "id": [f"t{i}" for i in range(9)],
            "task": ["a"] * 6 + ["b"] * 3,
            "embedding": pa.array(
                draws.normal(size=(9, 4)).astype(np.float32).tolist(), pa.list_(pa.float32())
            ),
        }
    )
    return rows, targets


def valued(tmp_path: Path, rows: pa.Table, targets: pa.Table, shard: int, **fields: Any) -> Any:
    settings = ValuationSettings(**fields)
    fit = PotentialsStage(settings, 7)
    artifact = asyncio.run(fit.fit(Tables(rows, shard), Tables(targets, 4), {}))
    store = Store(str(tmp_path / "potentials"))
    store.write_bytes(FILE, artifact.files[FILE])
    stage = ValuationStage(settings)
    parts = [
        asyncio.run(stage.process(table, {}, {"potentials": store}))
        for table in Tables(rows, shard).iter(("id", "embedding"))
    ]
    return pa.concat_tables(parts), artifact, read_potentials(store)


def test_every_row_gets_the_value_of_the_sample_s_potentials(tmp_path: Path) -> None:
    rows, targets = tables(0)
    table, artifact, potentials = valued(tmp_path, rows, targets, 13, sample_rows=25)
    assert artifact.report["sampled_rows"] in (24, 25)
    vectors = np.array(rows["embedding"].to_pylist()[:-1], np.float64)
    cost = cost_matrix(vectors, potentials.targets, "euclidean")
    by_hand = potentials.level - (cost - potentials.potentials).min(axis=1)
    assert table["transport_value"].to_pylist()[:-1] == pytest.approx(by_hand.tolist(), rel=1e-6)
    assert table["transport_value"][-1].as_py() is None
    assert table["valuation_status"].to_pylist() == ["ok"] * 59 + ["failed: no_embedding"]


@pytest.mark.parametrize("share", [None, 0.3])
def test_values_depend_on_neither_shards_nor_repeated_rows(tmp_path: Path, share: Any) -> None:
    rows, targets = tables(1)
    one, _, _ = valued(tmp_path, rows, targets, 60, share=share)
    other, _, _ = valued(tmp_path, rows, targets, 7, share=share)
    assert one.to_pylist() == other.to_pylist()
    again = pa.table(
        {
            "id": [f"{i:032x}" for i in range(1000, 1000 + 120)],
            "embedding": pa.chunked_array([*rows["embedding"].chunks, *rows["embedding"].chunks]),
        }
    )
    twice, artifact, _ = valued(tmp_path, again, targets, 50, share=share)
    assert artifact.report["distinct_vectors"] == 59
    assert twice.slice(0, 60).to_pylist() == one.to_pylist()


def test_tasks_have_equal_mass_unless_they_shall_not(tmp_path: Path) -> None:
    rows, targets = tables(2)
    equal, _, _ = valued(tmp_path, rows, targets, 60)
    by_rows, _, _ = valued(tmp_path, rows, targets, 60, task_weights="proportional")
    assert equal["transport_value"].to_pylist() != by_rows["transport_value"].to_pylist()


def test_nothing_to_value_is_an_error(tmp_path: Path) -> None:
    rows, targets = tables(3)
    none = rows.set_column(1, "embedding", pa.nulls(60, pa.list_(pa.float32())))
    with pytest.raises(StageError, match="no sampled row has an embedding"):
        valued(tmp_path, none, targets, 60)


def test_recipe_selects_by_the_value(recipe: Any, execute: Any) -> None:
    recipe.value["valuation"] = {"share": 0.5}
    recipe.value["selection"] = {"score": "transport_value", "share": 0.5}
    del recipe.value["dictionary"], recipe.value["features"]
    execute()
    folder = recipe.run_folder
    parts = sorted((folder / "valuation").glob("part-*.parquet"))
    found = pa.concat_tables([pq.read_table(part) for part in parts]).to_pylist()
    value = {row["id"]: row["transport_value"] for row in found}
    decisions = pq.read_table(folder / "selection" / "decisions.parquet").to_pylist()
    passed = [row for row in decisions if row["keep"] or row["reason"] == "below_cut"]
    kept = [value[row["id"]] for row in passed if row["keep"]]
    assert min(kept) >= max(value[row["id"]] for row in passed if not row["keep"])
    manifest = json.loads((folder / "potentials" / "manifest.json").read_text())
    assert 0 < manifest["report"]["positive_share"] < 1
    done = execute()
    assert done.kinds("valuation") == execute().kinds("valuation")
    assert not done.asked
