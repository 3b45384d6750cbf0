"""Tasks against the interface of a head: what is submitted, waited for, written and stopped."""

from __future__ import annotations

import json
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import ParamValidationError, TaskDeferred
from conftest import ROOT, TAMIS_BIN, small

sys.path.insert(0, str(ROOT / "airflow/plugins"))

from fake_head import Head, fake_head

from tamis_ray_operator import TamisOperator, job_id_of
from tamis_ray_trigger import RayJobTrigger


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    with fake_head() as head:
        connection = {"conn_type": "generic", "host": head.address, "password": "a secret token"}
        monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
        yield head


def instance(number: int = 1) -> Any:
    return SimpleNamespace(
        dag_id="some", run_id="some", task_id="x", map_index=-1, try_number=number
    )


def deferred(task: TamisOperator, number: int = 1) -> RayJobTrigger:
    with pytest.raises(TaskDeferred) as caught:
        task.execute({"ti": instance(number)})
    trigger = caught.value.trigger
    assert isinstance(trigger, RayJobTrigger)
    return trigger


def dag_of(name: str) -> Any:
    return runpy.run_path(str(ROOT / f"airflow/dags/{name}.py"))["dag"]


@pytest.mark.parametrize(("dag", "task"), [("curate", "ingest"), ("train_sae", "train_sae")])
def test_run_directory_is_the_one_that_the_param_names(
    head: Head, tmp_path: Path, dag: str, task: str
) -> None:
    recipe = small(tmp_path)
    names = ["my run #2", "a: b", "é 🙂 {x} 'y' \"z\"", "1e3", " "]
    wanted = [f"{tmp_path}/{name}" for name in names]
    for place in wanted:
        operator = dag_of(dag).get_task(task)
        operator.among = None
        operator.render_template_fields({"params": {"recipe": recipe, "run": place}})
        deferred(operator)
    commands = [shlex.split(body["entrypoint"]) for body in head.bodies]
    overrides = [words[words.index("--set") + 1] for words in commands]
    code = f"""
import json
from pipeline.config import read_config
found = [read_config({recipe!r}, [override]).execution.run for override in {overrides!r}]
print(json.dumps(found))
"""
    done = subprocess.run(
        [str(TAMIS_BIN / "python"), "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout or "null") == wanted, done.stderr


@pytest.mark.parametrize("dag", ["curate", "train_sae"])
def test_run_directory_that_is_no_absolute_path_or_url_is_refused(dag: str) -> None:
    param = dag_of(dag).params.get_param("run")
    for place in ("rel-run", "~/run", "./run", "C:run", "/", "s3:/run", "/a\u2028b", "{}"):
        with pytest.raises(ParamValidationError):
            param.resolve(place)
    for place in ("/runs/a", "s3://runs/a", "gs://runs/a b", "/läufe/1"):
        assert param.resolve(place) == place


def test_job_of_a_former_dag_run_of_the_same_id_is_not_taken_for_this_one(head: Head) -> None:
    task = TamisOperator(task_id="x", command=["stage", "x", "recipe.yaml"])
    job = job_id_of(instance(), task.arguments)
    for status in ("SUCCEEDED", "FAILED", "STOPPED"):
        head.put(job, status, age=3600)
        assert deferred(task).job_id == job
        assert head.jobs[job]["status"] == "RUNNING"
    assert [body["submission_id"] for body in head.bodies] == [job] * 3


def test_worker_that_was_lost_after_it_had_submitted_is_found_its_job(head: Head) -> None:
    task = TamisOperator(task_id="x", command=["stage", "x", "recipe.yaml"])
    job = job_id_of(instance(), task.arguments)
    for status in ("PENDING", "RUNNING"):
        head.put(job, status)
        assert deferred(task, 1).job_id == job
        assert deferred(task, 3).job_id == job
    assert head.bodies == []
    # Taken by the head, whose answer was lost; and by the time of the next try it has ended.
    head.put(job, "SUCCEEDED")
    assert deferred(task, 2).job_id == job_id_of(instance(2), task.arguments)


def test_ended_job_that_another_client_submits_anew_meanwhile_is_waited_for(head: Head) -> None:
    task = TamisOperator(task_id="x", command=["stage", "x", "recipe.yaml"])
    job = job_id_of(instance(), task.arguments)
    head.put(job, "FAILED")

    def again() -> None:
        head.put(job, "RUNNING")

    head.before[f"DELETE /api/jobs/{job}"] = again
    assert deferred(task).job_id == job
    assert head.jobs[job]["status"] == "RUNNING"
    assert head.bodies == []
