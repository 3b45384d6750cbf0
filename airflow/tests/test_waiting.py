"""Tasks against the interface of a head: what is submitted, waited for, written and stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.jobs import triggerer_job_runner
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    ParamValidationError,
    TaskDeferred,
)
from conftest import ROOT, TAMIS_BIN, small

sys.path.insert(0, str(ROOT / "airflow/plugins"))

from fake_head import Head, fake_head

import tamis_ray_hook
import tamis_ray_trigger
from tamis_ray_hook import LINES, Unanswered
from tamis_ray_operator import TamisOperator, job_id_of
from tamis_ray_trigger import RayJobTrigger, unseen

TOKEN = "the token of a cluster"


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    with fake_head() as head:
        connection = {"conn_type": "generic", "host": head.address, "password": TOKEN}
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


def waited(caplog: pytest.LogCaptureFixture, job: str, deadline: float | None = None) -> Any:
    """The event of a trigger for a job, and the lines that it wrote."""
    caplog.clear()
    trigger = RayJobTrigger("ray_default", job, deadline, 0.01)
    trigger._log = logging.getLogger("a task")
    with caplog.at_level(logging.INFO, "a task"):
        event = asyncio.run(anext(trigger.run())).payload
    return event, [told.getMessage() for told in caplog.records if told.name == "a task"]


def told_by(task: TamisOperator, event: dict[str, str]) -> dict[str, Any]:
    """The XComs that a task pushes once it is called back."""
    pushed: dict[str, Any] = {}
    ti = instance()
    ti.xcom_push = lambda key, value: pushed.update({key: value})
    task.finish({"ti": ti}, event)
    return pushed


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


def test_bytes_that_are_no_utf8_hide_neither_the_log_nor_the_result(
    head: Head, caplog: pytest.LogCaptureFixture
) -> None:
    head.put("j", "SUCCEEDED", 0)
    head.logs["j"] = b'one\n\xff two\n{"rows": 3, "run": "/r"}\n'
    event, lines = waited(caplog, "j")
    assert event == {"job": "j", "why": "ended"}
    assert lines == ["one", "\ufffd two", '{"rows": 3, "run": "/r"}']
    assert told_by(TamisOperator(task_id="x", command=[]), event) == {"rows": 3, "run": "/r"}


def test_state_decides_where_the_log_cannot_be_read(
    head: Head, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tamis_ray_trigger, "_SILENCE_S", 0.0)
    head.failing["GET /api/v0/logs/file"] = 1000
    task = TamisOperator(task_id="x", command=[])
    for status, exit_status, error in (
        ("SUCCEEDED", 0, "a retry finds nothing to do.*out of order"),
        ("FAILED", 1, "j failed: said by Ray.*out of order"),
        ("FAILED", 2, "j failed: said by Ray.*out of order"),
    ):
        head.put("j", "RUNNING")
        ended = partial(head.put, "j", status, exit_status)
        head.at_each_look("j", *[lambda: None] * 5, ended)
        event, lines = waited(caplog, "j")
        assert event == {"job": "j", "why": "ended"}
        (line,) = lines
        assert "can't be shown" in line
        with pytest.raises(AirflowException, match=f"(?s){error}") as caught:
            told_by(task, event)
        assert isinstance(caught.value, AirflowFailException) == (exit_status == 2)


def test_log_is_shown_once_and_of_a_long_one_the_end(
    head: Head, caplog: pytest.LogCaptureFixture
) -> None:
    def write(*numbers: int, end: str = "") -> Callable[[], None]:
        def act() -> None:
            head.logs["j"] += "".join(f"line {i}\n" for i in range(*numbers)).encode()
            head.logs["j"] += end.encode()

        return act

    head.put("j", "RUNNING")
    head.logs["j"] = b"line 0\n"
    head.at_each_look(
        "j",
        lambda: None, write(1, 3, end="line "), write(0), write(0, end="3\n"),
        write(4, LINES + 500), write(0), write(LINES + 500, 20 * LINES),
        write(20 * LINES, 20 * LINES + 2, end="0 %\r50 %\r100 %"),
        partial(head.put, "j", "SUCCEEDED", 0),
    )  # fmt: skip
    _, lines = waited(caplog, "j")
    (first, second) = [i for i, line in enumerate(lines) if "left out" in line]
    assert lines[:first] == [f"line {i}" for i in range(4)]
    whole = [f"line {i}" for i in range(20 * LINES + 2)]
    assert lines[first + 1 : second] == whole[500 : LINES + 500]
    assert lines[second + 1 :] == [*whole[-LINES - 2 :], "100 %"]
    # A triggerer that was started anew shows the end alone.
    _, lines = waited(caplog, "j")
    assert lines[1:] == [*whole[-LINES + 1 :], "100 %"]


def test_of_a_growing_log_the_unseen_lines_are_those_that_were_added() -> None:
    drawn = random.Random(7)
    for size, window in product(range(30), (1, 5, 12, 40)):
        log = drawn.choices("ab", k=size)
        whole = [f"{i} {line}" for i, line in enumerate(log)]
        for before in range(size + 1):
            added = whole[before:][-window:]
            assert unseen(whole[:before][-window:], whole[-window:]) == added
            if size <= window:
                assert unseen(log[:before], log) == log[before:]


def test_log_of_a_hundred_megabytes_leaves_the_triggerer_to_others(head: Head) -> None:
    head.put("j", "RUNNING")
    head.logs["j"] = (b"x" * 99 + b"\n") * 1_000_000

    async def longest_pause() -> float:
        waiting = asyncio.create_task(anext(RayJobTrigger("ray_default", "j", None, 0.1).run()))
        pauses = [time.monotonic()]
        while len(head.asked) < 8:
            await asyncio.sleep(0.005)
            pauses.append(time.monotonic())
        waiting.cancel()
        return max(after - before for before, after in pairwise(pauses))

    assert asyncio.run(longest_pause()) < 1


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("killed", ["waiting", "submitting"])
def test_task_that_is_killed_while_the_head_fails_leaves_no_job(
    head: Head, killed: str, cut: bool
) -> None:
    task = TamisOperator(task_id="x", command=["stage", "x", "recipe.yaml"])
    trigger = deferred(task)
    head.cut = cut
    head.failing[f"POST /api/jobs/{trigger.job_id}/stop"] = 2
    head.failing[f"GET /api/jobs/{trigger.job_id}"] = 2
    if killed == "waiting":
        asyncio.run(trigger.on_kill())
    else:
        task.on_kill()
    assert head.jobs[trigger.job_id]["status"] == "STOPPED"


def test_job_that_cannot_be_stopped_is_named_within_airflows_time(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tamis_ray_hook._STOP_S + 5 <= triggerer_job_runner._ON_CANCEL_TIMEOUT
    monkeypatch.setattr(tamis_ray_hook, "_STOP_S", 0.2)
    head.put("j", "RUNNING")
    head.failing["POST /api/jobs/j/stop"] = 1000
    with pytest.raises(Unanswered, match="out of order; stop it by `ray job stop j --address http"):
        asyncio.run(RayJobTrigger("ray_default", "j").on_kill())


def test_job_that_had_finished_in_time_is_not_said_to_be_late(
    head: Head, caplog: pytest.LogCaptureFixture
) -> None:
    passed = time.time() - 5
    head.put("j", "SUCCEEDED", 0)
    head.logs["j"] = b"done\n"
    event, lines = waited(caplog, "j", passed)
    assert event == {"job": "j", "why": "ended"}
    assert lines == ["done"]
    # It ends by itself when it is to be stopped.
    head.put("j", "RUNNING")
    head.before["POST /api/jobs/j/stop"] = partial(head.put, "j", "SUCCEEDED", 0)
    assert waited(caplog, "j", passed)[0]["why"] == "ended"
    head.put("j", "RUNNING")
    event, lines = waited(caplog, "j", passed)
    assert event == {"job": "j", "why": "timeout"}
    assert lines == ["done"]


def test_retry_gives_the_job_that_it_finds_no_more_time(head: Head) -> None:
    task = TamisOperator(task_id="x", command=["stage"], job_timeout=timedelta(hours=2))
    job = job_id_of(instance(), task.arguments)
    head.put(job, "RUNNING", age=3600)
    ends = [deferred(task, number).deadline for number in (1, 2, 3)]
    assert ends == pytest.approx([time.time() + 3600] * 3, abs=60)
    head.put(job, "FAILED", 1, age=3600)
    assert deferred(task, 2).deadline == pytest.approx(time.time() + 7200, abs=60)


MODEL_STAGES = """
import json
from pipeline.config import read_config
from pipeline.flow import flow_of
flow = flow_of(read_config("tests/recipes/tiny.yaml", [
    "concepts={}", "valuation={}", "explanation={}", "pass_rate={max_new_tokens: 64}",
    "prefixes={max_new_tokens: 64}", "thinking={model: student}", "baselines={scores: [gradient]}",
    "reasoning={judge: teacher, max_new_tokens: 64}", "allocation={total: 100, gradient: one}",
    "rollouts={}",
]))
stages = {**flow.rows, **flow.fits}
print(json.dumps({name: bool(stage.engines()) for name, stage in stages.items()}))
"""


def test_stages_that_load_models_take_a_slot_of_the_pool() -> None:
    done = subprocess.run(
        [str(TAMIS_BIN / "python"), "-c", MODEL_STAGES],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    load = json.loads(done.stdout or "null")
    assert load, done.stderr
    pools = {task.task_id: task.pool for task in dag_of("curate").tasks}
    assert {name: pools[name] == "tamis_gpu" for name in load} == load
    assert dag_of("train_sae").get_task("train_sae").pool == "tamis_gpu"


def test_secrets_reach_the_head_alone(
    head: Head,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head.token = TOKEN
    monkeypatch.setenv("SOME_KEY", "secret of the worker")
    variables = {"HF_TOKEN": "secret of the author"}
    task = TamisOperator(task_id="x", command=["stage"], runtime_env={"env_vars": variables})
    with caplog.at_level(logging.DEBUG):
        trigger = deferred(task)
        trigger._log = logging.getLogger("a task")
        (body,) = head.bodies
        assert body.pop("runtime_env") == {"env_vars": variables}
        head.put(trigger.job_id, "SUCCEEDED", 0)
        head.logs[trigger.job_id] = b'{"rows": 3, "run": "/r"}\n'
        event = asyncio.run(anext(trigger.run())).payload
        pushed = told_by(task, event)
        head.token = "another"
        with pytest.raises(AirflowFailException, match="refuses the token") as refused:
            task.execute({"ti": instance(2)})
    log = caplog.text + "".join(capfd.readouterr())
    assert "stage --json" in log
    assert '"rows": 3' in log
    told = [body, trigger.serialize(), event, pushed, log, str(refused.value)]
    for secret in (TOKEN, "secret of the worker", "secret of the author"):
        assert secret not in repr(told)
