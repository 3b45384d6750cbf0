"""The Ray backend: an actor that dies, a pool that can't be placed, a cluster that isn't ours."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from stages.base import in_turn
from stages.rows import ROWS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def backend() -> Iterator[Any]:
    from pipeline.ray_backend import RayBackend

    backend = RayBackend(place_timeout_s=20, shards_in_flight=2)
    yield backend
    asyncio.run(backend.close())


def task(recipe: Any, part: str) -> Any:
    """A shard of the difficulty stage of an ingested run."""
    from pipeline.config import read_config
    from pipeline.runner import Run

    job = Run(read_config(recipe.save()), lambda _: None)
    stage = job.flow.rows["difficulty"]
    homes = job.flow.home_of("difficulty")
    return stage, job._task(stage, part, homes, "mark", targets=False, limit_key=None)


def test_killed_engine_actor_is_replaced_and_only_its_shard_is_redone(
    backend: Any, recipe: Any, execute: Any
) -> None:
    import ray

    execute("ingest")
    stage, first = task(recipe, "part-00000.parquet")
    _, second = task(recipe, "part-00001.parquet")

    async def through_a_death() -> list[Any]:
        await backend.open(stage.engines(), {})
        reports = [await backend.shard(first)]
        actor = backend._pools[("scorer", "student")][0]
        victim = await actor.load.remote()
        psutil.Process(victim).kill()
        reports.append(await backend.shard(second))
        assert await actor.load.remote() != victim
        return reports

    done = (recipe.run_folder / "difficulty").glob("part-*.parquet")
    reports = asyncio.run(through_a_death())
    assert [report.computed for report in reports] == [8, 8]
    assert sorted(file.name for file in done) == ["part-00000.parquet", "part-00001.parquet"]
    assert ray.is_initialized()


def test_pool_that_cannot_be_placed_says_what_is_missing(recipe: Any, execute: Any) -> None:
    from pipeline.config import Placement
    from pipeline.ray_backend import RayBackend
    from stages.errors import EngineError

    execute("ingest")
    stage, _ = task(recipe, "part-00000.parquet")
    impatient = RayBackend(place_timeout_s=1, shards_in_flight=1)
    with pytest.raises(EngineError, match=r"engine student: .* placed 0 of 1 .*cpus: 4096.*CPU: "):
        asyncio.run(impatient.open(stage.engines(), {"student": Placement(cpus=4096)}))


def test_model_that_is_not_there_comes_back_as_our_error(
    backend: Any, recipe: Any, execute: Any, tmp_path: Path
) -> None:
    from stages.base import EngineSpec
    from stages.engines.settings import ModelSettings
    from stages.errors import ConfigError

    missing = EngineSpec("scorer", "gone", ModelSettings(model=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="no such file or folder"):
        asyncio.run(backend.open({"student": missing}, {}))


def test_joined_cluster_is_left_running(recipe: Any) -> None:
    """A cluster that was there before the run is there after it."""
    code = f"""
import asyncio, os, ray
from pipeline.ray_backend import RayBackend
own = ray.init(num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1",
               log_to_driver=False, logging_level="ERROR")
import subprocess, sys
os.environ["RAY_ADDRESS"] = own["gcs_address"]
guest = "import asyncio, ray; from pipeline.ray_backend import RayBackend; " \\
        "b = RayBackend(5, 1); asyncio.run(b.close()); print('guest', ray.is_initialized())"
done = subprocess.run(
    [sys.executable, "-c", guest], capture_output=True, text=True, cwd={str(ROOT)!r}
)
print(done.stdout, done.stderr[-2000:])
print("alive", ray.get(ray.remote(lambda: 41 + 1).options(num_cpus=0).remote()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert "guest True" in done.stdout, done.stdout + done.stderr
    assert "alive 42" in done.stdout


def test_tasks_over_shards_are_spread_and_answered_in_order(backend: Any, tmp_path: Path) -> None:
    from functools import partial

    from stages.ingest import NearDuplicateSettings
    from stages.ingest.near_duplicates import found_near_duplicates
    from stages.storage import Store

    asked = [f"{' '.join('abcdefgh')} {i // 2}" for i in range(40)]
    rows = [
        {"source": "s", "messages": [{"role": "user", "content": text},
                                     {"role": "assistant", "content": "yes"}]}
        for text in asked
    ]  # fmt: skip
    schema = pa.schema([ROWS.field("source"), ROWS.field("messages")])
    store, parts = Store(str(tmp_path)), []
    for start in range(0, 40, 10):
        parts.append((f"part-{start}.parquet", 10))
        table = pa.Table.from_pylist(rows[start : start + 10], schema=schema)
        store.write_arrow(parts[-1][0], table)
    wanted = NearDuplicateSettings(part="prompt", threshold=0.9)
    find = partial(found_near_duplicates, store, parts, wanted, {"s": 0})
    here, spread = find(in_turn), find(backend.map)
    assert here.rows.tolist() == spread.rows.tolist() == list(range(1, 40, 2))
    assert here.kept.tolist() == spread.kept.tolist()


@pytest.mark.parametrize("method", ["energy", "transport"])
def test_mixture_over_ray_tasks_equals_the_local_one(
    backend: Any, tmp_path: Path, method: str
) -> None:
    """T10: sums over shards add up, so bounds differ by rounding alone; weights not at all."""
    import numpy as np

    from pipeline.rundir import RunColumns
    from stages.mixture.certified import Problem, sums_over_all_rows
    from stages.mixture.settings import MixtureSettings
    from stages.mixture.space import Space
    from stages.mixture.stage import MixtureStage, Supply
    from stages.storage import Store

    rng = np.random.default_rng(7)
    source = np.repeat(np.arange(3), 60)
    centres = 3 * np.eye(3, 6)
    vectors = (centres[source] + rng.normal(size=(180, 6))).astype(np.float32)
    points = centres[rng.choice(3, 40, p=[0.5, 0.3, 0.2])] + rng.normal(size=(40, 6))
    ids = np.array([f"{i:032x}" for i in range(180)])
    targets = Store(str(tmp_path / "targets"))
    wanted = {"id": [f"t{j}" for j in range(40)], "task": ["only"] * 40}
    vector = pa.list_(pa.float32())
    wanted_table = pa.table({**wanted, "embedding": pa.array(list(points), vector)})
    for folder in ("ingest", "embedding"):
        targets.write_table(f"{folder}/targets/part-00000.parquet", wanted_table)
    homes = {"id": "ingest", "task": "ingest", "embedding": "embedding"}
    cloud = RunColumns(targets, ("part-00000.parquet",), homes, 40, targets=True)

    def answers(order: Any, cuts: list[int], each: Any) -> Any:
        """The stage's report, and the sums of three potentials, of rows in shards."""
        run = Store(str(tmp_path / f"{len(cuts)}-{order[0]}-{each is in_turn}"))
        for number, rows in enumerate(np.split(order, cuts)):
            part = f"part-{number:05d}.parquet"
            run.write_table(f"ingest/{part}", pa.table({"id": ids[rows]}))
            embedded = pa.array(list(vectors[rows]), vector)
            run.write_table(f"embedding/{part}", pa.table({"id": ids[rows], "embedding": embedded}))
        decisions = pa.table(
            {
                "id": ids[order],
                "source": [f"s{k}" for k in source[order]],
                "keep": [True] * 180,
                "reason": ["kept"] * 180,
                "tokens": [1] * 180,
            }
        )
        run.write_table("selection/decisions.parquet", decisions)
        columns = RunColumns(run, tuple(run.names("ingest")), homes, 180, each=each)
        settings = MixtureSettings(
            method=method, rows_per_source=20, max_rows_per_source=40, tolerance=1e-6
        )
        stage = MixtureStage(settings, Supply(None, "rows", {}, frozenset()), seed=1)
        report = stage.decide(columns, cloud, {"selection": run.child("selection")}).report
        problem = Problem(
            columns, decisions, ["s0", "s1", "s2"], points, np.full(40, 1 / 40),
            Space("euclidean"), np.eye(3), np.zeros(3), np.ones(3), seed=1,
        )  # fmt: skip
        potentials = np.random.default_rng(0).normal(size=(3, 40))
        return report, sums_over_all_rows(problem, potentials)

    plain = np.arange(180)
    report, sums = answers(plain, [], in_turn)
    assert len(report["trace"]) > 1, "one pass over the rows is not all that was asked for"
    for order, cuts in (
        (plain, [50, 100, 150]),
        (rng.permutation(180), [1, 30, 31, 120]),
    ):
        spread, spread_sums = answers(order, cuts, backend.map)
        assert spread["weights"] == report["weights"]
        for key in ("lower_bound", "upper_estimate", "sample_lower_bound", "gap"):
            assert spread[key] == pytest.approx(report[key], rel=1e-12, abs=1e-12)
        np.testing.assert_array_equal(spread_sums.count, sums.count)
        np.testing.assert_allclose(spread_sums.total, sums.total, rtol=1e-12)
        np.testing.assert_allclose(spread_sums.squares, sums.squares, rtol=1e-12)


def test_error_in_a_task_over_shards_is_the_tasks_own(backend: Any) -> None:
    from stages.errors import ConfigError, StageError
    from stages.storage import Store

    with pytest.raises(ConfigError, match="cannot open nosuch://bucket"):
        list(backend.map(Store("nosuch://bucket").read_json, ["name"]))
    with pytest.raises(StageError, match=r"a task over shards failed.*(?s:.)*gone"):
        list(backend.map(Store("/nonexistent").read_json, ["gone"]))
    with pytest.raises(StageError, match=r"64 of a GPU.*set execution\.pass_gpus to 0"):
        list(backend.map(Store("/nonexistent").read_json, ["gone"], gpus=64))
