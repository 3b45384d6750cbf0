"""A tamis command as a Ray job: submitted once, waited for in the triggerer, gone on with."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shlex
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowSkipException,
    DownstreamTasksSkipped,
)

from tamis_ray_hook import Job, RayJobs, RayJobsHook, Refused, Unanswered
from tamis_ray_trigger import RayJobTrigger

if TYPE_CHECKING:
    from airflow.sdk.execution_time.context import InletEventsAccessor

T = TypeVar("T")

PLACE = r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$"
"""Pattern of an absolute path or a URL: where another is relative to, only the head knows."""
_CONFIG_WRONG = 2
"""Exit status of a driver that found its recipe wrong."""
_TAIL = 30
"""Lines of a failed driver's output that its error quotes."""
_EVENTS = 100
"""Updates of an asset among which a run directory's own last one is looked for."""
_RESULT = ("run", "manifest", "rows", "digest")
"""Fields of a command's XCom that say what it has made."""


class TamisOperator(BaseOperator):
    """Runs a tamis command as a job of a Ray cluster.

    The job's id is a function of DAG, run, task, command and try, so that a task that is tried
    again finds the job of an earlier try that is still under way. The command is given `--json`:
    its last line says what was done, and its fields are this task's XComs.

    The task's outlets are updated when the result isn't the one that they were last updated with.
    """

    template_fields: Sequence[str] = ("command", "settings", "runtime_env")
    ui_color = "#e8f0e4"

    def __init__(
        self,
        *,
        command: Sequence[str],
        settings: Mapping[str, Any] | None = None,
        conn_id: str = RayJobsHook.default_conn_name,
        runtime_env: Mapping[str, Any] | None = None,
        among: str | None = None,
        stages: Sequence[str] = (),
        python: str = "python",
        job_timeout: timedelta | None = timedelta(days=2),
        poll_s: float = 5.0,
        **arguments: Any,
    ) -> None:
        """Say what to run.

        Args:
            command: arguments of `python -m pipeline`, without `--json`.
            settings: fields of the recipe by dotted path, for `--set`; strings stay strings.
            conn_id: connection of the cluster.
            runtime_env: Ray's, where the cluster has no tamis installed; URIs only.
            among: a task whose XCom `stages` must hold this task's id; else the task is skipped.
            stages: ids of all tasks that the XCom `stages` chooses from, in order: it may name no
                others, and those that it doesn't name are skipped by the one before them.
            python: the interpreter on the cluster's head.
            job_timeout: how long a job may take before it is stopped and the task fails; None for
                ever. A retry that finds the job of an earlier try gives it no more time.
            poll_s: seconds between two looks at the job.
            arguments: of every operator.

        Raises:
            AirflowException: an `execution_timeout` is given.
        """
        super().__init__(**arguments)
        if self.execution_timeout is not None:
            raise AirflowException(
                f"{self.task_id}: execution_timeout would end the wait and leave the job; give "
                "job_timeout instead, which stops it"
            )
        self.command = list(command)
        self.settings = dict(settings or {})
        self.conn_id = conn_id
        self.runtime_env = dict(runtime_env or {})
        self.among = among
        self.stages = list(stages)
        self.python = python
        self.job_timeout = job_timeout
        self.poll_s = poll_s
        # Airflow shows a task the events of its inlets alone.
        self.inlets = [*self.inlets, *self.outlets]
        self._stop: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._killed = False

    def execute(self, context: Context) -> NoReturn:
        """Submit the job unless it is under way, and wait for it deferred.

        Raises:
            AirflowSkipException: the recipe has no such stage.
            AirflowFailException: the cluster refuses, or nobody has said which stages there are.
        """
        ti = context["ti"]
        if self.among is not None and self.task_id not in self._named(ti):
            raise AirflowSkipException(f"the recipe has no section {self.task_id}")
        self._wait(ti)

    def finish(self, context: Context, event: Mapping[str, str]) -> None:
        """Pass on what the command says that it did.

        A job that an earlier try submitted and that was stopped is submitted anew: a task that is
        cleared while it waits may come back before its job has ended.

        Raises:
            AirflowFailException: the recipe is wrong or has a stage that the DAG lacks, or the
                cluster refuses: never retried.
            AirflowException: the job failed, was stopped, took too long, is lost, or found the run
                directory in use: a retry goes on from what is committed.
            DownstreamTasksSkipped: the recipe lacks the stages that come next.
        """
        ti, job_id = context["ti"], event["job"]
        if event["why"] == "refused":
            raise AirflowFailException(event["error"])
        if event["why"] == "lost":
            raise AirflowException(event["error"])
        if event["why"] == "timeout":
            raise AirflowException(f"job {job_id} was stopped after {self.job_timeout}")
        job, output = self._answer(lambda jobs: _ended(jobs, job_id))
        if job.status == "STOPPED" and job_id != job_id_of(ti, self.arguments):
            self._wait(ti)
        if job.status != "SUCCEEDED":
            tail = "\n".join(output.strip().splitlines()[-_TAIL:])
            said = job.message.partition(", last available logs")[0]
            failure = AirflowFailException if job.exit_status == _CONFIG_WRONG else AirflowException
            raise failure(f"job {job_id} {job.status.lower()}: {said}\n{tail}")
        done = last_json(output)
        for stage in done.get("done", []):
            self.log.info("%s: %s", stage["stage"], stage["state"])
        for key, value in done.items():
            ti.xcom_push(key=key, value=value)
        result = {key: done[key] for key in _RESULT if key in done}
        self.outlets = [
            outlet
            for outlet in self.outlets
            if last_extra(context["inlet_events"][outlet], done["run"]) != result
        ]
        for outlet in self.outlets:
            context["outlet_events"][outlet].extra = result
        if self.stages:
            named = done["stages"] if self.among is None else self._named(ti)
            if lacking := lacking_after(self.task_id, named, self.stages):
                # All at once: a worker for each to find out would take seconds a task.
                raise DownstreamTasksSkipped(tasks=lacking)

    def on_kill(self) -> None:
        """Stop the job of a task that is killed while, or just after, it submits."""
        self._killed = True
        if (stop := self._stop) is not None:
            # The signal may have come while this thread's event loop runs.
            with ThreadPoolExecutor(1) as other:
                other.submit(asyncio.run, stop()).result()

    @property
    def arguments(self) -> list[str]:
        """The whole command, with the settings."""
        # The value is read as YAML, of which JSON is a part.
        given = [f"{key}={json.dumps(to, ensure_ascii=False)}" for key, to in self.settings.items()]
        return [*self.command, *(word for override in given for word in ("--set", override))]

    def _named(self, ti: Any) -> Collection[str]:
        stages: Collection[str] | None = ti.xcom_pull(task_ids=self.among, key="stages")
        if stages is None:
            raise AirflowFailException(
                f"the task {self.among} hasn't said which stages the recipe has: clear it"
            )
        return stages

    def _wait(self, ti: Any) -> NoReturn:
        job_id, since = self._answer(lambda jobs: self._submitted(jobs, ti))
        deadline = since + self.job_timeout.total_seconds() if self.job_timeout else None
        trigger = RayJobTrigger(self.conn_id, job_id, deadline, self.poll_s)
        self.defer(trigger=trigger, method_name="finish")

    async def _submitted(self, jobs: RayJobs, ti: Any) -> tuple[str, float]:
        """Id of the job to wait for, one that is under way or a new one, and when it was submitted.

        One of this try's id that has ended did so before the try began: it belongs to a DAG run of
        the same id that was deleted, or to another database. Its result may be out of date, and a
        command that has nothing left to do says so at once.
        """
        own, *earlier = [job_id_of(ti, self.arguments, n) for n in range(ti.try_number, 0, -1)]
        for job_id in (own, *earlier):
            found = await jobs.job(job_id)
            if found is not None and not found.is_over:
                self._stop = partial(jobs.stop, job_id)
                self.log.info("job %s was submitted before: %s", job_id, found.status)
                return job_id, found.submitted or time.time()
        self._stop = partial(jobs.stop, own)
        entrypoint = shlex.join([self.python, "-m", "pipeline", *self.arguments, "--json"])
        await jobs.submit(own, entrypoint, self.runtime_env, {"airflow_task": self.task_id})
        self.log.info("job %s: %s", own, entrypoint)
        if self._killed:
            await jobs.stop(own)
            raise AirflowException(f"job {own} was stopped: its task was killed")
        return own, time.time()

    def _answer(self, ask: Callable[[RayJobs], Coroutine[Any, Any, T]]) -> T:
        try:
            return asyncio.run(ask(RayJobsHook(self.conn_id).get_conn()))
        except Refused as error:
            raise AirflowFailException(str(error)) from error


def lacking_after(task_id: str, named: Collection[str], stages: Sequence[str]) -> list[str]:
    """The stages of a DAG after a task, up to the next one that a recipe has.

    Only these: to skip those beyond would let the tasks behind them start before that one ends.

    Args:
        task_id: of a stage, or of the task before them all.
        named: the stages that the recipe has.
        stages: those that the DAG has tasks for, in order.

    Raises:
        AirflowFailException: the recipe has a stage that the DAG would leave out.
    """
    if unknown := [stage for stage in named if stage not in stages]:
        raise AirflowFailException(
            f"the recipe has stages that this DAG has no task for: {', '.join(unknown)}; add them "
            "to STAGES in the DAG's file, in the order of `tamis plan`, or run it by `tamis submit`"
        )
    behind = stages[stages.index(task_id) + 1 :] if task_id in stages else stages
    return list(takewhile(lambda stage: stage not in named, behind))


async def _ended(jobs: RayJobs, job_id: str) -> tuple[Job, str]:
    """A job, and the end of its driver's output, or why it can't be read."""
    job = await jobs.job(job_id)
    if job is None:
        raise AirflowException(f"the cluster no longer knows job {job_id}")
    try:
        return job, await jobs.tail(job_id, job)
    except (Refused, Unanswered) as error:
        return job, f"the driver's output can't be read: {error}"


def job_id_of(ti: Any, command: Sequence[str], number: int | None = None) -> str:
    """Submission id of a task instance's try with a command; by default of the present try."""
    key = json.dumps([ti.dag_id, ti.run_id, ti.task_id, ti.map_index, *command])
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    name = f"{ti.dag_id}-{ti.task_id}-{digest}-{ti.try_number if number is None else number}"
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)


def last_extra(events: InletEventsAccessor, run: str) -> Mapping[str, Any] | None:
    """What an asset was last updated with for a run directory; None where it never was."""
    newest = events.ascending(False).limit(_EVENTS)
    return next((event.extra for event in newest if event.extra.get("run") == run), None)


def last_json(output: str) -> dict[str, Any]:
    """The object in the last line of a driver's output that holds one.

    Raises:
        AirflowException: none does.
    """
    for line in reversed(output.splitlines()):
        if line.startswith("{") and line.endswith("}"):
            try:
                value: dict[str, Any] = json.loads(line)
            except json.JSONDecodeError:
                # Any library may write a line in braces.
                continue
            return value
    last = (output.strip().splitlines() or ["nothing"])[-1][:300]
    raise AirflowException(
        "the job has ended well, but its last lines hold no JSON that says what it did (is tamis "
        f"too old there?); a retry finds nothing to do, and says it again. They end with: {last}"
    )
