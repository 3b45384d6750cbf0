"""The `tamis train-sae` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def train_sae(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=V", help="Override a field; repeatable."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Say as a last line of JSON what was done.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train a sparse autoencoder on a student's activations; go on where it was interrupted."""
    # Imported when called: pipeline.cli registers this module's command.
    from pipeline.cli import _guarded

    _guarded(lambda: _train(recipe, set_ or [], as_json), debug)


def _train(recipe: str, overrides: list[str], as_json: bool) -> None:
    from rich.console import Console

    from pipeline.cli import _quieten, console, json_line
    from pipeline.rundir import MANIFEST
    from pipeline.train_sae.config import read_train_sae
    from pipeline.train_sae.progress import TrainingLines, TrainingLive
    from pipeline.train_sae.runner import CURVE, train_sae

    config = read_train_sae(recipe, overrides)
    _quieten()
    err = Console(stderr=True)
    display = TrainingLive(err) if sys.stderr.isatty() else TrainingLines(err)
    with display:
        done = train_sae(config, lambda line: err.print(line, highlight=False), display)
    out, held_out = console(), done.report["held_out"]
    if done.was_complete:
        out.print("nothing to do: the training is complete", highlight=False)
    out.print(
        f"held out: FVU {held_out['fvu']:.4f}, L0 {held_out['l0']:.1f}, "
        f"dead {done.report['dead_share']:.1%}, CE recovered {held_out['ce_recovered']:.2%} "
        f"({held_out['ce']['clean']:.3f} clean, {held_out['ce']['spliced']:.3f} spliced, "
        f"{held_out['ce']['ablated']:.3f} ablated)",
        highlight=False,
        soft_wrap=True,
    )
    run = config.execution.run
    out.print(f"autoencoder: {run}\ncurve: {run}/{CURVE}", highlight=False, soft_wrap=True)
    if as_json:
        state = "nothing to do" if done.was_complete else "computed"
        json_line(
            {
                "run": run,
                "manifest": f"{run.rstrip('/')}/{MANIFEST}",
                "digest": done.digest,
                "held_out": {name: held_out[name] for name in ("fvu", "l0", "ce_recovered")},
                "done": [{"stage": "train-sae", "state": state}],
            }
        )
