"""A table of what a run has done."""

from __future__ import annotations

from rich.table import Table

from pipeline.flow import folder_of
from pipeline.rundir import opened_run, parts, read_identity, read_manifest, stages_of


def status_table(url: str) -> Table:
    """Stages of a run directory with rows, shards and time.

    Raises:
        ConfigError: no run is there.
    """
    run = opened_run(url)
    table = _table("rows", "shards", "time", "state")
    for stage in stages_of(run):
        manifest = read_manifest(run, stage)
        if manifest is not None:
            state = "complete"
            counts = manifest.get("counts") or {}
            notes = [f"{n} {status}" for status, n in counts.items() if status != "ok"]
            table.add_row(
                stage,
                str(manifest.get("rows", "")),
                str(len(manifest["files"])),
                f"{manifest.get('seconds', 0):.1f} s",
                "; ".join([state, *notes]),
            )
        elif read_identity(run, stage) is not None:
            shards = len(parts(run, folder_of(stage)))
            table.add_row(stage, "", str(shards), "", "started, not complete")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage", no_wrap=True)
    for column in columns:
        table.add_column(
            column, justify="right" if column in ("rows", "shards", "time") else "left"
        )
    return table
