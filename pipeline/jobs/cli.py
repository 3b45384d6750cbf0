"""The `tamis submit` and `tamis job` commands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.jobs.client import Job, JobsClient

job = typer.Typer(help="Jobs that `tamis submit` submitted to a Ray cluster.")

Address = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        help="Dashboard of the Ray cluster, such as http://head:8265.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The id that `tamis submit` printed.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def submit(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    address: Address,
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Run this stage alone.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=V", help="Override a field; repeatable."),
    ] = None,
    restart_from: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="Accept changes from this stage on, and compute them."),
    ] = None,
    installed: Annotated[
        bool,
        typer.Option("--installed", help="Run the cluster's tamis instead of sending this one."),
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow/--detach", help="Show the job's output until it ends.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Run a recipe as a job of a Ray cluster; said again, it finds the job again."""
    from pipeline.cli import _guarded

    def act() -> None:
        from pipeline.jobs.client import JobsClient
        from pipeline.jobs.submission import submission_of, submitted

        submission = submission_of(recipe, set_ or (), stage, restart_from)
        with JobsClient(address) as client:
            done = submitted(client, submission, installed=installed)
            said = {
                "submitted": f"job {done.id}: submitted",
                "attached": f"job {done.id}: already under way",
                "done": f"job {done.id}: nothing to do, {submission.manifest} is there",
            }
            _print(said[done.state])
            if follow and done.state != "done":
                _follow(client, done.id)

    _guarded(act, debug)


@job.command()
def status(job_id: JobId, address: Address, debug: Debug = False) -> None:
    """Say where a job stands."""
    from pipeline.cli import _guarded

    def act() -> None:
        from pipeline.jobs.client import JobsClient
        from pipeline.jobs.submission import unknown_job

        with JobsClient(address) as client:
            found = client.job(job_id)
        if found is None:
            raise unknown_job(job_id)
        _print(_told(found))

    _guarded(act, debug)


@job.command()
def logs(
    job_id: JobId,
    address: Address,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends, with its exit status.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print what a job's driver has written."""
    from pipeline.cli import _guarded

    def act() -> None:
        from pipeline.jobs.client import JobsClient
        from pipeline.jobs.submission import unknown_job

        with JobsClient(address) as client:
            if follow:
                _follow(client, job_id)
            elif client.job(job_id) is None:
                raise unknown_job(job_id)
            else:
                sys.stdout.write(client.logs(job_id))

    _guarded(act, debug)


@job.command()
def stop(job_id: JobId, address: Address, debug: Debug = False) -> None:
    """Stop a job; what is finished stays committed."""
    from pipeline.cli import _guarded

    def act() -> None:
        from pipeline.jobs.client import JobsClient
        from pipeline.jobs.submission import stopped

        with JobsClient(address) as client:
            _print(_told(stopped(client, job_id)))

    _guarded(act, debug)


def _follow(client: JobsClient, job_id: str) -> None:
    """Show a job until it ends, and end with its exit status."""
    from pipeline.jobs.submission import followed

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        done = followed(client, job_id, write, _line)
    except KeyboardInterrupt:
        _line(f"job {job_id}: goes on; `tamis job logs -f` shows it, `tamis job stop` ends it")
        raise typer.Exit(130) from None
    if done.status != "SUCCEEDED":
        _line(_told(done))
        raise typer.Exit(done.exit_status if done.exit_status and done.exit_status > 0 else 1)


def _told(found: Job) -> str:
    status = "" if found.exit_status is None else f", exit status {found.exit_status}"
    # Where its driver failed, Ray's message goes on with the driver's output.
    said = found.message.partition(", last available logs")[0].partition("\n")[0]
    return f"job {found.id}: {found.status.lower()}{status}; {said}"


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _line(text: str) -> None:
    sys.stderr.write(text + "\n")
