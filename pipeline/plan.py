"""What a run would do: which stages, on how many rows, for how long, and what is there already."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from pipeline.config import Config
from pipeline.flow import Flow, folder_of
from pipeline.identity import fingerprint
from pipeline.probe import Probe, Range
from pipeline.progress import duration
from pipeline.rundir import parts, read_identity, read_manifest
from pipeline.runner import Run
from pipeline.shard import KEY
from pipeline.survey import Survey, survey_of, surveyed
from stages.base import UNSEEN
from stages.engines.settings import ModelSettings
from stages.rows import NOT_REQUESTED
from stages.storage import Store

Engine = tuple[str, str, ModelSettings]
"""What an engine does, its model's name in the recipe, and that model's settings."""

_NOTHING = Range(0, 0)


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        table: a line a stage.
        notes: what holds for all of them, a line each.
    """

    table: Table
    notes: list[str]


def plan_of(config: Config, *, probe_rows: int | None, reuse: str | None = None) -> Plan:
    """What a run of a recipe would do.

    Args:
        config: the recipe.
        probe_rows: rows to measure on; None: count no row and load no model.
        reuse: another run whose columns would be taken by id.

    Raises:
        ConfigError: a source, model or column isn't there.
        StageError: a source loses more records than it may.
    """
    job = Run(config, lambda _: None, reuse=reuse, elsewhere=True)
    content = job.inputs("ingest")
    files = sum(len(pairs) for pairs in content.values())
    ingested = read_manifest(job.store, "ingest")
    current = (
        ingested is not None
        and ingested["inputs"] == content
        and read_identity(job.store, "ingest") == job.identities["ingest"]
    )
    changes = job.changes()
    notes = []
    if ingested is not None and ingested["inputs"] != content:
        notes.append("The sources changed since the run: row stages would compute new rows alone.")
    if probe_rows is None:
        table = _table("models", "loads", "reads", "state")
        loads = _loads(job, changes)
        for stage in job.flow.names:
            reads = f"{files} files" if stage == "ingest" else _reads(job.flow, stage)
            table.add_row(
                stage,
                _models(job.flow, stage),
                _loaded(loads.get(stage), {}),
                reads,
                _state(job, stage, changes),
            )
        return Plan(table, notes)
    with tempfile.TemporaryDirectory(prefix="tamis-") as scratch:
        folder = Store(scratch)
        if current and ingested is not None:
            folder = job.store.child("ingest")
            survey = survey_of(folder, ingested["report"], sample=probe_rows + 1, seed=config.seed)
        else:
            survey = surveyed(
                config.sources,
                config.targets,
                config.ingest,
                config.contamination,
                folder,
                sample=probe_rows + 1,
                seed=config.seed,
            )
        open_stages = [name for name in job.flow.names if not _is_complete(job, name, changes)]
        asking = [name for name in open_stages if _asks(job.flow, name)]
        probe = Probe(config, survey, folder)
        if asking:
            probe.run()
    return _measured_plan(job, survey, probe, changes, notes)


def _measured_plan(
    job: Run,
    survey: Survey,
    probe: Probe,
    changes: Mapping[str, list[str]],
    notes: list[str],
) -> Plan:
    table = _table("rows", "models", "loads", "tokens in", "tokens out", "time", "state")
    total, unmeasured = _NOTHING, []
    read = written = 0.0
    loads = _loads(job, changes)
    for name in job.flow.names:
        found = probe.measured.get(name)
        loaded = _loaded(loads.get(name), probe.loads)
        state = _state(job, name, changes)
        asked = _asked(job, name, survey)
        if _is_complete(job, name, changes):
            table.add_row(name, "", _models(job.flow, name), "", "", "", "", state)
            continue
        there = min(_rows_there(job, name), asked) if name in job.flow.rows else 0
        if there:
            state += f"; up to {there:,} rows' columns are there"
        rows = f"{asked:,}" if asked else ""
        if name in job.flow.rows and job.flow.rows[name].settings.where:
            rows = f"≤ {rows}"
        if found is None or found.why:
            if found is not None:
                unmeasured.append(f"{name} ({found.why})")
            table.add_row(name, rows, _models(job.flow, name), loaded, "", "", "", state)
            continue
        left = 1 - there / asked if asked else 1
        work = found.work_s.times(left)
        load = sum(probe.loads[kind, settings] for kind, _, settings in loads[name])
        total = total + work + Range(load, load)
        read, written = read + found.read * left, written + found.written * left
        table.add_row(
            name,
            rows,
            _models(job.flow, name),
            loaded,
            _rounded(found.read * left),
            _rounded(found.written * left),
            _span(work),
            state,
        )
    notes = [*notes, _counted(survey)]
    if total.high:
        notes.append(
            f"Stages that ask models: {_span(total)} with loading, measured on "
            f"{survey.sample.num_rows} rows in this process, with one copy of each model. Models "
            f"are loaded {sum(map(len, loads.values()))} times, read {_rounded(read) or 0} tokens "
            f"and write {_rounded(written) or 0}."
        )
    notes += [f"Not measured: {one}." for one in unmeasured]
    return Plan(table, notes)


def _counted(survey: Survey) -> str:
    totals = survey.report["totals"]
    rejected = ", ".join(f"{n} {code}" for code, n in totals["rejected"].items())
    text = f"{survey.rows:,} rows and {len(survey.target_lengths):,} target rows"
    return f"{text} of {totals['in']:,} records" + (f"; rejected: {rejected}." if rejected else ".")


def _is_complete(job: Run, stage: str, changes: Mapping[str, list[str]]) -> bool:
    return stage not in changes and job.is_done(stage)


def _state(job: Run, stage: str, changes: Mapping[str, list[str]]) -> str:
    if stage in changes:
        return "changed, needs --restart-from: " + "; ".join(changes[stage])
    manifest = read_manifest(job.store, stage)
    if manifest is not None and job.is_done(stage):
        return f"complete ({manifest.get('rows', '?')} rows)"
    if manifest is not None:
        return "to do again: what it reads changed"
    if read_identity(job.store, stage) is None:
        return "to do"
    if stage in job.flow.rows:
        done = len(parts(job.store, folder_of(stage)))
        return f"{done} of {len(parts(job.store, 'ingest'))} shards there"
    return "begun; to do again, as a whole"


def _loads(job: Run, changes: Mapping[str, list[str]]) -> dict[str, list[Engine]]:
    """The engines that each stage loads which is to do: those that the one before it hasn't open.

    A backend closes what a stage doesn't ask; set stages leave open what is.
    """
    found: dict[str, list[Engine]] = {}
    there: list[Engine] = []
    for name in job.flow.names:
        owner = job.flow.rows.get(name) or job.flow.fits.get(name)
        if owner is None or _is_complete(job, name, changes):
            continue
        specs = [spec for spec in owner.engines().values() if spec.settings.endpoint is None]
        keys: list[Engine] = [(spec.kind, spec.model, spec.settings) for spec in specs]
        wanted = list(dict.fromkeys(keys))
        if wanted:
            found[name] = [engine for engine in wanted if engine not in there]
        there = wanted
    return found


def _loaded(
    engines: list[Engine] | None, seconds: Mapping[tuple[str, ModelSettings], float]
) -> str:
    """How many engines a stage loads, and how long that takes where it is known."""
    if engines is None:
        return ""
    if not engines:
        return "shared"
    known = [seconds[kind, model] for kind, _, model in engines if (kind, model) in seconds]
    return f"{len(engines)}, {duration(sum(known))}" if known else str(len(engines))


def _asks(flow: Flow, stage: str) -> bool:
    owner = flow.rows.get(stage) or flow.fits.get(stage)
    return owner is not None and bool(owner.engines())


def _asked(job: Run, stage: str, survey: Survey) -> int:
    """Rows that a stage reads, at most; targets are counted where it runs on them too."""
    if stage == "ingest":
        return int(survey.report["totals"]["in"])
    if stage == "prototypes":
        return len(survey.target_lengths)
    settings = (
        job.flow.rows.get(stage) or job.flow.fits.get(stage) or job.flow.sets[stage]
    ).settings
    limit = getattr(settings, "limit", None)
    if stage == "dictionary":
        limit = getattr(settings, "rows", None)
    rows = survey.rows if limit is None else min(limit, survey.rows)
    both = stage in job.flow.rows and job.flow.rows[stage].on_targets
    return rows + (len(survey.target_lengths) if both else 0)


def _rows_there(job: Run, stage: str) -> int:
    """Rows whose columns this run, or the one to reuse, holds as this recipe would compute them."""
    missing = [
        fit
        for fit in job.identities[stage]["artifacts"]
        if fit != UNSEEN and read_manifest(job.store, fit) is None
    ]
    if missing or (read_manifest(job.store, "ingest") is None and job.reads_unseen(stage)):
        return 0
    mark, fitted = fingerprint(job.identities[stage]), job.fitted_digest(stage)
    keys: set[str] = set()
    for run in (job.store, *([Store(job.reuse)] if job.reuse else [])):
        folder = run.child(folder_of(stage))
        for inner in (folder, folder.child("targets")):
            for name in inner.names():
                if not name.endswith(".parquet"):
                    continue
                footer = inner.table_metadata(name)
                if footer.get("fingerprint") == mark and footer.get("fitted", "") == fitted:
                    table = inner.read_table(name, [KEY, f"{stage}_status"])
                    statuses = table[f"{stage}_status"].cast(pa.string())
                    settled = table.filter(pc.not_equal(statuses, NOT_REQUESTED))
                    keys.update(settled[KEY].to_pylist())
    return len(keys)


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


def _span(span: Range) -> str:
    low, high = duration(span.low), duration(span.high)
    return low if low == high else f"{low} to {high}"


def _rounded(tokens: float) -> str:
    """Two digits of a count, which is no better known."""
    if tokens < 1:
        return ""
    return f"{float(f'{tokens:.2g}'):,.0f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage", no_wrap=True)
    for column in columns:
        numeric = column in ("rows", "loads", "tokens in", "tokens out", "time")
        table.add_column(column, justify="right" if numeric else "left")
    return table
