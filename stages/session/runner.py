"""Any stage on rows in memory: its models, its folders, its progress, and what it leaves behind."""

from __future__ import annotations

import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from stages.base import (
    Checked,
    FitStage,
    RowSettings,
    RowStage,
    SetStage,
    check_endpoints,
    checked_columns,
)
from stages.engines.model_files import model_identity
from stages.errors import ConfigError
from stages.requests import lowest_keys, not_requested_columns, requested_rows
from stages.rows import ROWS, TARGETS
from stages.rules import rule_columns, rule_mask
from stages.session.background import BackgroundLoop
from stages.session.kinds import Rows, arrow_table, same_rows
from stages.session.memory import MemoryColumns, view_of, with_columns_of
from stages.session.models import MakeEngine, OpenModels
from stages.session.results import Fitted
from stages.storage import Store

_ADDED_BY = {
    **dict.fromkeys(ROWS.names, "ingest"),
    "task": "ingest(..., targets)",
    "pass_rate": "pass_rate",
    "rollout_verdicts": "pass_rate",
    "embedding": "embedding",
    "similarity": "features",
    "nearest_task": "features",
    "active_features": "features(..., active_above=0)",
}
"""What to call for a column that rows lack."""


class Runner:
    """Runs stages one after another in this process, on rows in memory."""

    def __init__(self, seed: int, rows_per_step: int, progress: bool, make: MakeEngine) -> None:
        """Open nothing yet.

        Raises:
            ConfigError: a step has no rows.
        """
        if rows_per_step < 1:
            raise ConfigError(f"rows_per_step must be at least 1, not {rows_per_step}")
        self.seed = seed
        self._step, self._progress = rows_per_step, progress
        folder = tempfile.TemporaryDirectory(prefix="tamis-")
        self._store = Store(folder.name)
        self._loop = BackgroundLoop()
        self._open = OpenModels(self._store.child("generations"), make)
        self._types: dict[str, pa.DataType] = dict(zip(TARGETS.names, TARGETS.types, strict=True))
        self._records: dict[str, Store] = {}
        self._made = 0
        self._end = weakref.finalize(self, _end, self._open, self._loop, folder)

    def __enter__(self) -> Self:
        """Nothing to open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Free the models and remove temporary files; the session can't be used again."""
        self._end()

    def load_models(self, stage: RowStage | FitStage) -> None:
        """Load the models of a stage, where they aren't yet."""
        self.check(stage)
        self._open.loaded(stage.engines())

    def free_models(self) -> None:
        """Free the models and keep the rest; what asks next loads its own again."""
        self._open.close()

    def with_columns(
        self, stage: RowStage, rows: Rows, stores: Mapping[str, Store] | None = None
    ) -> Rows:
        """The rows with any row stage's columns; those that it had added before are replaced.

        Args:
            stage: such as one that is no method here.
            rows: with the columns that it reads.
            stores: folders of the artifacts that it reads, by name.
        """
        started = time.monotonic()
        adds = stage.columns().adds
        table = self._table(rows)
        settings = stage.settings
        self.check(stage, table)
        asked = pa.array(self._requested(settings, table), pa.bool_())
        view = view_of(table, list(dict.fromkeys(("id", *stage.columns().needs))))
        chosen = view.filter(asked)
        pieces: list[pa.Table] = []
        with self._bar(stage.name, chosen.num_rows) as moved:
            engines = self._open.loaded(stage.engines()) if chosen.num_rows else {}
            for start in range(0, chosen.num_rows, self._step):
                part = chosen.slice(start, self._step)
                made = self._loop.result(stage.process(part, engines, stores or {}))
                pieces.append(checked_columns(stage.name, part.num_rows, adds, made))
                moved(part.num_rows)
        pieces.append(not_requested_columns(stage.name, adds, table.num_rows - chosen.num_rows))
        places = pc.sort_indices(pc.invert(asked).cast(pa.int8()))
        made = pa.concat_tables(pieces).unify_dictionaries().take(pc.sort_indices(places))
        self._types |= dict(zip(adds.names, adds.types, strict=True))
        if "task" not in table.column_names:
            statuses = made[f"{stage.name}_status"].to_pylist()
            self._record(
                stage.name,
                self._folder(stage.name),
                stage=stage,
                counts=dict(Counter(_code(status) for status in statuses)),
                rows_computed=chosen.num_rows,
                seconds=time.monotonic() - started,
            )
        return same_rows(rows, with_columns_of(table, made.select(adds.names)))

    def fitted(
        self,
        stage: FitStage,
        rows: pa.Table,
        targets: pa.Table | None = None,
        artifacts: Mapping[str, Fitted] | None = None,
        stores: Mapping[str, Store] | None = None,
    ) -> Fitted:
        """What any fit stage makes of rows.

        Args:
            stage: such as one that is no method here.
            rows: an Arrow table.
            targets: rows with a `task`; None: none.
            artifacts: what it reads, by the name of the stage that made it.
            stores: folders of what else it reads, by name.
        """
        self.check(stage, rows)
        started = time.monotonic()
        goals = TARGETS.empty_table() if targets is None else targets
        if stage.on_targets:
            check_columns(stage.name, goals, {"task", *stage.columns().needs}, "these targets")
        found = artifacts or {}
        with self._bar(stage.name, None) as moved:
            engines = self._open.loaded(stage.engines())
            made = self._loop.result(
                stage.fit(
                    MemoryColumns(rows, self._step, moved),
                    MemoryColumns(goals, self._step, moved),
                    engines,
                    {**{name: one.store for name, one in found.items()}, **(stores or {})},
                )
            )
        folder = self._folder(stage.name)
        for name, data in made.files.items():
            folder.write_bytes(name, data)
        seconds = time.monotonic() - started
        self._record(stage.name, folder, stage=stage, report=made.report, seconds=seconds)
        return Fitted(stage.name, made.report, folder, stage.settings, tuple(made.files), found)

    def check(self, stage: RowStage | FitStage, rows: pa.Table | None = None) -> None:
        """Refuse what can't work before a model is loaded.

        Args:
            stage: what shall be done.
            rows: with the columns that it reads; None: not looked at.

        Raises:
            ConfigError: naming the model or the column.
        """
        self._check_open()
        check_endpoints(stage.name, stage.engines())
        if isinstance(stage, Checked):
            stage.check()
        if rows is None:
            return
        needs = set(stage.columns().needs)
        if isinstance(stage.settings, RowSettings):
            rule = stage.settings.where
            needs |= {"id"} | (rule_columns(rule) if rule else set())
        check_columns(stage.name, rows, needs)

    def _requested(self, settings: RowSettings, table: pa.Table) -> list[bool]:
        where, limit, highest = settings.where, settings.limit, None
        if limit is not None:
            met = table.filter(rule_mask(where, table)) if where else table
            keys = lowest_keys(met["id"].to_pylist(), self.seed, limit)
            highest = keys[-1] if keys else 0
        return requested_rows(table, where, highest, self.seed)

    def _decided(
        self,
        stage: SetStage,
        rows: pa.Table,
        targets: pa.Table,
        stores: Mapping[str, Store] | None = None,
    ) -> tuple[Mapping[str, pa.Table], Mapping[str, Any], Mapping[str, bytes]]:
        self._check_open()
        check_columns(stage.name, rows, set(stage.columns().needs))
        with self._bar(stage.name, None) as moved:
            outcome = stage.decide(
                MemoryColumns(rows, self._step, moved),
                MemoryColumns(targets, self._step, moved),
                stores or {},
            )
        return outcome.tables, outcome.report, outcome.files

    def _check_open(self) -> None:
        if not self._end.alive:
            raise ConfigError("this session is closed; open another")

    def _table(self, rows: object) -> pa.Table:
        return arrow_table(rows, self._types)

    def _targets(self, targets: object) -> pa.Table:
        return TARGETS.empty_table() if targets is None else self._table(targets)

    def _folder(self, name: str) -> Store:
        """A folder that nothing was written to yet."""
        self._check_open()
        self._made += 1
        return self._store.child(f"{self._made:04}-{name}")

    def _record(
        self, name: str, folder: Store, stage: RowStage | FitStage | None = None, **facts: Any
    ) -> None:
        """Keep what a data set's card says of a stage."""
        specs = stage.engines() if stage is not None else {}
        identity = {
            "version": stage.version if stage is not None else None,
            "models": {
                role: {
                    "settings": spec.settings.portable(),
                    "weights": f"endpoint:{spec.settings.endpoint.known_as}:{spec.settings.model}"
                    if spec.settings.endpoint
                    else model_identity(spec.settings.model),
                }
                for role, spec in specs.items()
            },
        }
        folder.write_json("identity.json", identity)
        folder.write_json("manifest.json", facts)
        self._records[name] = folder

    @contextmanager
    def _bar(self, name: str, rows: int | None) -> Iterator[Any]:
        from tqdm.auto import tqdm

        with tqdm(desc=name, total=rows, unit=" rows", disable=not self._progress) as bar:
            yield bar.update


def _end(
    models: OpenModels, loop: BackgroundLoop, folder: tempfile.TemporaryDirectory[str]
) -> None:
    models.close()
    loop.close()
    folder.cleanup()


def check_columns(stage: str, table: pa.Table, needs: set[str], what: str = "these rows") -> None:
    """See that the columns are there that a stage reads.

    Raises:
        ConfigError: naming the first that isn't, and what adds it.
    """
    if "effective_messages" in needs:
        needs = (needs - {"effective_messages"}) | {"messages"}
    absent = sorted(needs - set(table.column_names))
    if absent:
        first = absent[0]
        hint = f"; session.{_ADDED_BY[first]} adds it" if first in _ADDED_BY else ""
        raise ConfigError(
            f"{stage} reads the column {first!r}, which {what} don't have{hint}; they have "
            f"{', '.join(table.column_names)}"
        )


def _code(status: str) -> str:
    """A status without what belongs to one row alone."""
    return ": ".join(status.split(": ")[:2]) if status.startswith("failed") else status
