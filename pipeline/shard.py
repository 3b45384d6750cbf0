"""One shard of one row stage: read its rows, compute what isn't known yet, commit it whole.

The same function runs in this process and in Ray's workers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.flow import folder_of
from pipeline.rundir import ids_digest, read_columns
from stages.base import RowStage, checked_columns
from stages.engines.chat import UNANSWERED
from stages.engines.chat_cache import CachedChat
from stages.engines.generation_cache import CachedGenerator
from stages.engines.spent import Spent
from stages.requests import not_requested_columns, requested_rows
from stages.rows import NOT_REQUESTED, canonical_json, row_id
from stages.rules import rule_columns
from stages.storage import Store

KEY = "key"
"""Column of a shard that says what its other columns are a function of."""

BESIDE = ("answer", "source")
"""What a stage may read of a row that isn't part of its id."""


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to know of a shard."""

    run: str
    stage: RowStage
    part: str
    homes: Mapping[str, str]
    fingerprint: str
    seed: int
    targets: bool = False
    limit_key: int | None = None
    upstream: str = ""
    fitted: str = ""
    reuse: tuple[str, ...] = ()
    artifacts: Mapping[str, str] = field(default_factory=dict)
    cache: str = ""
    generation: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The stage's folder for these rows."""
        folder = folder_of(self.stage.name)
        return f"{folder}/targets" if self.targets else folder

    def footer(self, rows: str) -> dict[str, str]:
        """What a committed shard's footer says of it."""
        return {
            "stage": self.stage.name,
            "fingerprint": self.fingerprint,
            "rows": rows,
            "requested": "" if self.limit_key is None else str(self.limit_key),
            "upstream": self.upstream,
            "fitted": self.fitted,
        }


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard's rows."""

    part: str
    rows: int
    computed: int
    reused: int
    statuses: Mapping[str, int]
    seconds: float
    spent: Mapping[str, Spent] = field(default_factory=dict)


def is_committed(task: ShardTask, rows: str) -> bool:
    """Whether the shard is there, of this stage as it is now and of these rows."""
    store = Store(task.run)
    name = f"{task.folder}/{task.part}"
    return store.exists(name) and store.table_metadata(name) == task.footer(rows)


async def compute_shard(task: ShardTask, handles: Mapping[str, Any]) -> ShardReport:
    """Compute and commit one shard.

    Args:
        task: the shard; `upstream` is the digest of the shards that it reads from other stages.
        handles: the stage's engines by role.

    Raises:
        StageError: the stage can't go on, or broke its contract.
    """
    started = time.monotonic()
    run = Store(task.run)
    stage = task.stage
    needs = dict.fromkeys(("id", *stage.columns().needs))
    where = None if task.targets else stage.settings.where
    rows = read_columns(
        run,
        task.part,
        tuple(needs | dict.fromkeys(sorted(rule_columns(where)) if where else ())),
        task.homes,
        targets=task.targets,
    )
    ids = rows["id"].to_pylist()
    keys = _keys(rows)
    limit_key = None if task.targets else task.limit_key
    requested = requested_rows(rows, where, limit_key, task.seed)
    known = _known(task, keys, requested)
    to_compute = [i for i, wanted in enumerate(requested) if wanted and keys[i] not in known]
    adds = stage.columns().adds
    pieces: list[pa.Table] = []
    engines: dict[str, Any] = {}
    if to_compute:
        engines = {role: _cached(task, role, handle) for role, handle in handles.items()}
        artifacts = {name: Store(url) for name, url in task.artifacts.items()}
        made = await stage.process(rows.select(list(needs)).take(to_compute), engines, artifacts)
        pieces.append(checked_columns(stage.name, len(to_compute), adds, made))
    reused = [i for i, wanted in enumerate(requested) if wanted and keys[i] in known]
    pieces += [known[keys[i]] for i in reused]
    skipped = [i for i, wanted in enumerate(requested) if not wanted]
    pieces.append(not_requested_columns(stage.name, adds, len(skipped)))
    order = pa.array([*to_compute, *reused, *skipped])
    table = pa.concat_tables(pieces).unify_dictionaries().take(pc.sort_indices(order))
    table = table.add_column(0, "id", pa.array(ids, pa.string()))
    table = table.add_column(1, KEY, pa.array(keys, pa.string()))
    # Encoded anew, so that a shard's bytes don't tell which rows were reused.
    table = _plain_dictionaries(table)
    footer = task.footer(ids_digest(rows["id"])) | _unanswered_note(stage, table)
    run.write_table(f"{task.folder}/{task.part}", table, footer)
    statuses = Counter(_code(status) for status in table[f"{stage.name}_status"].to_pylist())
    seconds = time.monotonic() - started
    return ShardReport(
        part=task.part,
        rows=len(ids),
        computed=len(to_compute),
        reused=len(reused),
        statuses=dict(statuses),
        seconds=seconds,
        spent={
            role: one.spent
            for role, one in engines.items()
            if isinstance(one, (CachedChat, CachedGenerator))
        },
    )


def _keys(rows: pa.Table) -> list[str]:
    """What a row's columns are a function of: its id, or its effective text where that is read.

    An answer and a source aren't part of the id; where they are read they are part of the key.
    """
    if "effective_messages" in rows.column_names:
        keys = [row_id(messages, None) for messages in rows["effective_messages"].to_pylist()]
    else:
        keys = [str(row) for row in rows["id"].to_pylist()]
    beside = [name for name in BESIDE if name in rows.column_names]
    if not beside:
        return keys
    values = zip(*(rows[name].to_pylist() for name in beside), strict=True)
    return [f"{key}:{canonical_json(value)}" for key, value in zip(keys, values, strict=True)]


def _known(task: ShardTask, keys: list[str], requested: list[bool]) -> dict[str, pa.Table]:
    """One-row tables of columns that another shard holds for a requested key."""
    wanted = pa.array([key for key, asked in zip(keys, requested, strict=True) if asked])
    known: dict[str, pa.Table] = {}
    adds = task.stage.columns().adds
    for url in task.reuse:
        folder, _, name = url.rpartition("/")
        table = Store(folder).read_table(name)
        asked = pc.is_in(table[KEY], value_set=wanted)
        statuses = table[f"{task.stage.name}_status"].cast(pa.string())
        settled = pc.and_(
            pc.not_equal(statuses, NOT_REQUESTED),
            pc.invert(pa.array(_unanswered(task.stage, statuses), pa.bool_())),
        )
        hits = table.filter(pc.and_(asked, settled))
        for place, key in enumerate(hits[KEY].to_pylist()):
            known.setdefault(key, hits.select(adds.names).slice(place, 1))
    return known


def _plain_dictionaries(table: pa.Table) -> pa.Table:
    for place, field_ in enumerate(table.schema):
        if pa.types.is_dictionary(field_.type):
            plain = table[field_.name].cast(pa.string()).combine_chunks()
            encoded = plain.dictionary_encode()
            table = table.set_column(place, field_, pa.chunked_array([encoded]))
    return table


def _unanswered(stage: RowStage, statuses: pa.ChunkedArray) -> list[bool]:
    """Rows that failed because an endpoint didn't answer, which it may do another time."""
    if all(spec.settings.endpoint is None for spec in stage.engines().values()):
        return [False] * len(statuses)
    codes = {f"failed: {code}" for code in UNANSWERED}
    return [_code(status) in codes for status in statuses.to_pylist()]


def _unanswered_note(stage: RowStage, table: pa.Table) -> dict[str, str]:
    """What keeps a shard from counting as done when its stage runs again; {} where nothing does."""
    rows = sum(_unanswered(stage, table[f"{stage.name}_status"]))
    return {"unanswered": str(rows)} if rows else {}


def _cached(task: ShardTask, role: str, handle: Any) -> Any:
    spec = task.stage.engines()[role]
    if spec.kind != "generator":
        return handle
    kept = Store(task.cache), task.generation[role], spec.settings.generation_chunk
    if spec.settings.endpoint is not None:
        return CachedChat(handle, *kept)
    return CachedGenerator(handle, *kept)


def _code(status: str) -> str:
    """A status without what belongs to one row alone."""
    return ": ".join(status.split(": ")[:2]) if status.startswith("failed") else status
