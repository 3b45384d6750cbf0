"""The `tamis analyse` commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import RenderableType

analyse = typer.Typer(
    help="Tables about finished runs; they change no run.",
    no_args_is_help=True,
    add_completion=False,
)

RunUrls = Annotated[list[str], typer.Argument(metavar="RUN", help="Run directories.")]
JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON too.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@analyse.command()
def groups(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Run directories, one a model, weak to strong."),
    ],
    quantile: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of rows whose distance sets a group's radius."),
    ] = 0.1,
    min_size: Annotated[int, typer.Option(min=1, help="Groups of fewer rows are dissolved.")] = 10,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write each row's group as Parquet.")
    ] = None,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Group rows by their pass rates over several models, each in its own run."""

    def show() -> None:
        from pipeline.analyse.groups import (
            analysed_groups,
            group_rows,
            groups_report,
            groups_summary,
            groups_table,
        )

        found = analysed_groups(runs, quantile, min_size)
        _print(groups_table(found), groups_summary(found))
        _write(out, group_rows(found))
        _write_json(json, groups_report(found))

    _guarded(show, debug)


@analyse.command()
def cost(
    runs: RunUrls,
    prices: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prices of tokens by model, a YAML file.")
    ] = None,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Say what one correct solution costs, by model and source, from pass-rate rollouts."""

    def show() -> None:
        from pipeline.analyse.cost import analysed_costs, cost_report, cost_table, read_prices

        listed = read_prices(prices) if prices else None
        currency = listed.currency if listed else None
        found = analysed_costs(runs, listed)
        _print(cost_table(found, currency))
        _write_json(json, cost_report(found, currency))

    _guarded(show, debug)


@analyse.command()
def reasoning(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write z-scores among a prompt's responses as Parquet."),
    ] = None,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Show how chains of thought are built: length, review, failed steps."""

    def show() -> None:
        from pipeline.analyse.reasoning import (
            analysed_reasoning,
            reasoning_report,
            reasoning_summary,
            reasoning_table,
        )

        found = analysed_reasoning(run)
        _print(reasoning_table(found), reasoning_summary(found))
        _write(out, found.z_scores)
        _write_json(json, reasoning_report(found))

    _guarded(show, debug)


def _print(table: RenderableType, summary: str = "") -> None:
    from pipeline.cli import console

    console().print(table)
    if summary:
        console().print(summary, highlight=False, soft_wrap=True)


def _write(url: str | None, table: pa.Table) -> None:
    from pipeline.analyse.tables import write_file
    from stages.storage import parquet_bytes

    if url:
        write_file(url, parquet_bytes(table))


def _write_json(url: str | None, report: Mapping[str, Any]) -> None:
    from pipeline.analyse.tables import json_bytes, write_file

    if url:
        write_file(url, json_bytes(report))


def _guarded(action: Callable[[], None], debug: bool) -> None:
    # Imported when called: pipeline.cli mounts this module.
    from pipeline.cli import _guarded as guarded

    guarded(action, debug)
