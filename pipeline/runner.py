"""The run: every stage in order, doing only what is missing."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pipeline.backend import Backend, FitTask, LocalBackend
from pipeline.budget import Ledger
from pipeline.config import Config, changed_fields, recipe_yaml, run_store
from pipeline.flow import Flow, flow_of, folder_of
from pipeline.identity import fingerprint, generation_identity, stage_identities
from pipeline.rundir import (
    IDENTITY,
    MANIFEST,
    RunColumns,
    RunLock,
    finish_stage,
    ids_digest,
    parts,
    read_columns,
    read_identity,
    read_manifest,
    run_columns,
    start_stage,
    target_columns,
)
from pipeline.shard import BESIDE, ShardReport, ShardTask, is_committed
from stages.base import UNSEEN, Checked, RowStage, in_turn
from stages.engines.spent import Spent
from stages.errors import BudgetSpent, ConfigError, StageError
from stages.ingest import SCRATCH, content_of, ingest
from stages.requests import lowest_keys
from stages.rows import NOT_REQUESTED, OK
from stages.rules import rule_columns, rule_mask
from stages.sources.settings import Source
from stages.storage import Store, parquet_bytes

_TARGET = "target"
T = TypeVar("T")
R = TypeVar("R")

_ROWS_ON_WORKERS = 200_000
"""Rows from which the mixture's pass over shards is worth workers: below, it takes seconds."""


@dataclass(frozen=True)
class Event:
    """Something worth showing: a stage started, a shard was committed, a stage ended."""

    stage: str
    kind: str
    done: int = 0
    total: int = 0
    rows: int = 0
    seconds: float = 0.0
    note: str = ""


Listener = Callable[[Event], None]


@dataclass
class Run:
    """One run: a config, its flow and directory, and how it reports.

    Args:
        config: the recipe.
        listener: told of every event.
        restart_from: the stage to compute again from.
        reuse: another run, whose columns are taken by id.
        backend: that computes; None: the recipe's.
        elsewhere: it is only looked at here, and runs on a machine that may have libraries for
            models which this one lacks.
    """

    config: Config
    listener: Listener
    restart_from: str | None = None
    reuse: str | None = None
    backend: Backend | None = None
    elsewhere: bool = False

    def __post_init__(self) -> None:
        """Build the flow and the stages' identities.

        Raises:
            ConfigError: stages don't fit each other, or a model isn't there.
        """
        self.store = run_store(self.config)
        self._lock = RunLock(self.store)
        self.flow: Flow = flow_of(self.config)
        if self.restart_from and self.restart_from not in self.flow.names:
            raise ConfigError(
                f"--restart-from {self.restart_from}: the stages are {', '.join(self.flow.names)}"
            )
        for stage in (*self.flow.rows.values(), *self.flow.fits.values()):
            if isinstance(stage, Checked):
                stage.check()
        self._check_keys()
        self.identities = stage_identities(self.config, self.flow, elsewhere=self.elsewhere)

    def _check_keys(self) -> None:
        """See that the keys are there of all endpoints that are still to be asked.

        Raises:
            ConfigError: an environment variable isn't set.
        """
        for name, stage in self.flow.rows.items():
            if name == self.restart_from or read_manifest(self.store, name) is None:
                for spec in stage.engines().values():
                    if spec.settings.endpoint is not None:
                        spec.settings.endpoint.api_key()

    def execute(self, only: str | None = None) -> None:
        """Run all stages, or one whose predecessors are complete.

        Raises:
            TamisError: as the stages say.
        """
        names = self.flow.names
        if only is not None and only not in names:
            raise ConfigError(f"no stage {only!r}; the stages are {', '.join(names)}")
        changes = self.changes()
        refused = [text for stage, texts in changes.items() for text in texts]
        if refused:
            first = next(iter(changes))
            raise ConfigError(
                f"{self.store.url} was made with another recipe: {'; '.join(refused)}; run with "
                f"--restart-from {first} to compute again from there, or use another run directory"
            )
        with self._lock:
            self._ledger = Ledger(self.store, self.config.execution.budgets)
            asyncio.run(self._execute(names if only is None else [only]))

    def changes(self) -> dict[str, list[str]]:
        """By stage, differences from what the directory was made with that aren't allowed."""
        names = self.flow.names
        free = names.index(self.restart_from) if self.restart_from else len(names)
        found: dict[str, list[str]] = {}
        for stage in names[:free]:
            recorded = read_identity(self.store, stage)
            if recorded is not None and recorded != self.identities[stage]:
                differing = changed_fields(recorded, self.identities[stage], stage)
                own = [text for text in differing if ".upstream." not in text
                       and ".artifacts." not in text]  # fmt: skip
                found[stage] = own or differing
        return found

    def is_complete(self, last: str) -> bool:
        """Whether a stage and all before it are there, as they would be computed now.

        Raises:
            ConfigError: a source isn't there.
        """
        for name in self.flow.names[: self.flow.names.index(last) + 1]:
            manifest = read_manifest(self.store, name)
            if manifest is None or not self._is_current(name, manifest, self.inputs(name)):
                return False
        return True

    async def _execute(self, names: Sequence[str]) -> None:
        self._restart()
        self.store.write_bytes("recipe.yaml", recipe_yaml(self.config).encode())
        try:
            for name in names:
                await self._stage(name)
        finally:
            if self.backend is not None:
                await self.backend.close()

    def _restart(self) -> None:
        """Make the stages from `restart_from` on unfinished where they changed, or are named.

        Shards stay, to be reused where they still hold: after a larger `limit` only the new rows
        are computed. Naming a stage that didn't change and is complete asks for all of it again;
        one that was interrupted goes on, so that the same command can be said again.
        """
        if not self.restart_from:
            return
        names = self.flow.names
        for stage in names[names.index(self.restart_from) :]:
            folder = self.store.child(folder_of(stage))
            changed = read_identity(self.store, stage) != self.identities[stage]
            complete = folder.exists(MANIFEST)
            if changed or stage == self.restart_from:
                folder.remove(MANIFEST)
            again = stage == self.restart_from and complete and not changed
            if again and stage in self.flow.rows:
                for inner in ("", "targets/"):
                    for part in parts(self.store, f"{folder_of(stage)}/{inner}".rstrip("/")):
                        folder.remove(f"{inner}{part}")

    async def _stage(self, name: str) -> None:
        self._lock.check()
        started = time.monotonic()
        before = self.flow.names[: self.flow.names.index(name)]
        for earlier in before:
            if read_manifest(self.store, earlier) is None:
                raise ConfigError(
                    f"stage {name} needs {earlier}, which isn't complete; run `tamis run`, or "
                    f"`tamis stage {earlier}` first"
                )
        inputs = self.inputs(name)
        manifest = read_manifest(self.store, name)
        if manifest is not None and self._is_current(name, manifest, inputs):
            self.listener(Event(name, "kept", rows=int(manifest.get("rows", 0))))
            return
        self._check_spent(name)
        start_stage(self.store, name, self.identities[name])
        if name == "ingest":
            rows = self._ingest(inputs)
        elif name in self.flow.rows:
            rows = await self._row_stage(name, inputs)
        elif name in self.flow.fits:
            rows = await self._fit_stage(name, inputs)
        else:
            rows = await self._set_stage(name, inputs)
        self._ledger.write()
        self.listener(Event(name, "done", rows=rows, seconds=time.monotonic() - started))

    def is_done(self, name: str) -> bool:
        """Whether a run would find nothing to do in a stage, and in all that it reads."""
        manifest = read_manifest(self.store, name)
        if manifest is None:
            return False
        inputs = self.inputs(name)
        if not self._is_current(name, manifest, inputs):
            return False
        if name == "ingest":
            return True
        if name in self.flow.fits and not self._refits(name):
            # It stays as it is while rows come and go.
            made_of = self.flow.fits[name].artifacts()
            return not ("targets" in inputs and self._targets_changed()) and all(
                self.is_done(artifact) for artifact in made_of if artifact != UNSEEN
            )
        return all(self.is_done(earlier) for earlier in self._reads(name))

    def _targets_changed(self) -> bool:
        """Whether files of targets differ from those that ingest read."""
        ingested = (read_manifest(self.store, "ingest") or {"inputs": {}})["inputs"]
        before, now = (
            {name: pairs for name, pairs in found.items() if name.startswith(f"{_TARGET} ")}
            for found in (ingested, self.inputs("ingest"))
        )
        return before != now

    def reads_unseen(self, name: str) -> bool:
        """Whether a row stage reads ingest's folder of what training must not see."""
        return UNSEEN in self.flow.rows[name].artifacts()

    def _is_current(
        self, name: str, manifest: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> bool:
        if read_identity(self.store, name) != self.identities[name]:
            return False
        if name in self.flow.fits and not self._refits(name):
            kept = {"targets", *self.flow.fits[name].artifacts()} & set(inputs)
            return all(manifest["inputs"].get(key) == inputs.get(key) for key in kept)
        return bool(manifest["inputs"] == dict(inputs))

    def _refits(self, name: str) -> bool:
        return bool(getattr(self.flow.fits[name].settings, "refit", True))

    def inputs(self, name: str) -> dict[str, Any]:
        """Digests of what a stage reads; for ingest, the content of the sources."""
        if name == "ingest":
            read: dict[str, Sequence[Source]] = {
                "source": self.config.sources,
                _TARGET: self.config.targets,
                "evaluation set": self.config.contamination.sets,
            }
            return {
                f"{kind} {name}": [list(pair) for pair in pairs]
                for kind, sources in read.items()
                for name, pairs in content_of(sources).items()
            }
        found: dict[str, Any] = {}
        for earlier in self._reads(name):
            manifest = read_manifest(self.store, earlier)
            if manifest is None:
                continue
            if earlier == "ingest":
                split = manifest["report"]["digests"]
                found |= {"rows": split["rows"], "targets": split["targets"]}
                if name in self.flow.fits and not self.flow.fits[name].on_targets:
                    del found["targets"]
                if beside := self._beside_digests(name):
                    found["beside"] = beside
                if name in self.flow.rows and UNSEEN in self.flow.rows[name].artifacts():
                    found[UNSEEN] = split[UNSEEN]
            else:
                found[earlier] = manifest["digest"]
        return found

    def _reads(self, name: str) -> list[str]:
        """Earlier stages whose output a stage reads: for set stages all of them."""
        before = self.flow.names[: self.flow.names.index(name)]
        if name in self.flow.sets:
            return before
        read = {*self.flow.read_by(name), *self.identities[name]["artifacts"]}
        return [stage for stage in before if stage in read]

    def _ingest(self, inputs: Mapping[str, Any]) -> int:
        self.listener(Event("ingest", "start"))
        started = time.monotonic()
        folder = self.store.child("ingest")
        for old in ("rejects", "targets", UNSEEN, SCRATCH, *parts(self.store, "ingest")):
            folder.remove(old)
        mark = fingerprint(self.identities["ingest"])
        searches = self.config.ingest.near_duplicates is not None
        report = ingest(
            self.config.sources,
            self.config.targets,
            self.config.ingest,
            folder,
            contamination=self.config.contamination,
            blocked=self.config.blocked_sources,
            metadata={"stage": "ingest", "fingerprint": mark},
            each=self._made_backend().map if searches else in_turn,
        )
        found = [*parts(self.store, "ingest")]
        targets = [f"targets/{part}" for part in parts(self.store, "ingest/targets")]
        rejects = [f"rejects/{part}" for part in parts(self.store, "ingest/rejects")]
        unseen = [f"{UNSEEN}/{part}" for part in parts(self.store, f"ingest/{UNSEEN}")]
        ids = {part: folder.read_table(part, ["id"])["id"] for part in [*found, *targets]}
        rows = sum(len(ids[part]) for part in found)
        digests = {
            "rows": _joined(ids_digest(ids[part]) for part in found),
            "targets": _joined(folder.sha256(part) for part in targets),
            UNSEEN: _joined(folder.sha256(part) for part in unseen),
            "parts": {part: ids_digest(ids[part]) for part in [*found, *targets]},
        }
        finish_stage(
            self.store,
            "ingest",
            [*found, *targets, *unseen, *rejects],
            {part: len(ids[part]) for part in [*found, *targets]},
            fingerprint=mark,
            inputs=dict(inputs),
            rows=rows,
            seconds=round(time.monotonic() - started, 3),
            report={**report.as_dict(), "digests": digests},
        )
        self._check_budget(rows)
        return rows

    def _check_budget(self, rows: int) -> None:
        budget = self.config.emission.budget_rows
        repeats = max(source.repeats for source in self.config.sources)
        if budget and budget > rows * repeats:
            raise ConfigError(
                f"emission.budget_rows is {budget}, and ingest kept {rows} rows; lower the budget, "
                "add sources, or raise a source's repeats"
            )

    async def _row_stage(self, name: str, inputs: Mapping[str, Any]) -> int:
        started = time.monotonic()
        stage = self.flow.rows[name]
        mark = fingerprint(self.identities[name])
        homes = self.flow.home_of(name)
        found = parts(self.store, "ingest")
        target_parts = parts(self.store, "ingest/targets") if stage.on_targets else []
        limit_key = self._limit_key(stage, found, homes)
        upstream = self._upstream_digests(name)
        beside = inputs.get("beside", {})
        fitted = self.fitted_digest(name)
        tasks = [
            replace(
                self._task(stage, part, homes, mark, targets=targets, limit_key=limit_key),
                upstream="" if targets else upstream.get(part, "") + beside.get(part, ""),
                fitted=fitted,
            )
            for targets, names in ((False, found), (True, target_parts))
            for part in names
        ]
        digests = (read_manifest(self.store, "ingest") or {})["report"]["digests"]["parts"]
        pending = [
            task
            for task in tasks
            if not is_committed(
                task, digests[f"targets/{task.part}" if task.targets else task.part]
            )
        ]
        pending = self._with_reuse(stage, pending, mark)
        self.listener(Event(name, "start", done=len(tasks) - len(pending), total=len(tasks)))
        reports = await self._shards(stage, pending, len(tasks)) if pending else []
        folder = self.store.child(folder_of(name))
        self._drop_stale(name, {task.part for task in tasks if not task.targets})
        files = [f"targets/{t.part}" if t.targets else t.part for t in tasks]
        tables = {file: folder.read_table(file, [f"{name}_status"]) for file in files}
        statuses: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for file, table in tables.items():
            if not file.startswith("targets/"):
                for status in table[f"{name}_status"].to_pylist():
                    known = status in (OK, NOT_REQUESTED)
                    code = status if known else ": ".join(status.split(": ")[:2])
                    statuses[code] += 1
                    examples.setdefault(code, status)
        self._check_failures(name, statuses, examples)
        rows = sum(statuses.values())
        finish_stage(
            self.store,
            name,
            files,
            {file: table.num_rows for file, table in tables.items()},
            fingerprint=mark,
            inputs=dict(inputs),
            rows=rows,
            seconds=round(time.monotonic() - started, 3),
            counts=dict(sorted(statuses.items())),
            rows_computed=sum(report.computed for report in reports),
            rows_reused=sum(report.reused for report in reports),
            shards_computed=len(pending),
            models={role: spec.settings.model for role, spec in stage.engines().items()},
            **_endpoints(stage, reports),
            numerics={r: m["numerics"] for r, m in self.identities[name]["models"].items()},
        )
        return rows

    def _task(
        self,
        stage: RowStage,
        part: str,
        homes: Mapping[str, str],
        mark: str,
        *,
        targets: bool,
        limit_key: int | None,
    ) -> ShardTask:
        return ShardTask(
            run=self.store.url,
            stage=stage,
            part=part,
            homes=homes,
            fingerprint=mark,
            seed=self.config.seed,
            targets=targets,
            limit_key=None if targets else limit_key,
            artifacts={name: self._artifact(name).url for name in stage.artifacts()},
            cache=self.config.execution.cache,
            generation={
                role: generation_identity(spec, self.config)
                for role, spec in stage.engines().items()
                if spec.kind == "generator"
            },
        )

    def _upstream_digests(self, name: str) -> dict[str, str]:
        """By shard: the hashes of the shards of other row stages that this stage reads."""
        digests: dict[str, str] = {}
        for earlier in self.identities[name]["upstream"]:
            for entry in (read_manifest(self.store, earlier) or {})["files"]:
                digests[entry["path"]] = digests.get(entry["path"], "") + entry["sha256"]
        return digests

    def _beside_digests(self, name: str) -> dict[str, str]:
        """By shard: the hash of what a row stage reads of ingest that isn't part of a row's id."""
        if name not in self.flow.rows:
            return {}
        read = [column for column in BESIDE if column in self.flow.rows[name].columns().needs]
        if not read:
            return {}
        folder = self.store.child("ingest")
        return {
            part: fingerprint(folder.read_table(part, read).to_pydict())
            for part in parts(self.store, "ingest")
        }

    def _artifact(self, name: str) -> Store:
        return self.store.child(f"ingest/{UNSEEN}" if name == UNSEEN else folder_of(name))

    def fitted_digest(self, name: str) -> str:
        """The content of the artifacts that a row stage reads, "" without one."""
        digests = [
            str((read_manifest(self.store, fit) or {})["digest"])
            for fit in self.identities[name]["artifacts"]
        ]
        if UNSEEN in self.flow.rows[name].artifacts():
            ingested = read_manifest(self.store, "ingest") or {}
            digests.append(str(ingested["report"]["digests"][UNSEEN]))
        return ":".join(digests)

    def _limit_key(
        self, stage: RowStage, found: Sequence[str], homes: Mapping[str, str]
    ) -> int | None:
        """The hash up to which rows are asked for, so that `limit` rows are."""
        limit, where = stage.settings.limit, stage.settings.where
        if limit is None:
            return None
        names = ["id", *(sorted(rule_columns(where) - {"id"}) if where else [])]
        keys: list[int] = []
        for part in found:
            table = read_columns(self.store, part, names, homes)
            if where:
                table = table.filter(rule_mask(where, table))
            keys = lowest_keys(table["id"].to_pylist(), self.config.seed, limit, keys)
        return keys[-1] if keys else 0

    def _with_reuse(
        self, stage: RowStage, pending: Sequence[ShardTask], mark: str
    ) -> list[ShardTask]:
        """Set shards of other rows aside, and name all files that may hold these rows' columns."""
        folder = folder_of(stage.name)
        for inner in ("", "/targets"):
            names = {task.part for task in pending if task.targets == bool(inner)}
            for part in parts(self.store, folder + inner):
                digest = self.store.table_metadata(f"{folder}{inner}/{part}")["rows"]
                if part in names:
                    stale = f"{folder}{inner}/stale-{digest}.parquet"
                    self.store.rename(f"{folder}{inner}/{part}", stale)
        holding: dict[str, tuple[str, ...]] = {}
        for task in pending:
            if task.folder not in holding:
                holding[task.folder] = self._holding(task, mark)
        return [replace(task, reuse=holding[task.folder]) for task in pending]

    def _holding(self, task: ShardTask, mark: str) -> tuple[str, ...]:
        """Files of a task's folder, here and in the run to reuse, made as the task would be."""
        sources = [self.store.child(task.folder)]
        if self.reuse:
            sources.append(Store(self.reuse).child(task.folder))
        return tuple(
            f"{source.url}/{name}"
            for source in sources
            for name in source.names()
            if name.endswith(".parquet")
            and (footer := source.table_metadata(name)).get("fingerprint") == mark
            and footer.get("fitted", "") == task.fitted
        )

    def _drop_stale(self, name: str, current: set[str]) -> None:
        folder = self.store.child(folder_of(name))
        for inner in ("", "targets/"):
            for file in folder.names(inner.rstrip("/")):
                beyond = file.startswith("part-") and not inner and file not in current
                if file.startswith("stale-") or beyond:
                    folder.remove(inner + file)

    async def _shards(
        self, stage: RowStage, pending: Sequence[ShardTask], total: int
    ) -> list[ShardReport]:
        backend = await self._open(stage)
        gate = asyncio.Semaphore(self.config.execution.shards_in_flight)
        reports: list[ShardReport] = []

        async def one(task: ShardTask) -> None:
            async with gate:
                self._lock.check()
                if self._ledger.used_up(stage.engines()):
                    return
                report = await backend.shard(task)
            self._ledger.add(report.spent, stage.engines())
            reports.append(report)
            self.listener(
                Event(
                    stage.name,
                    "shard",
                    done=total - len(pending) + len(reports),
                    total=total,
                    rows=report.rows,
                    seconds=report.seconds,
                    note=f"{'targets ' if task.targets else ''}{report.part}",
                )
            )

        try:
            async with asyncio.TaskGroup() as group:
                for task in pending:
                    group.create_task(one(task))
        except ExceptionGroup as failures:
            # The first failure cancels the rest; theirs say nothing more.
            raise failures.exceptions[0] from None
        if len(reports) < len(pending):
            self._check_spent(stage.name)
        return reports

    def _check_spent(self, name: str) -> None:
        """Stop where a budget leaves nothing for a stage.

        Raises:
            BudgetSpent: naming it.
        """
        stage = self.flow.rows.get(name) or self.flow.fits.get(name)
        if used := self._ledger.used_up(stage.engines() if stage else {}):
            raise BudgetSpent(
                f"{name}: execution.budgets.{used}; what is finished is kept. Raise it and run "
                "again to go on",
                stage=name,
            )

    def _check_failures(
        self, name: str, statuses: Mapping[str, int], examples: Mapping[str, str]
    ) -> None:
        failed = {status: n for status, n in statuses.items() if status.startswith("failed")}
        asked = sum(n for status, n in statuses.items() if status != NOT_REQUESTED)
        allowed = self.config.max_failed_share
        if asked == 0:
            raise StageError(f"{name}: no row was asked for; loosen its where or limit", stage=name)
        if sum(failed.values()) > allowed * asked:
            counted = ", ".join(f"{n} × {status}" for status, n in sorted(failed.items()))
            example = examples[max(failed, key=lambda status: failed[status])]
            raise StageError(
                f"{name}: {sum(failed.values())} of {asked} rows failed ({counted}), more than "
                f"max_failed_share {allowed:g}; for example {example}; mend the rows, or raise it",
                stage=name,
            )

    async def _fit_stage(self, name: str, inputs: Mapping[str, Any]) -> int:
        started = time.monotonic()
        stage = self.flow.fits[name]
        self.listener(Event(name, "start", total=1))
        backend = await self._open(stage)
        columns, targets = self._columns(name), self._targets(name)
        stores = {read: self.store.child(folder_of(read)).url for read in stage.artifacts()}
        artifact = await backend.fit(FitTask(stage, columns, targets, stores))
        folder = self.store.child(folder_of(name))
        for file, data in artifact.files.items():
            folder.write_bytes(file, data)
        finish_stage(
            self.store,
            name,
            sorted(artifact.files),
            {},
            fingerprint=fingerprint(self.identities[name]),
            inputs=dict(inputs),
            rows=columns.n_rows,
            seconds=round(time.monotonic() - started, 3),
            report=artifact.report,
            models={role: spec.settings.model for role, spec in stage.engines().items()},
        )
        return columns.n_rows

    async def _set_stage(self, name: str, inputs: Mapping[str, Any]) -> int:
        started = time.monotonic()
        stage = self.flow.sets[name]
        self.listener(Event(name, "start", total=1))
        columns = self._columns(name)
        gpus = self.config.execution.pass_gpus
        if name == "mixture" and (gpus or columns.n_rows >= _ROWS_ON_WORKERS):
            backend = self._made_backend()
            # Without engines: a pool would keep the cores that tasks over shards are given.
            await backend.open({}, self.config.execution.engines)

            def over_shards(fn: Callable[[T], R], tasks: Iterable[T], /) -> Iterable[R]:
                return backend.map(fn, tasks, gpus=gpus)

            columns = replace(columns, each=over_shards)
        before = self.flow.names[: self.flow.names.index(name)]
        stores = {earlier: self.store.child(folder_of(earlier)) for earlier in before}
        outcome = stage.decide(columns, self._targets(name), stores)
        folder = self.store.child(folder_of(name))
        for old in folder.names():
            if old not in (IDENTITY,):
                folder.remove(old)
        mark = fingerprint(self.identities[name])
        for file, table in outcome.tables.items():
            folder.write_bytes(file, parquet_bytes(table, {"stage": name, "fingerprint": mark}))
        for file, data in outcome.files.items():
            folder.write_bytes(file, data)
        finish_stage(
            self.store,
            name,
            sorted([*outcome.tables, *outcome.files]),
            {file: table.num_rows for file, table in outcome.tables.items()},
            fingerprint=mark,
            inputs=dict(inputs),
            rows=columns.n_rows,
            seconds=round(time.monotonic() - started, 3),
            report=outcome.report,
        )
        return columns.n_rows

    def _columns(self, name: str) -> RunColumns:
        return run_columns(self.store, self.flow.home_of(name))

    def _targets(self, name: str) -> RunColumns:
        return target_columns(self.store, self.flow.home_of(name))

    def _made_backend(self) -> Backend:
        if self.backend is None:
            self.backend = make_backend(self.config)
        return self.backend

    async def _open(self, stage: Any) -> Backend:
        backend = self._made_backend()
        await backend.open(stage.engines(), self.config.execution.engines)
        return backend


def make_backend(config: Config) -> Backend:
    """The backend that the config names."""
    if config.execution.backend == "local":
        return LocalBackend()
    from pipeline.ray_backend import RayBackend

    return RayBackend(config.execution.place_timeout_s, config.execution.shards_in_flight)


def _endpoints(stage: RowStage, reports: Sequence[ShardReport]) -> dict[str, Any]:
    """What this execution spent on endpoints, by role, for the manifest."""
    spent: dict[str, dict[str, Any]] = {}
    for role, spec in stage.engines().items():
        if spec.settings.endpoint is not None:
            total = Spent()
            for report in reports:
                total = total.plus(report.spent.get(role, Spent()))
            cost = spec.settings.endpoint.cost(total.prompt_tokens, total.generated_tokens)
            spent[role] = {**total._asdict(), **({} if cost is None else {"cost": cost})}
    return {"endpoints": spent} if spent else {}


def _joined(digests: Any) -> str:
    return fingerprint({"parts": list(digests)})
