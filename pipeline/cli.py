"""The `tamis` command.

Exit status: 0 done, 1 the run failed, 2 the config is wrong, 75 another process works in the run
directory, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from pipeline.analyse.cli import analyse
from pipeline.init import cli as init_cli
from pipeline.jobs.cli import job, submit
from pipeline.pilot.cli import pilot
from pipeline.sigterm import end_at_sigterm
from pipeline.synthesize.cli import synthesize
from pipeline.train_sae.cli import train_sae
from stages.errors import ConfigError, RunBusy, TamisError

app = typer.Typer(
    help="Curate instruction-tuning data: score, rewrite, select, mix, emit.",
    epilog="Exit status: 0 done, 1 the run failed, 2 the recipe is wrong, 75 another process works "
    "in the directory, 130 interrupted, 143 ended by SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(analyse, name="analyse")
app.add_typer(synthesize, name="synthesize")
app.command(name="train-sae")(train_sae)
app.add_typer(job, name="job")
app.command()(submit)
app.command(name="pilot")(pilot)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=V", help="Override a field; repeatable.")
]
RestartFrom = Annotated[
    str | None,
    typer.Option(metavar="STAGE", help="Accept changes from this stage on, and compute them."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Say as a last line of JSON what was done.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A line for every shard.")]


@app.command()
def run(
    recipe: RecipePath,
    set_: Sets = None,
    restart_from: RestartFrom = None,
    reuse: Annotated[
        str | None, typer.Option(metavar="URI", help="Another run whose scores are taken by id.")
    ] = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run every stage that isn't complete, and leave a data set."""
    _guarded(lambda: _run(recipe, set_, restart_from, reuse, None, verbose, as_json), debug)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="The stage to run.")],
    recipe: RecipePath,
    set_: Sets = None,
    restart_from: RestartFrom = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run one stage; those before it must be complete."""
    _guarded(lambda: _run(recipe, set_, restart_from, None, name, verbose, as_json), debug)


@app.command()
def init(
    files: init_cli.Files,
    target: init_cli.Targets = None,
    output: init_cli.Output = "recipe.yaml",
    student: init_cli.Model = None,
    teacher: init_cli.Model = None,
    encoder: init_cli.Model = None,
    force: init_cli.Force = False,
    debug: Debug = False,
) -> None:
    """Write a commented recipe for files, with models that fit this machine."""
    _guarded(
        lambda: init_cli.write_recipe(
            files, target or [], output, student, teacher, encoder, force
        ),
        debug,
    )


@app.command()
def plan(
    recipe: RecipePath,
    set_: Sets = None,
    reuse: Annotated[
        str | None, typer.Option(metavar="URI", help="Another run whose scores would be taken.")
    ] = None,
    no_probe: Annotated[
        bool, typer.Option("--no-probe", help="Count no row, load no model, measure nothing.")
    ] = False,
    probe_rows: Annotated[
        int, typer.Option(min=2, help="Rows that every stage is measured on.")
    ] = 8,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a recipe and say what a run would do: stages, rows, models, tokens, time, reuse."""

    def show() -> None:
        from pipeline.config import read_config
        from pipeline.plan import plan_of
        from pipeline.status import plan_summary

        _quieten()
        config = read_config(recipe, set_ or ())
        found = plan_of(config, probe_rows=None if no_probe else probe_rows, reuse=reuse)
        console().print(found.table)
        for note in found.notes:
            console().print(note, highlight=False, markup=False, soft_wrap=True)
        if as_json:
            json_line(plan_summary(config))

    _guarded(show, debug)


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    debug: Debug = False,
) -> None:
    """Say how far a run is."""

    def show() -> None:
        from pipeline.status import status_table

        console().print(status_table(run))

    _guarded(show, debug)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    debug: Debug = False,
) -> None:
    """Count a run's rows again and hash its files again."""

    def show() -> None:
        from pipeline.verify import verified_files

        console().print(f"{verified_files(run)} files as their manifests say")

    _guarded(show, debug)


@app.command()
def why(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    row: Annotated[
        str,
        typer.Argument(
            metavar="ID|SOURCE:N",
            help="A row's id, or its first digits; or its source or file and its record's number.",
        ),
    ],
    full: Annotated[bool, typer.Option("--full", help="Show whole texts.")] = False,
    debug: Debug = False,
) -> None:
    """Tell one row's story: where it came from, its scores, and why it was kept or dropped."""

    def show() -> None:
        from pipeline.why import story

        console().print(story(run, row, full=full), highlight=False, markup=False, soft_wrap=True)

    _guarded(show, debug)


@app.command()
def explain(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    what: Annotated[
        str,
        typer.Argument(
            metavar="ID|LATENT", help="A row's id, or its first digits; or the number of a latent."
        ),
    ],
    rows: Annotated[
        int, typer.Option(min=1, help="Rows to read again in search of a latent.")
    ] = 100,
    debug: Debug = False,
) -> None:
    """Tell what made a row similar to the targets, or where a latent is active."""

    def show() -> None:
        from pipeline.explain import explanation

        _quieten()
        text = explanation(run, what, rows)
        console().print(text, highlight=False, markup=False, soft_wrap=True)

    _guarded(show, debug)


@app.command()
def prompts() -> None:
    """Print what reflection asks its teacher: a file to copy, change and name in a recipe."""
    from stages.reflection.prompts import default_prompts_file

    sys.stdout.write(default_prompts_file())


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors (docs/recipe.schema.json is a copy)."""
    from pipeline.schema import schema_text

    sys.stdout.write(schema_text())


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    debug: Debug = False,
) -> None:
    """Render a finished run's report again, from what is there."""

    def show() -> None:
        from pipeline.report import rendered_report

        console().print(rendered_report(run), soft_wrap=True, highlight=False, markup=False)

    _guarded(show, debug)


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    repo: Annotated[str, typer.Option(metavar="ORG/NAME", help="Repository on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private if it is made.")
    ] = False,
    with_report: Annotated[
        bool,
        typer.Option("--with-report", help="Upload report.html, which shows dropped rows too."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go, and do nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Upload a finished run's data set to a data set repository of the Hugging Face Hub."""

    def show() -> None:
        from pipeline.push import pushed

        done = pushed(run, repo, private=private, report=with_report, dry_run=dry_run)
        for name, size in done.files.items():
            console().print(f"{size:>14,}  {name}", soft_wrap=True, highlight=False, markup=False)
        _warn(done.warnings)
        what = f"{len(done.files)} files, {sum(done.files.values()):,} bytes"
        where = f"would go to {repo}" if done.url is None else f"went to {done.url}"
        console().print(f"{what}, {where}", soft_wrap=True, highlight=False, markup=False)

    _guarded(show, debug)


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    end_at_sigterm()
    app()


def console() -> Console:
    """Standard output."""
    return Console()


def json_line(value: object) -> None:
    """Write a value as one line of JSON, for programs that read the output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _run(
    recipe: str,
    overrides: list[str] | None,
    restart_from: str | None,
    reuse: str | None,
    only: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    from pipeline.config import read_config
    from pipeline.progress import Lines, LiveTable
    from pipeline.rundir import read_manifest
    from pipeline.runner import Event, Run
    from pipeline.status import run_summary

    _quieten()
    config = read_config(recipe, overrides or ())
    shown: list[Callable[[Event], None]] = []
    ended: list[Event] = []

    def tell(event: Event) -> None:
        shown[0](event)
        if event.kind in ("kept", "done"):
            ended.append(event)

    job = Run(config, tell, restart_from=restart_from, reuse=reuse)
    live = sys.stderr.isatty() and not verbose
    err = Console(stderr=True)
    display = (
        LiveTable(err, [only] if only else job.flow.names)
        if live
        else Lines(err, every_shard=verbose)
    )
    shown.append(display)
    with display:
        job.execute(only)
    if only in (None, "emission"):
        _warn((read_manifest(job.store, "emission") or {})["report"]["warnings"])
        folder = job.store.child("dataset")
        console().print(f"data set: {folder.url}", soft_wrap=True, highlight=False)
        console().print(f"report:   {folder.url}/report.html", soft_wrap=True, highlight=False)
    if as_json:
        json_line(run_summary(job.store, ended))


def _warn(warnings: list[str]) -> None:
    err = Console(stderr=True)
    for text in warnings:
        err.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _quieten() -> None:
    """Keep model libraries' bars and warnings out of the progress display."""
    from transformers.utils import logging as transformers_logging

    hush: tuple[Callable[[], None], ...] = (
        transformers_logging.set_verbosity_error,
        transformers_logging.disable_progress_bar,
    )
    for call in hush:
        call()


def _guarded(action: Callable[[], None], debug: bool) -> None:
    """Turn errors that a person must act on into one line and an exit status."""
    try:
        action()
    except TamisError as error:
        if debug:
            raise
        if isinstance(error, RunBusy):
            _exit(f"busy: {error}", os.EX_TEMPFAIL)
        wrong = isinstance(error, ConfigError)
        _exit(f"{'config' if wrong else 'failed'}: {error}", 2 if wrong else 1)
    except KeyboardInterrupt:
        # An engine call can't be cancelled and may take minutes; all that counts is committed.
        Console(stderr=True).print("interrupted; the same command goes on from here")
        sys.stdout.flush()
        os._exit(130)


def _exit(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)
