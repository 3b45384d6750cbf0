"""A task's tries on a real Ray cluster, by the steps that workers and triggerers take.

The scheduler is played by the tests: it alone decides who goes on, and these tests decide otherwise
than it would.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from airflow.sdk.module_loading import import_string
from conftest import ROOT, TAMIS_BIN, drivers, jobs_in, scored, supervisors, wait_for

import tamis_ray_trigger
from tamis_ray_hook import LINES, RayJobsHook
from tamis_ray_operator import TamisOperator, job_id_of
from tamis_ray_trigger import RayJobTrigger


@pytest.fixture(autouse=True)
def known(connections: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in connections.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe; in the run directory `run` beside it difficulty is to be done, and takes long."""
    folder = tmp_path_factory.mktemp("long")
    recipe = scored(folder, 800)
    place = f"execution.run={folder / 'run'}"
    done = subprocess.run(
        [str(TAMIS_BIN / "python"), "-m", "pipeline", "stage", "ingest", recipe, "--set", place],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return recipe


class Task(NamedTuple):
    """A task that computes a stage, in one of its tries."""

    recipe: str
    run: Path
    stage: str = "difficulty"
    dag: str = "some"
    conn_id: str = "ray_default"
    job_timeout: timedelta | None = None

    @property
    def command(self) -> list[str]:
        return ["stage", self.stage, self.recipe, "--set", f"execution.run={self.run}"]

    def operator(self) -> TamisOperator:
        return TamisOperator(
            task_id=self.stage, command=self.command, conn_id=self.conn_id,
            job_timeout=self.job_timeout, poll_s=0.5,
        )  # fmt: skip

    def context(self, number: int) -> Any:
        return {"ti": SimpleNamespace(
            dag_id=self.dag, run_id="some", task_id=self.stage, map_index=-1, try_number=number,
        )}  # fmt: skip

    def job_id(self, number: int) -> str:
        return job_id_of(self.context(number)["ti"], self.command)

    def deferred(self, number: int) -> RayJobTrigger:
        """Try a task: the trigger that it waits by, as it comes out of the database."""
        with pytest.raises(TaskDeferred) as caught:
            self.operator().execute(self.context(number))
        return from_database(caught.value.trigger)

    def finish(self, number: int, event: dict[str, str]) -> None:
        self.operator().finish(self.context(number), event)


@pytest.fixture
def task(ingested: str, cluster: str, request: pytest.FixtureRequest) -> Iterator[Task]:
    """A task whose job goes on for minutes; all of its jobs are stopped in the end."""
    run = Path(ingested).parent / "run"
    yield Task(ingested, run, dag=request.node.name)
    jobs = RayJobsHook().get_conn()
    for job_id in jobs_in(cluster, run):
        asyncio.run(jobs.stop(job_id))


def from_database(trigger: RayJobTrigger) -> RayJobTrigger:
    path, arguments = trigger.serialize()
    revived = import_string(path)(**json.loads(json.dumps(arguments)))
    assert isinstance(revived, RayJobTrigger)
    return revived


def event_of(trigger: RayJobTrigger) -> dict[str, str]:
    async def first() -> Any:
        return (await anext(trigger.run())).payload

    payload: dict[str, str] = asyncio.run(first())
    return payload


def status(cluster: str, task: Task, number: int) -> str:
    return str(jobs_in(cluster, task.run)[task.job_id(number)]["status"])


def test_triggerer_and_worker_that_are_started_anew_find_the_job(
    cluster: str, connections: dict[str, str], task: Task
) -> None:
    trigger = task.deferred(1)
    wait_for(lambda: drivers(task.run))
    (driver,) = drivers(task.run)

    async def ended_by_a_shutdown() -> None:
        waiting = asyncio.create_task(anext(trigger.run()))
        await asyncio.wait([waiting], timeout=1)
        waiting.cancel()
        await asyncio.wait([waiting])
        await trigger.cleanup()

    asyncio.run(ended_by_a_shutdown())
    assert status(cluster, task, 1) == "RUNNING"
    # A worker that was lost after it had submitted: another process, which knows nothing of it.
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "airflow/plugins")!r}, {str(ROOT / "airflow/tests")!r}]
from types import SimpleNamespace
from tamis_ray_operator import TamisOperator
task = TamisOperator(task_id="difficulty", command={task.command!r})
ti = SimpleNamespace(
    dag_id={task.dag!r}, run_id="some", task_id="difficulty", map_index=-1, try_number=2
)
try:
    task.execute({{"ti": ti}})
except BaseException as error:
    print("RAISED", type(error).__name__, error.trigger.job_id)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **connections},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"RAISED TaskDeferred {task.job_id(1)}\n" in done.stdout, done.stderr
    assert drivers(task.run) == [driver]
    assert status(cluster, task, 1) == "RUNNING"
    again = from_database(trigger)
    asyncio.run(again.on_kill())
    assert event_of(again) == {"job": task.job_id(1), "why": "ended"}
    assert status(cluster, task, 1) == "STOPPED"
    assert drivers(task.run) == []


def test_cleared_task_that_comes_back_before_its_job_has_ended_submits_it_anew(
    cluster: str, task: Task
) -> None:
    first = task.deferred(1)
    wait_for(lambda: drivers(task.run))
    (driver,) = drivers(task.run)
    second = task.deferred(2)
    assert drivers(task.run) == [driver]
    asyncio.run(first.on_kill())
    event = event_of(second)
    with pytest.raises(TaskDeferred) as caught:
        task.finish(2, event)
    wait_for(lambda: drivers(task.run) not in ([], [driver]))
    assert status(cluster, task, 1) == "STOPPED"
    assert status(cluster, task, 2) == "RUNNING"
    # Its own job, stopped by somebody else: that is for the retries.
    third = from_database(caught.value.trigger)
    asyncio.run(third.on_kill())
    with pytest.raises(AirflowException, match="stopped") as stopped:
        task.finish(2, event_of(third))
    assert not isinstance(stopped.value, AirflowFailException)


def test_job_that_takes_too_long_is_stopped_and_a_retry_submits_it_anew(
    cluster: str, task: Task
) -> None:
    task = task._replace(job_timeout=timedelta(seconds=3))
    trigger = task.deferred(1)
    wait_for(lambda: drivers(task.run))
    event = event_of(trigger)
    assert status(cluster, task, 1) == "STOPPED"
    assert drivers(task.run) == []
    with pytest.raises(AirflowException, match="was stopped after 0:00:03") as late:
        task.finish(1, event)
    assert not isinstance(late.value, AirflowFailException)
    task.deferred(2)
    assert status(cluster, task, 2) in ("PENDING", "RUNNING")


def test_directory_in_use_is_said_and_tried_again(task: Task) -> None:
    task.deferred(1)
    wait_for((task.run / "lock.json").exists)
    other = task._replace(dag="nightly")
    with pytest.raises(AirflowException, match="busy: ") as busy:
        other.finish(1, event_of(other.deferred(1)))
    assert not isinstance(busy.value, AirflowFailException)
    assert str(task.run) in str(busy.value)


def test_try_that_is_run_several_times_at_once_submits_one_job(cluster: str, task: Task) -> None:
    # Its id is that of a job which has ended, as of a DAG run that was deleted and made again.
    before = supervisors()
    first = task.deferred(1)
    wait_for(lambda: drivers(task.run))
    asyncio.run(first.on_kill())
    # For a second after a job has ended Ray fails every job of its id: the name is still taken.
    wait_for(lambda: supervisors() <= before)
    context = task.context(1)

    async def met() -> list[tuple[str, float]]:
        jobs = RayJobsHook().get_conn()
        tries = (task.operator()._submitted(jobs, context["ti"]) for _ in range(4))
        return await asyncio.gather(*tries)

    assert [job_id for job_id, _ in asyncio.run(met())] == [task.job_id(1)] * 4
    wait_for(lambda: drivers(task.run))
    assert len(drivers(task.run)) == 1
    assert status(cluster, task, 1) in ("PENDING", "RUNNING")


def test_end_of_the_output_is_shown_whatever_its_length_and_bytes(
    cluster: str, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        "import sys; print(*range(3000), sep=chr(10)); sys.stdout.flush(); "
        "sys.stdout.buffer.write(bytes([255, 10]))"
    )
    jobs = RayJobsHook().get_conn()
    asyncio.run(jobs.submit("bytes", shlex.join(["python", "-c", code]), {}, {}))
    trigger = RayJobTrigger("ray_default", "bytes", None, 0.5)
    trigger._log = logging.getLogger("a task")
    with caplog.at_level(logging.INFO, "a task"):
        assert event_of(trigger) == {"job": "bytes", "why": "ended"}
    lines = [told.getMessage() for told in caplog.records if told.name == "a task"]
    assert lines[-LINES:] == [*map(str, range(3001 - LINES, 3000)), "\ufffd"]
    assert any("left out" in line for line in lines)


def test_wait_ends_where_the_cluster_is_gone_refuses_or_has_forgotten(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tamis_ray_trigger, "_SILENCE_S", 1.0)

    def wait(conn_id: str) -> None:
        trigger = from_database(RayJobTrigger(conn_id, "nobody", None, 0.5))
        task.finish(1, event_of(trigger))

    with pytest.raises(AirflowException, match="no Ray dashboard answers") as down:
        wait("ray_dead")
    assert not isinstance(down.value, AirflowFailException)
    with pytest.raises(AirflowFailException, match="refuses the token"):
        wait("ray_wrong")
    with pytest.raises(AirflowException, match="no longer knows job nobody") as lost:
        wait("ray_default")
    assert not isinstance(lost.value, AirflowFailException)


def test_cluster_that_refuses_or_is_down_is_said_before_anything_is_submitted(task: Task) -> None:
    with pytest.raises(AirflowFailException, match="refuses the token"):
        task._replace(conn_id="ray_wrong").deferred(1)
    with pytest.raises(Exception, match="no Ray dashboard answers") as down:
        task._replace(conn_id="ray_dead").deferred(1)
    assert not isinstance(down.value, AirflowFailException)
