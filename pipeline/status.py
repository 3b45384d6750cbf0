"""Tables of what a run has done, and of what it would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from pipeline.config import Config
from pipeline.flow import ORDER, Flow, folder_of
from pipeline.rundir import MANIFEST, opened_run, parts, read_identity, read_manifest
from pipeline.runner import Event, Run
from stages.storage import Store


def status_table(url: str) -> Table:
    """Stages of a run directory with rows, shards and time.

    Raises:
        ConfigError: no run is there.
    """
    run = opened_run(url)
    table = _table("rows", "shards", "time", "state")
    for stage in ORDER:
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


def plan_table(config: Config) -> Table:
    """Stages of a recipe: which models they load, what is there already, what would be computed.

    Raises:
        ConfigError: a source, model or column isn't there.
    """
    job = Run(config, lambda _: None)
    content = job._inputs("ingest")
    files = sum(len(pairs) for pairs in content.values())
    changes = job.changes()
    table = _table("models", "reads", "state")
    for stage in job.flow.names:
        if stage in changes:
            state = "changed, needs --restart-from: " + "; ".join(changes[stage])
        elif (manifest := read_manifest(job.store, stage)) is not None:
            state = f"complete ({manifest.get('rows', '?')} rows)"
        elif read_identity(job.store, stage) is not None:
            done = len(parts(job.store, folder_of(stage)))
            total = len(parts(job.store, "ingest"))
            state = f"{done} of {total} shards there"
        else:
            state = "to do"
        reads = f"{files} files" if stage == "ingest" else _reads(job.flow, stage)
        table.add_row(stage, _models(job.flow, stage), reads, state)
    return table


def plan_summary(config: Config) -> dict[str, Any]:
    """A recipe's run directory and its stages, in order, after the checks of `plan_table`.

    Raises:
        ConfigError: as `plan_table`.
    """
    plan_table(config)
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
        "done": [
            {
                "stage": event.stage,
                "state": "nothing to do" if event.kind == "kept" else "computed",
                "rows": event.rows,
            }
            for event in ended
        ],
    }


def _models(flow: Flow, stage: str) -> str:
    owner = flow.rows.get(stage) or flow.fits.get(stage)
    if owner is None:
        return ""
    return ", ".join(
        f"{role} ({'endpoint' if spec.settings.endpoint else spec.settings.dtype})"
        for role, spec in sorted(owner.engines().items())
    )


def _reads(flow: Flow, stage: str) -> str:
    owner = flow.rows.get(stage) or flow.fits.get(stage) or flow.sets[stage]
    names = owner.columns().needs
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage", no_wrap=True)
    for column in columns:
        table.add_column(
            column, justify="right" if column in ("rows", "shards", "time") else "left"
        )
    return table
