"""The `tamis pilot` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def pilot(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=V", help="Override a field; repeatable."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train small models on a design of mixtures and forecast the best; go on where interrupted."""
    # Imported when called: pipeline.cli registers this module's command.
    from pipeline.cli import _guarded

    _guarded(lambda: _pilot(recipe, set_ or []), debug)


def _pilot(recipe: str, overrides: list[str]) -> None:
    from rich.console import Console

    from pipeline.cli import _quieten, console
    from pipeline.pilot.config import read_pilot
    from pipeline.pilot.progress import PilotLines
    from pipeline.pilot.runner import CURVE, REPORT, run_pilots

    config = read_pilot(recipe, overrides)
    _quieten()
    err = Console(stderr=True)
    report = run_pilots(config, lambda line: err.print(line, highlight=False), PilotLines(err))
    out = console()
    out.print(_table(report))
    told = report["recommended"]
    weights = ", ".join(f"{name} {weight:.3f}" for name, weight in told["weights"].items())
    low, high = told["interval"]
    out.print(
        f"recommended ({told['form']}): {weights}; forecast loss {told['loss']:.4f} "
        f"[{low:.4f}, {high:.4f}] at {report['projection']['budget']:,} rows",
        highlight=False,
        soft_wrap=True,
    )
    run = config.execution.run
    out.print(f"report: {run}/{REPORT}\ncurve: {run}/{CURVE}", highlight=False, soft_wrap=True)


def _table(report: dict[str, Any]) -> Table:
    """Mean absolute errors of every form."""
    from rich.table import Table

    small, large = report["projection"]["scales"]
    table = Table(title="mean absolute error, nats per token", title_justify="left")
    table.add_column("form")
    columns = [f"left out, {small:,}", f"left out, {large:,}"]
    columns += [f"held out, {small:,}", f"held out, {large:,}"]
    measured = "budget_error" in report["forms"][0]
    columns += [f"budget, {report['projection']['budget']:,}"] if measured else []
    for name in columns:
        table.add_column(name, justify="right")
    for row in report["forms"]:
        numbers = [*row["left_out_error"], *row["held_out_error"]]
        numbers += [row["budget_error"]] if measured else []
        mark = " *" if row["form"] == report["recommended"]["form"] else ""
        table.add_row(row["form"] + mark, *(f"{number:.4f}" for number in numbers))
    return table
