"""A tamis command as a Ray job: submitted once, waited for in the triggerer, gone on with."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shlex
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from tamis_ray_hook import Job, RayJobs, RayJobsHook, Refused
from tamis_ray_trigger import RayJobTrigger

T = TypeVar("T")

_CONFIG_WRONG = 2
"""Exit status of a driver that found its recipe wrong."""
_TAIL = 30
"""Lines of a failed driver's output that its error quotes."""


class TamisOperator(BaseOperator):
    """Runs a tamis command as a job of a Ray cluster.

    The job's id is a function of DAG, run, task and command, so that a task that is tried again
    finds its job again. The command is given `--json`: its last line says what was done, and is
    this task's XCom, together with its fields under their names.
    """

    template_fields: Sequence[str] = ("command", "runtime_env")
    ui_color = "#e8f0e4"

    def __init__(
        self,
        *,
        command: Sequence[str],
        conn_id: str = RayJobsHook.default_conn_name,
        runtime_env: Mapping[str, Any] | None = None,
        among: str | None = None,
        stages: Collection[str] | None = None,
        python: str = "python",
        job_timeout: timedelta | None = timedelta(days=2),
        poll_s: float = 5.0,
        **arguments: Any,
    ) -> None:
        """Say what to run.

        Args:
            command: arguments of `python -m pipeline`, without `--json`.
            conn_id: connection of the cluster.
            runtime_env: Ray's, where the cluster has no tamis installed; URIs only.
            among: a task whose XCom `stages` must hold this task's id; else the task is skipped.
            stages: all that the command's XCom `stages` may name, because the DAG has tasks for no
                others; None where it names none.
            python: the interpreter on the cluster's head.
            job_timeout: after which the job is stopped and the task fails; None for never.
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
        self.conn_id = conn_id
        self.runtime_env = dict(runtime_env or {})
        self.among = among
        self.stages = None if stages is None else list(stages)
        self.python = python
        self.job_timeout = job_timeout
        self.poll_s = poll_s
        self._job_id: str | None = None

    def execute(self, context: Context) -> None:
        """Submit the job unless it is under way, and wait for it deferred.

        Raises:
            AirflowSkipException: the recipe has no such stage.
            AirflowFailException: the cluster refuses.
        """
        ti = context["ti"]
        if self.among is not None:
            stages = ti.xcom_pull(task_ids=self.among, key="stages")
            if self.task_id not in stages:
                raise AirflowSkipException(f"the recipe has no section {self.task_id}")
        job_id = self._job_id = job_id_of(ti, self.command)
        self._answer(lambda jobs: self._submitted(jobs, job_id))
        deadline = time.time() + self.job_timeout.total_seconds() if self.job_timeout else None
        trigger = RayJobTrigger(self.conn_id, job_id, deadline, self.poll_s)
        self.defer(trigger=trigger, method_name="finish", kwargs={"job_id": job_id})

    def finish(self, context: Context, event: Mapping[str, str], job_id: str) -> dict[str, Any]:
        """What the command says that it did.

        Raises:
            AirflowFailException: the recipe is wrong or has a stage that the DAG lacks, or the
                cluster refuses: never retried.
            AirflowException: the job failed, was stopped, took too long, is lost, or found the run
                directory in use: a retry goes on from what is committed.
        """
        if event["why"] == "refused":
            raise AirflowFailException(event["error"])
        if event["why"] == "lost":
            raise AirflowException(event["error"])
        if event["why"] == "timeout":
            raise AirflowException(f"job {job_id} was stopped after {self.job_timeout}")
        job, output = self._answer(lambda jobs: _ended(jobs, job_id))
        if job.status != "SUCCEEDED":
            tail = "\n".join(output.strip().splitlines()[-_TAIL:])
            said = job.message.partition(", last available logs")[0]
            failure = AirflowFailException if job.exit_status == _CONFIG_WRONG else AirflowException
            raise failure(f"job {job_id} {job.status.lower()}: {said}\n{tail}")
        done = last_json(output)
        for stage in done.get("done", []):
            self.log.info("%s: %s", stage["stage"], stage["state"])
        if self.stages is not None:
            refuse_unknown(done["stages"], self.stages)
        for key, value in done.items():
            context["ti"].xcom_push(key=key, value=value)
        for outlet in self.outlets:
            context["outlet_events"][outlet].extra = {
                key: done[key] for key in ("run", "manifest", "rows") if key in done
            }
        return done

    def on_kill(self) -> None:
        """Stop the job of a task that is killed while it submits."""
        if (job_id := self._job_id) is not None:
            self._answer(lambda jobs: jobs.stop(job_id))

    async def _submitted(self, jobs: RayJobs, job_id: str) -> None:
        found = await jobs.job(job_id)
        if found is not None and not found.is_over:
            self.log.info("job %s is under way", job_id)
            return
        if found is not None:
            # Also one that succeeded: whether there is something to do is for the driver to say.
            self.log.info("job %s ended before (%s)", job_id, found.status)
            await jobs.delete(job_id)
        entrypoint = shlex.join([self.python, "-m", "pipeline", *self.command, "--json"])
        await jobs.submit(job_id, entrypoint, self.runtime_env, {"airflow_task": self.task_id})
        self.log.info("job %s: %s", job_id, entrypoint)

    def _answer(self, ask: Callable[[RayJobs], Coroutine[Any, Any, T]]) -> T:
        try:
            return asyncio.run(ask(RayJobsHook(self.conn_id).get_conn()))
        except Refused as error:
            raise AirflowFailException(str(error)) from error


def refuse_unknown(named: Sequence[str], stages: Collection[str]) -> None:
    """Refuse a recipe with a stage that the DAG would leave out.

    Raises:
        AirflowFailException: there is one.
    """
    if unknown := [stage for stage in named if stage not in stages]:
        raise AirflowFailException(
            f"the recipe has stages that this DAG has no task for: {', '.join(unknown)}; add them "
            "to STAGES in the DAG's file, in the order of `tamis plan`, or run it by `tamis submit`"
        )


async def _ended(jobs: RayJobs, job_id: str) -> tuple[Job, str]:
    job = await jobs.job(job_id)
    if job is None:
        raise AirflowException(f"the cluster no longer knows job {job_id}")
    return job, await jobs.logs(job_id)


def job_id_of(ti: Any, command: Sequence[str]) -> str:
    """Submission id of a task instance: the same for every try of it with the same command."""
    key = json.dumps([ti.dag_id, ti.run_id, ti.task_id, ti.map_index, *command])
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"{ti.dag_id}-{ti.task_id}-{digest}")


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
    raise AirflowException("the driver's output has no line of JSON: is tamis too old there?")
