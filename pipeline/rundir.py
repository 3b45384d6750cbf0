"""The run directory: manifests, columns of shards, and the lock.

`identity.json` is written when a stage starts, `manifest.json` when it is complete; a stage without
a manifest is unfinished, and its committed shards count.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import accumulate
from typing import Any, TypeVar

import psutil
import pyarrow as pa

from pipeline.flow import FOLDERS, ORDER, ROW_STAGES, folder_of, with_extensions
from pipeline.sigterm import AT_END
from stages.base import Each, in_turn
from stages.errors import ConfigError, RunBusy, StageError
from stages.rows import effective_messages
from stages.storage import Store

T = TypeVar("T")

MANIFEST = "manifest.json"
IDENTITY = "identity.json"
LOCK = "lock.json"
_HEARTBEAT_S = 10.0
_STALE_S = 60.0
_WRITTEN_S = 1.0
_TURN_S = 0.02
_SAME_START_S = 2.0
_RELEASE_S = 1.0
"""At SIGTERM, a heartbeat that takes longer to write isn't waited for."""


def opened_run(url: str) -> Store:
    """The store of a run directory that was begun.

    Raises:
        ConfigError: none is there.
    """
    run = Store(url)
    if read_identity(run, "ingest") is None:
        raise ConfigError(f"{url} is no run directory: no stage was begun there; check the path")
    return run


def row_stages_of(run: Store) -> list[str]:
    """Names of all row stages that a run can have, those of other packages last."""
    return [*ROW_STAGES, *_extensions(run)]


def stages_of(run: Store) -> list[str]:
    """Names of all stages that a run can have, in order."""
    return with_extensions(ORDER, _extensions(run))


def _extensions(run: Store) -> list[str]:
    """Stages of other packages that were begun in a run, by name."""
    own = {*ORDER, *FOLDERS.values()}
    return [name for name in run.names() if name not in own and run.exists(f"{name}/{IDENTITY}")]


def read_manifest(run: Store, stage: str) -> dict[str, Any] | None:
    """A stage's manifest; None where the stage isn't complete."""
    return _json(run, f"{folder_of(stage)}/{MANIFEST}")


def read_identity(run: Store, stage: str) -> dict[str, Any] | None:
    """The identity that a stage was started with; None where it never was."""
    return _json(run, f"{folder_of(stage)}/{IDENTITY}")


def start_stage(run: Store, stage: str, identity: Mapping[str, Any]) -> None:
    """Record what a stage is about to be computed with, and that it isn't complete."""
    folder = run.child(folder_of(stage))
    folder.remove(MANIFEST)
    folder.write_json(IDENTITY, identity)


def finish_stage(
    run: Store,
    stage: str,
    files: Sequence[str],
    table_rows: Mapping[str, int],
    **facts: Any,
) -> dict[str, Any]:
    """Write a stage's manifest, which makes it complete.

    Args:
        run: the run directory.
        stage: name of the stage.
        files: paths in its folder, in order.
        table_rows: rows of the files that are tables.
        facts: fingerprint, inputs, counts, report and whatever else belongs in it.
    """
    folder = run.child(folder_of(stage))
    listed = [
        {
            "path": name,
            "bytes": folder.size(name),
            "sha256": folder.sha256(name),
            **({"rows": table_rows[name]} if name in table_rows else {}),
        }
        for name in files
    ]
    manifest = {"stage": stage, **facts, "files": listed, "digest": files_digest(listed)}
    folder.write_json(MANIFEST, manifest)
    return manifest


def files_digest(listed: Sequence[Mapping[str, Any]]) -> str:
    """Hash of the files that a manifest lists."""
    return hashlib.sha256("".join(str(entry["sha256"]) for entry in listed).encode()).hexdigest()


def parts(run: Store, folder: str) -> list[str]:
    """Names of the committed shards in a folder, in order."""
    return [
        name for name in run.names(folder) if name.startswith("part-") and name.endswith(".parquet")
    ]


def ids_digest(ids: pa.ChunkedArray | pa.Array) -> str:
    """Hash of a shard's ids in order: which rows a shard of columns belongs to."""
    return hashlib.blake2b("".join(ids.to_pylist()).encode(), digest_size=16).hexdigest()


def read_columns(
    run: Store, part: str, names: Sequence[str], homes: Mapping[str, str], *, targets: bool = False
) -> pa.Table:
    """Named columns of one shard, zipped by position from the stages that added them.

    Args:
        run: the run directory.
        part: the shard's file name.
        names: columns; `effective_messages` stands for coalesce(messages_reflected, messages).
        homes: the stage that adds each column.
        targets: read the target rows' shard instead (they are never rewritten).

    Raises:
        StageError: shards of the same number hold other rows.
    """
    wanted = dict.fromkeys(names)
    if "effective_messages" in wanted:
        wanted |= {"messages": None}
        if "messages_reflected" in homes and not targets:
            wanted |= {"messages_reflected": None}
    by_stage: dict[str, list[str]] = {}
    for name in wanted:
        if name == "effective_messages":
            continue
        home = "ingest" if name == "task" else homes[name]
        by_stage.setdefault(home, []).append(name)
    columns: dict[str, Any] = {}
    ids: list[str] | None = None
    for stage, stage_names in by_stage.items():
        folder = f"{folder_of(stage)}/targets" if targets else folder_of(stage)
        table = run.read_table(f"{folder}/{part}", list(dict.fromkeys(["id", *stage_names])))
        found = table["id"].to_pylist()
        if ids is not None and found != ids:
            raise StageError(
                f"{folder}/{part} holds other rows than the shard beside it; "
                f"run again with --restart-from {stage}",
                stage=stage,
            )
        ids = found
        columns |= {name: table[name] for name in stage_names}
    if "effective_messages" in names:
        columns["effective_messages"] = effective_messages(pa.table(columns))
    return pa.table({name: columns[name] for name in names})


@dataclass(frozen=True)
class RunColumns:
    """Columns of all shards of a run: the ShardedColumns that fit and set stages read."""

    run: Store
    part_names: tuple[str, ...]
    homes: Mapping[str, str]
    rows: int
    targets: bool = False
    each: Each = in_turn

    @property
    def n_rows(self) -> int:
        """Rows in all shards."""
        return self.rows

    def iter(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """One table a shard, with the named columns."""
        for part in self.part_names:
            yield read_columns(self.run, part, names, self.homes, targets=self.targets)

    def map(
        self,
        names: Sequence[str],
        fn: Callable[[pa.Table, pa.Table], T],
        merge: Callable[[T, T], T],
        *,
        beside: pa.Table,
    ) -> T:
        """`fn` of every shard's columns and its rows of `beside`, merged in shard order."""
        folder = "ingest/targets" if self.targets else "ingest"
        counts = [self.run.table_rows(f"{folder}/{part}") for part in self.part_names]
        starts = [0, *accumulate(counts)]
        here = replace(self, each=in_turn)
        # A slice is pickled with the whole table that it is of; rows that were taken aren't.
        tasks = (
            (part, beside.take(pa.array(range(start, start + count))))
            for part, start, count in zip(self.part_names, starts, counts, strict=False)
        )
        return reduce(merge, self.each(partial(_of_shard, here, tuple(names), fn), tasks))


def _of_shard(
    columns: RunColumns,
    names: tuple[str, ...],
    fn: Callable[[pa.Table, pa.Table], T],
    task: tuple[str, pa.Table],
) -> T:
    part, beside = task
    table = read_columns(columns.run, part, names, columns.homes, targets=columns.targets)
    return fn(table, beside)


def run_columns(run: Store, homes: Mapping[str, str]) -> RunColumns:
    """Columns of all rows of a run whose ingest is complete."""
    rows = int((read_manifest(run, "ingest") or {})["rows"])
    return RunColumns(run, tuple(parts(run, "ingest")), homes, rows)


def target_columns(run: Store, homes: Mapping[str, str]) -> RunColumns:
    """The same of the targets' rows."""
    found = tuple(parts(run, "ingest/targets"))
    folder = run.child("ingest/targets")
    rows = sum(folder.read_table(part, ["id"]).num_rows for part in found)
    return RunColumns(run, found, homes, rows, targets=True)


class RunLock:
    """Keeps a second process out of a run directory, by a file with a heartbeat."""

    def __init__(self, run: Store) -> None:
        """Name the directory."""
        self._run = run
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            RunBusy: another live process holds it.
            ConfigError: the directory can't be written.
        """
        while not self._taken():
            time.sleep(_TURN_S)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        AT_END[self] = partial(self._release, _RELEASE_S)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        if AT_END.pop(self, None):
            self._release()

    def check(self) -> None:
        """See that the lock is still held.

        Raises:
            RunBusy: another process took it for a dead one's, as its heartbeat couldn't be written.
        """
        if self._lost.is_set():
            raise RunBusy(
                f"{self._run.url} is no longer this process's: {self._run.path(LOCK)} couldn't be "
                f"written for {_STALE_S:g} s or more, and another process took the directory; "
                "what was finished is kept, and the same command goes on from it"
            )

    def _release(self, wait_s: float | None = None) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(wait_s)
        if self._is_mine():
            self._run.remove(LOCK)

    def _taken(self) -> bool:
        """Whether the lock was free, or its holder gone; False: look again.

        Of all processes that find the same stale lock, the one that creates the claim on it may
        put its own in place. Nobody removes a stale lock, so that no live one is ever taken for it.

        Raises:
            RunBusy: a live process holds it, or one was killed as it took it over.
        """
        if self._created(LOCK):
            return True
        found = self._written(LOCK)
        if found is None:
            return False
        if _is_alive(_note_in(found)):
            raise self._busy(found, LOCK)
        claim = f"lock-{hashlib.sha256(found).hexdigest()[:16]}.json"
        if not self._created(claim):
            claimed = self._written(claim)
            if claimed is not None and not _is_alive(_note_in(claimed)):
                raise self._busy(claimed, claim)
            return False
        try:
            if self._written(LOCK) != found:
                return False
            self._run.write_bytes(LOCK, self._note())
        finally:
            self._run.remove(claim)
        return True

    def _busy(self, note: bytes, name: str) -> RunBusy:
        holder = _note_in(note)
        return RunBusy(
            f"{self._run.url} is in use by process {holder.get('pid')} on {holder.get('host')}; "
            "wait for it, or use another run directory. If no such process of tamis runs there, "
            f"remove {self._run.path(name)}"
        )

    def _written(self, name: str) -> bytes | None:
        """What a lock says; nothing where it was never written, None where it's gone.

        A lock that was created a moment ago is still empty.
        """
        end = time.monotonic() + _WRITTEN_S
        while True:
            try:
                found = self._run.read_bytes(name)
            except FileNotFoundError:
                return None
            if found or time.monotonic() > end:
                return found
            time.sleep(_TURN_S)

    def _created(self, name: str) -> bool:
        """Whether this process created a lock; what it holds is this process's then."""
        note = self._note()
        try:
            # Who was stopped before it had written may find that another took it for dead.
            return self._run.create(name, note) and self._written(name) == note
        except OSError as error:
            raise ConfigError(
                f"{self._run.url} can't be written ({error}); check the path and its permissions, "
                "or use another run directory"
            ) from error

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT_S):
            # A storage that fails for a moment is asked again at the next beat.
            with suppress(OSError, StageError):
                if not self._is_mine():
                    self._lost.set()
                    return
                self._run.write_bytes(LOCK, self._note())

    def _is_mine(self) -> bool:
        """Whether the lock that lies there is this process's."""
        try:
            held = _note_in(self._run.read_bytes(LOCK))
        except FileNotFoundError:
            return False
        return all(held.get(name) == value for name, value in _this_process().items())

    def _note(self) -> bytes:
        note = {**_this_process(), "beat": round(time.time())}
        return f"{json.dumps(note)}\n".encode()


def _this_process() -> dict[str, Any]:
    """What tells this process from every other, as a lock says it."""
    return {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "host": socket.gethostname(),
    }


def _note_in(lock: bytes) -> Mapping[str, Any]:
    """What a lock says of its holder; nothing where it was never written whole."""
    try:
        note: Mapping[str, Any] = json.loads(lock)
    except ValueError:
        return {}
    return note


def _is_alive(holder: Mapping[str, Any]) -> bool:
    """Whether the lock's holder still runs: its process on this machine, else its heartbeat."""
    beats = time.time() - float(holder.get("beat", 0)) < _STALE_S
    if holder.get("host") != socket.gethostname():
        return beats
    pid = int(holder["pid"])
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
    if abs(started - float(holder.get("started", started))) < _SAME_START_S:
        return True
    # Another process of that id, or the same after the clock was set: then it still beats.
    return beats and pid != os.getpid()


def _json(run: Store, name: str) -> dict[str, Any] | None:
    if not run.exists(name):
        return None
    try:
        value: dict[str, Any] = run.read_json(name)
    except FileNotFoundError:
        # Another process has removed it since.
        return None
    return value
