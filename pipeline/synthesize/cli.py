"""The `tamis synthesize` commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

synthesize = typer.Typer(
    help="Make new problems with their solutions, and the data to train a model that writes them.",
    no_args_is_help=True,
    add_completion=False,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@synthesize.command()
def prepare(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    where: Annotated[
        str, typer.Option(metavar="RULE", help="Which rows are difficult, over their columns.")
    ],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="The model that will be trained, or its base.")
    ],
    out: Annotated[str, typer.Option(metavar="FILE.jsonl", help="The training file to write.")],
    debug: Debug = False,
) -> None:
    """Write a run's difficult problems as training data of a problem generator."""

    def write() -> None:
        from pipeline.analyse.tables import write_file
        from pipeline.cli import console
        from pipeline.synthesize.prepare import LEFT_OUT, prepared_training_file

        prepared = prepared_training_file(run, where, model)
        write_file(out, prepared.data)
        console().print(_table(prepared.left_out, LEFT_OUT))
        console().print(f"{prepared.examples} problems: {out}", soft_wrap=True, highlight=False)

    _guarded(write, debug)


@synthesize.command(name="run")
def run_(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="The synthesis recipe, a YAML file.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=V", help="Override a field; repeatable."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Sample problems, have them solved, filter, and write a new source."""

    def make() -> None:
        from pipeline.cli import _quieten, console
        from pipeline.synthesize.config import read_synthesis
        from pipeline.synthesize.runner import DATA, synthesize
        from stages.synthesis.sample import REASONS

        config = read_synthesis(recipe, set_ or ())
        _quieten()
        done = synthesize(config, lambda line: console().print(line, highlight=False))
        if done.was_complete:
            console().print("nothing to do: the source is complete", highlight=False)
        report: Mapping[str, Any] = done.report
        console().print(_table(report["rejected"], REASONS))
        console().print(
            f"{report['rows']} of {report['samples']} samples: {config.execution.run}/{DATA}",
            soft_wrap=True,
            highlight=False,
        )

    _guarded(make, debug)


def _table(counts: Mapping[str, int], meanings: Mapping[str, str]) -> Table:
    """How much was left out, and why; reasons that left out nothing aren't shown."""
    from rich.table import Table

    table = Table("left out", "", box=None, pad_edge=False, header_style="dim")
    table.add_column("count", justify="right")
    for reason, count in counts.items():
        if count:
            table.add_row(reason, meanings[reason], str(count))
    return table


def _guarded(action: Callable[[], None], debug: bool) -> None:
    # Imported when called: pipeline.cli mounts this module.
    from pipeline.cli import _guarded as guarded

    guarded(action, debug)
