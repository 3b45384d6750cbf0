"""A table of what a run has done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from pipeline.config import Config
from pipeline.flow import folder_of
from pipeline.rundir import (
    MANIFEST,
    opened_run,
    parts,
    read_identity,
    read_manifest,
    row_stages_of,
    stages_of,
)
from pipeline.runner import Event, Run
from stages.storage import Store


def status_table(url: str) -> Table:
    """Stages of a run directory with rows, shards and time.

    Raises:
        ConfigError: no run is there.
    """
    run = opened_run(url)
    table = _table("rows", "shards", "time", "state")
    by_shard = row_stages_of(run)
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
            shards = str(len(parts(run, folder_of(stage)))) if stage in by_shard else ""
            table.add_row(stage, "", shards, "", "started, not complete")
    return table


def plan_summary(config: Config) -> dict[str, Any]:
    """A recipe's run directory and its stages, in order.

    Raises:
        ConfigError: stages don't fit each other, or a model isn't there.
    """
    job = Run(config, lambda _: None)
    return {"run": job.store.url, "stages": job.flow.names}


def run_summary(run: Store, ended: Sequence[Event]) -> dict[str, Any]:
    """What an execution did, as plain values.

    Args:
        run: the run directory.
        ended: the last event of each stage, in order.
    """
    last = ended[-1].stage
    manifest = read_manifest(run, last) or {}
    emitted = manifest["report"] if last == "emission" else manifest
    return {
        "run": run.url,
        "manifest": run.child(f"{folder_of(last)}/{MANIFEST}").url,
        "rows": int(emitted["rows"]),
        "digest": manifest["digest"],
        "done": [
            {
                "stage": event.stage,
                "state": "nothing to do" if event.kind == "kept" else "computed",
                "rows": event.rows,
            }
            for event in ended
        ],
    }


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage", no_wrap=True)
    for column in columns:
        table.add_column(
            column, justify="right" if column in ("rows", "shards", "time") else "left"
        )
    return table
