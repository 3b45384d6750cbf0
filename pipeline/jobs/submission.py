"""Submitting a recipe so that it is safe to submit it again, and following the job.

The job's id is made of what the job does. A job of that id that is under way is the one that was
meant; one that ended without its result is submitted anew, and does only what is missing.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import yaml

from pipeline.config import Config, read_config, run_store
from pipeline.flow import flow_of, folder_of
from pipeline.jobs.client import Job, JobsClient, Unanswered
from pipeline.jobs.package import RECIPE, code_files, package
from pipeline.rundir import MANIFEST
from pipeline.runner import Run
from stages.errors import ConfigError, StageError, TamisError
from stages.rows import canonical_json

_POLL_S = 1.0
_SILENCE_S = 120.0
"""How long a followed cluster may leave all questions unanswered."""
_STOP_S = 15.0


@dataclass(frozen=True)
class Submission:
    """What is to run on a cluster.

    Attributes:
        config: with absolute paths, but for a cache that nobody named.
        stage: the only stage to run, None for all.
        restart_from: as of `tamis run`.
    """

    config: Config
    stage: str | None = None
    restart_from: str | None = None

    @property
    def id(self) -> str:
        """Submission id: equal for equal run directory, recipe, stage and `restart_from`."""
        what = {
            "run": self.config.execution.run,
            "recipe": self.config.recipe,
            "stage": self.stage,
            "restart_from": self.restart_from,
        }
        digest = hashlib.sha256(canonical_json(what).encode()).hexdigest()[:12]
        return f"tamis-{self.config.name}-{self.stage or 'run'}-{digest}"

    @property
    def entrypoint(self) -> str:
        """The driver's command line."""
        command = ["stage", self.stage, RECIPE] if self.stage else ["run", RECIPE]
        restart = ["--restart-from", self.restart_from] if self.restart_from else []
        return shlex.join(["python", "-m", "pipeline", *command, *restart])

    @property
    def manifest(self) -> str:
        """URL of the manifest that says that the job's work is done."""
        return run_store(self.config).child(f"{folder_of(self.last_stage)}/{MANIFEST}").url

    @property
    def last_stage(self) -> str:
        """The stage that the job ends with."""
        return self.stage or "emission"

    @property
    def recipe_yaml(self) -> str:
        """The whole recipe file, placement included, its paths as `config` has them."""
        value = self.config.model_dump(mode="json")
        return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))

    def is_done(self) -> bool:
        """Whether the result is there as a run would make it now.

        False also where that can't be told from here, because sources or models aren't: the job
        itself does nothing where nothing is to be done.
        """
        try:
            return Run(self.config, lambda _: None).is_complete(self.last_stage)
        except (TamisError, OSError):
            return False


class Submitted(NamedTuple):
    """A submission and what became of it.

    Attributes:
        id: submission id.
        state: `submitted`, `attached` to a job under way, or `done` before.
    """

    id: str
    state: Literal["submitted", "attached", "done"]


def submission_of(
    recipe: str, overrides: Sequence[str], stage: str | None, restart_from: str | None
) -> Submission:
    """A recipe as it can be read on another machine: resolved, with absolute paths.

    Raises:
        ConfigError: the recipe is wrong, or has no such stage.
    """
    where = recipe if "://" in recipe else os.path.abspath(recipe)
    config = read_config(where, overrides)
    # A cache that nobody named is in the home of whoever runs the job.
    named = {"run", "cache"} & config.execution.model_fields_set
    execution = config.execution.model_copy(
        update={key: _absolute(getattr(config.execution, key)) for key in named}
    )
    config = config.model_copy(update={"execution": execution})
    names = flow_of(config).names
    for option, name in (("--stage", stage), ("--restart-from", restart_from)):
        if name is not None and name not in names:
            raise ConfigError(f"{option} {name}: the stages are {', '.join(names)}")
    return Submission(config, stage, restart_from)


def submitted(client: JobsClient, submission: Submission, *, installed: bool = False) -> Submitted:
    """Submit what isn't under way or done.

    Args:
        client: of the cluster.
        submission: what is to run.
        installed: the cluster's own installation of tamis runs it; else this one is sent along.

    Raises:
        TamisError: the cluster doesn't answer, or refuses.
    """
    found = client.job(submission.id)
    if found is not None and not found.is_over:
        return Submitted(submission.id, "attached")
    if found is not None:
        done = found.status == "SUCCEEDED" and not submission.restart_from
        if done and submission.is_done():
            return Submitted(submission.id, "done")
        client.delete(submission.id)
    files = {} if installed else code_files()
    name, data = package({**files, RECIPE: submission.recipe_yaml.encode()})
    is_new = client.submit(
        submission.id,
        submission.entrypoint,
        {"working_dir": client.put_package(name, data)},
        {"run": submission.config.execution.run, "manifest": submission.manifest},
    )
    return Submitted(submission.id, "submitted" if is_new else "attached")


def followed(
    client: JobsClient, job_id: str, write: Callable[[str], Any], note: Callable[[str], Any]
) -> Job:
    """A job when it is over; what its driver writes is passed on as it comes.

    Args:
        client: of the cluster.
        job_id: submission id.
        write: is given the driver's output.
        note: is told, once, where that can't be read; the job's state decides all the same.

    Raises:
        ConfigError: the cluster knows no such job.
        StageError: the cluster has forgotten the job, or hasn't answered for long.
    """
    shown, known, noted = 0, False, False
    heard = time.monotonic()
    while True:
        try:
            job = client.job(job_id)
        except Unanswered as error:
            if time.monotonic() - heard > _SILENCE_S:
                raise StageError(
                    f"no answer about job {job_id} for {_SILENCE_S:.0f} s: {error}; the job may "
                    "still run: the same command finds it again"
                ) from error
            time.sleep(_POLL_S)
            continue
        if job is None and not known:
            raise unknown_job(job_id)
        if job is None:
            raise StageError(
                f"the cluster no longer knows job {job_id}: its head was started anew, or the job "
                "was deleted; the same command goes on from what is committed"
            )
        heard, known = time.monotonic(), True
        # Asked after the state, so that the output of a job that is over is whole.
        try:
            text = client.logs(job_id)
        except Unanswered as error:
            if not noted:
                note(f"job {job_id}: its output can't be read, and isn't shown: {error}")
            noted = True
        else:
            write(text[shown:])
            shown = len(text)
        if job.is_over:
            return job
        time.sleep(_POLL_S)


def stopped(client: JobsClient, job_id: str) -> Job:
    """A job after it was asked to stop.

    Raises:
        ConfigError: the cluster knows no such job.
        StageError: it hasn't ended in time.
    """
    end = time.monotonic() + _STOP_S
    client.stop(job_id)
    while time.monotonic() < end:
        job = client.job(job_id)
        if job is None:
            raise unknown_job(job_id)
        if job.is_over:
            return job
        time.sleep(_POLL_S / 4)
    raise StageError(f"job {job_id} was asked to stop and still runs after {_STOP_S:.0f} s")


def unknown_job(job_id: str) -> ConfigError:
    """What to say where the cluster knows no job of an id."""
    return ConfigError(
        f"the cluster knows no job {job_id}; `tamis submit` prints the id of what it submits"
    )


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
