"""Sources and targets to shards of rows: every record becomes a row or a reject with its reason.

Rows are in the order of the recipe's sources, each one's files and each file's records. Of exact
duplicates (equal ids) the first is kept; rows of anchors go before all others, wherever the recipe
names them, since the user trains on them already. Memory holds one shard and 16 bytes of id a row
(with Python's overhead about 100).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.errors import ConfigError, StageError
from stages.ingest.parse import Reject, Row, iter_rows
from stages.ingest.report import IngestReport, SourceReport
from stages.ingest.settings import IngestSettings
from stages.ingest.shards import Metadata, ShardWriter
from stages.rows import REJECTS, ROWS, TARGETS
from stages.sources.catalogue import resolved
from stages.sources.files import SourceFile, files_of
from stages.sources.reasons import REASONS
from stages.sources.settings import Source, Target
from stages.storage import Store

REJECTS_PER_SHARD = 512
"""Rejects in a part, each with at most 10,000 characters of its text."""


def ingest(
    sources: Sequence[Source],
    targets: Sequence[Target],
    settings: IngestSettings,
    store: Store,
    *,
    metadata: Metadata = None,
) -> IngestReport:
    """Write `part-*.parquet`, `rejects/part-*.parquet` and `targets/part-00000.parquet`.

    Args:
        sources: pools and anchors, in the order of the recipe.
        targets: all go to one part, since they are few.
        settings: sizes and limits.
        store: the folder to write into; parts of an earlier run are overwritten, not removed.
        metadata: what goes into the footers, or a function of the file's name that gives it.

    Returns:
        What became of the records of each source and target, and the parts written.

    Raises:
        ConfigError: a name is used twice, or a path is missing or holds no record.
        StageError: a source or target lost more records than it may, or all of its rows.
    """
    for kind, group in (("source", sources), ("target", targets)):
        names = [one.name for one in group]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{kind} {twice[0]} is named twice; names tell sources apart")
    files = [files_of(source) for source in (*sources, *targets)]
    return _Ingest(settings, store, metadata).run(sources, targets, files)


class _Ingest:
    def __init__(self, settings: IngestSettings, store: Store, metadata: Metadata) -> None:
        self._settings, self._store = settings, store
        self._rows = ShardWriter(
            store,
            ROWS,
            metadata,
            max_rows=settings.rows_per_shard,
            max_chars=settings.max_chars_per_shard,
        )
        self._targets = ShardWriter(store, TARGETS, metadata, folder="targets")
        self._rejects = ShardWriter(
            store, REJECTS, metadata, folder="rejects", max_rows=REJECTS_PER_SHARD
        )

    def run(
        self,
        sources: Sequence[Source],
        targets: Sequence[Target],
        files: Sequence[list[SourceFile]],
    ) -> IngestReport:
        report = IngestReport()
        try:
            anchored = self._ids_of_late_anchors(sources, files)
            seen: set[bytes] = set()
            for source, its in zip(sources, files[: len(sources)], strict=True):
                earlier = set() if source.role == "anchor" else anchored
                report.sources[source.name] = self._take(source, its, self._rows, seen, earlier)
            seen = set()
            for target, its in zip(targets, files[len(sources) :], strict=True):
                report.targets[target.name] = self._take(target, its, self._targets, seen, set())
        finally:
            # A person who reads that too much was rejected wants to see what.
            self._rejects.flush()
        self._rows.flush()
        self._targets.flush()
        report.shards = self._rows.written
        report.target_shards = self._targets.written
        report.reject_shards = self._rejects.written
        return report

    def _ids_of_late_anchors(
        self, sources: Sequence[Source], files: Sequence[list[SourceFile]]
    ) -> set[bytes]:
        """Ids of anchors that stand after a pool, which would else be seen too late."""
        pools = [index for index, source in enumerate(sources) if source.role == "pool"]
        first_pool = min(pools, default=len(sources))
        return {
            bytes.fromhex(row.id)
            for index, source in enumerate(sources)
            if source.role == "anchor" and index > first_pool
            for row in iter_rows(source, self._settings, files[index])
            if isinstance(row, Row)
        }

    def _take(
        self,
        source: Source,
        files: list[SourceFile],
        writer: ShardWriter,
        seen: set[bytes],
        earlier: set[bytes],
    ) -> SourceReport:
        """Write a source's rows; an id in `seen` or `earlier` is a duplicate."""
        report = SourceReport([file.name for file in files])
        first: dict[str, Reject] = {}
        for row in iter_rows(source, self._settings, files):
            report.records += 1
            reject = row if isinstance(row, Reject) else _duplicate(row, seen, earlier)
            if reject is not None:
                report.reject(reject)
                first.setdefault(reject.reason.partition(":")[0], reject)
                self._rejects.add(_reject_columns(reject), len(reject.raw))
            elif isinstance(row, Row):
                seen.add(bytes.fromhex(row.id))
                report.keep(row)
                writer.add(_row_columns(row), row.chars)
        self._check(source, files, report, first)
        return report

    def _check(
        self,
        source: Source,
        files: list[SourceFile],
        report: SourceReport,
        first: dict[str, Reject],
    ) -> None:
        kind = "target" if isinstance(source, Target) else "source"
        who = f"{kind} {source.name}"
        if report.records != report.kept + report.rejected.total():
            raise StageError(
                f"{who}: {report.records} records came in, but {report.kept} were kept and "
                f"{report.rejected.total()} rejected; this is a bug in tamis",
                stage="ingest",
            )
        if report.records == 0:
            part = f" in rows {list(source.rows)}" if source.rows else ""
            raise ConfigError(f"{who}: {source.path} holds no record{part}")
        counts = ", ".join(f"{code} {count}" for code, count in report.rejected.most_common())
        bad = report.rejected.total() - report.rejected["duplicate"]
        limit = self._limit(source, files)
        if bad > limit * report.records:
            code = next(c for c, _ in report.rejected.most_common() if c != "duplicate")
            example = first[code]
            raise StageError(
                f"{who}: {bad} of {report.records} records are rejected "
                f"({bad / report.records:.1%}), more than max_reject_rate {limit:g}: {counts}. "
                f"{code}: {REASONS[code]}. The first is record {example.record} of {example.file} "
                f"({example.reason}); all are in {self._store.url}/rejects. Mend the {kind}, or "
                "raise its max_reject_rate",
                stage="ingest",
            )
        if report.kept == 0:
            raise StageError(
                f"{who}: every one of its {report.records} rows is a duplicate or rejected: "
                f"{counts}. Remove it from the recipe"
                + (", or put it before the one that repeats it" if kind == "source" else ""),
                stage="ingest",
            )

    def _limit(self, source: Source, files: list[SourceFile]) -> float:
        if source.max_reject_rate is not None:
            return source.max_reject_rate
        known = [resolved(source, file.url).max_reject_rate for file in files]
        return max([rate for rate in known if rate is not None] + [self._settings.max_reject_rate])


def _duplicate(row: Row, seen: set[bytes], earlier: set[bytes]) -> Reject | None:
    key = bytes.fromhex(row.id)
    return row.rejected(f"duplicate: {row.id}") if key in seen or key in earlier else None


def _row_columns(row: Row) -> dict[str, Any]:
    columns: dict[str, Any] = {name: getattr(row, name) for name in ROWS.names}
    return columns if row.task is None else {**columns, "task": row.task}


def _reject_columns(reject: Reject) -> dict[str, Any]:
    return {name: getattr(reject, name) for name in REJECTS.names}
