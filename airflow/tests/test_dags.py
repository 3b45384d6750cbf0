"""The DAGs on a real Airflow, with a real Ray cluster: run, retry, clear, kill, refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    STUDENT,
    TAMIS_BIN,
    Api,
    Servers,
    drivers,
    jobs_in,
    scored,
    small,
    wait_for,
    write_rows,
)

TINY = str(ROOT / "tests/recipes/tiny.yaml")


def test_dag_files_are_imported_soon_and_load_nothing_of_ours(airflow_env: dict[str, str]) -> None:
    # From a bare interpreter on: what Airflow itself takes counts too.
    code = """
import time
started = time.monotonic()
import sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag()
took = time.monotonic() - started
assert not bag.import_errors, bag.import_errors
assert set(bag.dags) == {"curate", "train_sae"}, bag.dags
loaded = {"pipeline", "stages", "ray", "torch", "transformers", "pyarrow"} & set(sys.modules)
assert not loaded, loaded
print("TOOK", took)
"""

    def took() -> float:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=airflow_env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split("TOOK")[1])

    # The machine has other things to do, beside a cluster and a service.
    assert min(took() for _ in range(4)) < 2


def test_stages_of_the_dag_are_those_of_the_flow() -> None:
    flow = subprocess.run(
        [str(TAMIS_BIN / "python"), "-c", "from pipeline.flow import ORDER; print(*ORDER)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    text = (ROOT / "airflow/dags/curate.py").read_text()
    listed = text.partition("STAGES = {")[2].partition("}")[0]
    assert [line.split('"')[1] for line in listed.strip().splitlines()] == flow


def test_whole_recipe_in_one_process(airflow_env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    conf = {"recipe": TINY, "run": str(run)}
    done = subprocess.run(
        ["airflow", "dags", "test", "curate", "--conf", json.dumps(conf)],
        env=airflow_env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    manifest = json.loads((run / "dataset/manifest.json").read_text())
    assert manifest["report"]["rows"] == 12
    names = {folder.name for folder in run.iterdir() if folder.is_dir()}
    assert names == {
        "ingest", "difficulty", "reflection", "dictionary", "prototypes", "features", "embedding",
        "selection", "mixture", "dataset",
    }  # fmt: skip


def test_second_run_waits_and_the_asset_is_updated_when_the_data_set_is(
    api: Api, tmp_path: Path
) -> None:
    recipe, run = small(tmp_path), tmp_path / "run"
    first = api.start("curate", recipe=recipe, run=str(run))
    second = api.start("curate", recipe=recipe, run=str(run))
    wait_for(lambda: api.tasks("curate", first)["ingest"]["state"] == "success")
    assert api.state("curate", second) == "queued"
    tasks = api.over("curate", first)
    assert api.state("curate", first) == "success", tasks
    assert {task for task, told in tasks.items() if told["state"] == "success"} == {
        "plan", "ingest", "selection", "emission"
    }  # fmt: skip
    assert {told["state"] for told in tasks.values()} == {"success", "skipped"}
    assert api.xcom("curate", first, "emission", "run") == str(run)
    manifest = api.xcom("curate", first, "emission", "manifest")
    assert manifest == f"{run}/dataset/manifest.json"
    assert api.xcom("curate", first, "emission", "rows") == 8
    (update,) = api.updates("tamis_curated", run)
    assert update["source_run_id"] == first
    assert update["extra"]["rows"] == 8
    assert update["extra"]["manifest"] == manifest
    assert "nothing to do" not in api.log("curate", first, "emission", 1)

    tasks = api.over("curate", second)
    assert api.state("curate", second) == "success", tasks
    assert "emission: nothing to do" in api.log("curate", second, "emission", 1)
    assert api.xcom("curate", second, "emission", "rows") == 8
    assert api.updates("tamis_curated", run) == [update]

    write_rows(tmp_path, 44)
    api.clear("curate", second, "ingest", downstream=True)
    tasks = api.over("curate", second)
    assert tasks["emission"]["state"] == "success"
    assert api.xcom("curate", second, "ingest", "rows") == 44
    update, newer = api.updates("tamis_curated", run)
    assert newer["source_run_id"] == second
    assert newer["extra"]["digest"] != update["extra"]["digest"]

    times = {file: file.stat().st_mtime_ns for file in run.rglob("*.parquet")}
    api.clear("curate", second, "emission")
    tasks = api.over("curate", second)
    assert tasks["emission"]["state"] == "success"
    assert "emission: nothing to do" in api.log("curate", second, "emission", 3)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.parquet")} == times
    assert api.updates("tamis_curated", run) == [update, newer]


def test_killed_job_is_tried_again_and_outlives_scheduler_and_triggerer(
    api: Api, servers: Servers, cluster: str, tmp_path: Path
) -> None:
    recipe, run = scored(tmp_path, 64), tmp_path / "run"
    part = run / "difficulty/part-00000.parquet"
    started = api.start("curate", recipe=recipe, run=str(run))
    wait_for(part.exists)
    committed = part.stat().st_mtime_ns
    (driver,) = drivers(run)
    os.kill(driver, signal.SIGKILL)
    wait_for(lambda: drivers(run) not in ([], [driver]))
    (driver,) = drivers(run)
    wait_for(lambda: api.tasks("curate", started)["difficulty"]["state"] == "deferred")
    for name in ("scheduler", "triggerer"):
        servers.kill(name)
    assert drivers(run) == [driver]
    for name in ("scheduler", "triggerer"):
        servers.start(name)
    tasks = api.over("curate", started)
    assert api.state("curate", started) == "success", tasks
    assert tasks["difficulty"]["try_number"] == 2
    assert "already there" in api.log("curate", started, "difficulty", 2)
    assert part.stat().st_mtime_ns == committed
    # Of the first try's job nothing went on, and no other was submitted twice.
    submitted = [job["metadata"]["airflow_task"] for job in jobs_in(cluster, run).values()]
    assert sorted(submitted) == [
        "difficulty", "difficulty", "emission", "ingest", "plan", "selection"
    ]  # fmt: skip


def test_task_that_is_cleared_or_failed_while_it_waits_stops_its_job(
    api: Api, cluster: str, tmp_path: Path
) -> None:
    recipe, run = scored(tmp_path, 800), tmp_path / "run"
    part = run / "difficulty/part-00000.parquet"
    started = api.start("curate", recipe=recipe, run=str(run))
    wait_for(part.exists)
    committed = part.stat().st_mtime_ns
    (driver,) = drivers(run)
    api.clear("curate", started, "difficulty")
    wait_for(lambda: drivers(run) not in ([], [driver]))
    wait_for(lambda: api.tasks("curate", started)["difficulty"]["state"] == "deferred")
    assert api.tasks("curate", started)["difficulty"]["try_number"] == 2
    assert part.stat().st_mtime_ns == committed
    # A deferred task keeps its slot.
    pool = api.ask("GET", "/pools/tamis_gpu")
    assert (pool["slots"], pool["deferred_slots"], pool["open_slots"]) == (1, 1, 0)
    (name,) = [name for name, job in jobs_in(cluster, run).items() if job["status"] == "RUNNING"]

    place = f"/dags/curate/dagRuns/{started}/taskInstances/difficulty"
    api.ask("PATCH", place, {"new_state": "failed"})
    wait_for(lambda: jobs_in(cluster, run)[name]["status"] == "STOPPED", 60)
    assert drivers(run) == []
    assert not (run / "difficulty/manifest.json").exists()
    assert not (run / "lock.json").exists()
    api.over("curate", started)


def test_autoencoder_is_trained_once_and_updates_its_asset(api: Api, tmp_path: Path) -> None:
    write_rows(tmp_path, 200)
    run = tmp_path / "sae"
    value = {
        "name": "small",
        "sources": [{"name": "apples", "path": "apples.jsonl"}],
        "models": {"student": {**STUDENT, "max_length": 64}},
        "autoencoder": {"layer": 2, "latents": 64, "k": 4},
        "training": {
            "tokens": 800, "batch": 128, "buffer": 256, "held_out_share": 0.1,
            "evaluation_tokens": 100,
        },
        "execution": {"run": "unused"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(value))
    started = api.start("train_sae", recipe=str(tmp_path / "recipe.yaml"), run=str(run))
    tasks = api.over("train_sae", started)
    assert api.state("train_sae", started) == "success", tasks
    assert (run / "sae_weights.safetensors").exists()
    (update,) = api.updates("tamis_autoencoder", run)
    assert update["extra"]["manifest"] == f"{run}/manifest.json"
    api.clear("train_sae", started, "train_sae")
    api.over("train_sae", started)
    assert "train-sae: nothing to do" in api.log("train_sae", started, "train_sae", 2)
    assert api.updates("tamis_autoencoder", run) == [update]


@pytest.mark.parametrize(
    ("recipe", "run", "failed", "said"),
    [
        ("/nowhere/recipe.yaml", None, "plan", "no recipe at /nowhere/recipe.yaml"),
        ("broken", None, "plan", "unknown key"),
        ("small", "/proc/tamis", "ingest", "/proc/tamis"),
    ],
)
def test_wrong_param_fails_at_once_and_says_why(
    api: Api, tmp_path: Path, recipe: str, run: str | None, failed: str, said: str
) -> None:
    if recipe in ("broken", "small"):
        recipe = small(tmp_path, **({"difficult": {}} if recipe == "broken" else {}))
    started = api.start("curate", recipe=recipe, run=run or str(tmp_path / "run"))
    tasks = api.over("curate", started)
    assert tasks[failed]["state"] == "failed"
    assert tasks[failed]["try_number"] == 1
    assert tasks["emission"]["state"] == "upstream_failed"
    assert said in api.log("curate", started, failed, 1)


def test_param_that_is_left_out_is_refused_before_anything_runs(api: Api) -> None:
    body = {"logical_date": None, "conf": {"recipe": TINY}}
    reply = api.http.post("/dags/curate/dagRuns", json=body)
    assert reply.status_code == 400
    assert "run" in reply.json()["detail"]
