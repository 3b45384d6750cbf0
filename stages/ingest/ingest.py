"""Sources and targets to shards of rows: every record becomes a row or a reject with its reason.

Rows are in the order of the recipe's sources, each one's files and each file's records; preferred
sources go before others, and those of blocked licences behind. In turn, rows are rejected that

1. overlap a target or an evaluation set, with or without a response (rows of anchors are not: they
   are trained on already);
2. are exact duplicates (equal ids): the first is kept, and rows of anchors go before all others,
   wherever the recipe names them;
3. are near duplicates, where the recipe asks for it.

Memory holds a batch of rows and a shard, the words of targets and evaluation sets (about 200 bytes
each), and for each row 16 bytes of id (with Python's overhead about 110). Near duplicates add about
70 bytes a row, and 300 for one with exact copies; rows are then first written to `scratch/`, which
is removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import pyarrow as pa

from stages.base import UNSEEN, Each, in_turn
from stages.errors import ConfigError, StageError
from stages.ingest.contamination import first_overlaps, unseen_index, unseen_texts
from stages.ingest.near_duplicates import found_near_duplicates, parted_rows, source_ranks
from stages.ingest.parse import Reject, Row, iter_rows
from stages.ingest.report import IngestReport, SourceReport
from stages.ingest.settings import ContaminationSettings, IngestSettings, NearDuplicateSettings
from stages.ingest.shards import Metadata, ShardWriter, table_of
from stages.overlap import OverlapIndex
from stages.rows import REJECTS, ROWS, TARGETS
from stages.sources.catalogue import resolved
from stages.sources.files import SourceFile, files_of
from stages.sources.reasons import NO_FAULT, REASONS
from stages.sources.settings import Source, Target
from stages.storage import Store

REJECTS_PER_SHARD = 512
"""Rejects in a part, each with at most 10,000 characters of its text."""

SCRATCH = "scratch"
"""Folder of what is removed again."""

_BATCH = 1024
_SCRATCH_ROWS, _SCRATCH_CHARS = 8192, 16_000_000
_SCRATCH_SCHEMA = ROWS.append(pa.field("chars", pa.int64())).append(
    pa.field("end_markers", pa.bool_())
)

_UNSEEN_SCHEMA = pa.schema([TARGETS.field("source"), TARGETS.field("messages")])

_Seen = dict[bytes, str]
"""Ids of rows, and the source that holds each."""


def ingest(
    sources: Sequence[Source],
    targets: Sequence[Target],
    settings: IngestSettings,
    store: Store,
    *,
    contamination: ContaminationSettings | None = None,
    blocked: Collection[str] = (),
    metadata: Metadata = None,
    each: Each = in_turn,
) -> IngestReport:
    """Write `part-*.parquet`, `rejects/part-*.parquet` and `targets/part-00000.parquet`.

    Args:
        sources: pools and anchors, in the order of the recipe.
        targets: all go to one part, since they are few.
        settings: sizes, limits, near duplicates.
        store: the folder to write into; parts of an earlier run are overwritten, not removed.
        contamination: what rows must not hold; unset: the targets.
        blocked: sources whose rows will not be emitted, for their licence: they stay only where no
            other source has the same row, or one nearly the same.
        metadata: what goes into the footers, or a function of the file's name that gives it.
        each: runs the tasks of the search for near duplicates.

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
    contamination = contamination or ContaminationSettings()
    every = (*sources, *targets, *contamination.sets)
    files = {id(one): files_of(one) for one in every}
    near = settings.near_duplicates
    ranks = source_ranks(sources, near.prefer if near else (), blocked)
    job = _Ingest(sources, targets, settings, contamination, ranks, store, metadata, each, files)
    try:
        return job.run()
    finally:
        store.remove(SCRATCH)


class _Ingest:
    def __init__(
        self,
        sources: Sequence[Source],
        targets: Sequence[Target],
        settings: IngestSettings,
        contamination: ContaminationSettings,
        ranks: Mapping[str, int],
        store: Store,
        metadata: Metadata,
        each: Each,
        files: Mapping[int, list[SourceFile]],
    ) -> None:
        self._sources, self._target_sources = sources, targets
        self._ranks = ranks
        # Of equal rows the first stays. Anchors are seen to apart, and keep their place.
        self._in_turn = sorted(sources, key=lambda source: max(0, ranks[source.name]))
        self._settings, self._contamination = settings, contamination
        self._store, self._each, self._files = store, each, files
        self._rows = ShardWriter(
            store,
            ROWS,
            metadata,
            max_rows=settings.rows_per_shard,
            max_chars=settings.max_chars_per_shard,
        )
        self._scratch = ShardWriter(
            store.child(SCRATCH),
            _SCRATCH_SCHEMA,
            max_rows=_SCRATCH_ROWS,
            max_chars=_SCRATCH_CHARS,
            scratch=True,
        )
        self._targets = ShardWriter(store, TARGETS, metadata, folder="targets")
        self._rejects = ShardWriter(
            store, REJECTS, metadata, folder="rejects", max_rows=REJECTS_PER_SHARD
        )
        self._copies: dict[str, list[SourceReport]] | None = None
        """By the id of a row that may be a near duplicate yet, who counted a copy of it."""
        self._unseen: list[tuple[str, str]] = []
        self._unseen_rows = ShardWriter(store, _UNSEEN_SCHEMA, metadata, folder=UNSEEN)

    def run(self) -> IngestReport:
        report = IngestReport()
        near = self._settings.near_duplicates
        try:
            self._read_targets(report)
            batches = self._read_sources(report)
            if near is not None:
                self._add_without_near_duplicates(batches, report, near)
            else:
                for rows in batches:
                    self._rows.add(table_of(rows, ROWS), [row.chars for row in rows])
        finally:
            # A person who reads that too much was rejected wants to see what.
            self._rejects.flush()
        self._rows.flush()
        report.shards = self._rows.written
        report.target_shards = self._targets.written
        report.reject_shards = self._rejects.written
        return report

    def _read_targets(self, report: IngestReport) -> None:
        """Write the targets, and collect what rows must not hold."""
        contamination = self._contamination
        seen: _Seen = {}
        for target in self._target_sources:
            report.targets[target.name] = found = self._reported(target)
            for rows in self._taken(target, found, seen, {}, None):
                self._targets.add(table_of(rows, TARGETS))
                if contamination.targets:
                    self._collect(target.name, rows)
        self._targets.flush()
        for one in contamination.sets:
            report.sets[one.name] = found = self._reported(one)
            for rows in self._taken(one, found, None, {}, None):
                self._collect(one.name, rows)
        self._unseen_rows.flush()

    def _read_sources(self, report: IngestReport) -> Iterator[list[Row]]:
        """Batches of the rows that stay, near duplicates among them."""
        index = unseen_index(self._unseen, self._contamination)
        anchored = self._ids_of_late_anchors()
        seen: _Seen = {}
        report.sources = {source.name: self._reported(source) for source in self._sources}
        for source in self._in_turn:
            found = report.sources[source.name]
            anchor = source.role == "anchor"
            earlier: _Seen = {} if anchor else anchored
            yield from self._taken(source, found, seen, earlier, None if anchor else index)
        self._check_any_row(report)

    def _collect(self, name: str, rows: Sequence[Row]) -> None:
        """Keep what rows must not hold, and write the rows for stages that make new text."""
        self._unseen_rows.add(table_of(rows, _UNSEEN_SCHEMA))
        for row in rows:
            texts = unseen_texts(row.messages, self._contamination.part)
            self._unseen += [(name, text) for text in texts]

    def _reported(self, source: Source) -> SourceReport:
        return SourceReport([file.name for file in self._files[id(source)]])

    def _ids_of_late_anchors(self) -> _Seen:
        """Ids of anchors that stand after a pool, which would else be seen too late."""
        pools = [index for index, source in enumerate(self._in_turn) if source.role == "pool"]
        first_pool = min(pools, default=len(self._in_turn))
        return {
            bytes.fromhex(row.id): source.name
            for index, source in enumerate(self._in_turn)
            if source.role == "anchor" and index > first_pool
            for row in iter_rows(source, self._settings, self._files[id(source)])
            if isinstance(row, Row)
        }

    def _taken(
        self,
        source: Source,
        report: SourceReport,
        seen: _Seen | None,
        earlier: _Seen,
        index: OverlapIndex | None,
    ) -> Iterator[list[Row]]:
        """Batches of a source's rows that stay; the others are rejected.

        Args:
            source: what to read.
            report: counts what became of its records.
            seen: rows that stay, added to; None: duplicates stay too.
            earlier: other rows of which there may be duplicates.
            index: what rows must not hold.
        """
        first: dict[str, Reject] = {}
        records = iter_rows(source, self._settings, self._files[id(source)])
        while batch := list(islice(records, _BATCH)):
            report.records += len(batch)
            overlaps = first_overlaps(batch, index) if index else [None] * len(batch)
            kept: list[Row] = []
            rejects: list[Reject] = []
            for record, overlap in zip(batch, overlaps, strict=True):
                if overlap is not None:
                    report.overlaps.setdefault(overlap.set, Counter())[overlap.kind] += 1
                    reason = f"contaminated: {overlap.set}, {overlap.kind}"
                    rejects.append(record.rejected(reason, overlap=overlap.text))
                elif isinstance(record, Reject):
                    rejects.append(record)
                elif seen is not None and (of := _source_of(record, seen, earlier)) is not None:
                    report.duplicate_of[of] += 1
                    if self._copies is not None:
                        self._copies.setdefault(record.id, []).append(report)
                    rejects.append(record.rejected(f"duplicate: {record.id}", kept=record.id))
                else:
                    if seen is not None:
                        seen[bytes.fromhex(record.id)] = source.name
                    report.keep(record)
                    kept.append(record)
            for reject in rejects:
                report.reject(reject)
                first.setdefault(reject.reason.partition(":")[0], reject)
            self._rejects.add(table_of(rejects, REJECTS))
            if kept:
                yield kept
        self._check(source, report, first)

    def _add_without_near_duplicates(
        self, batches: Iterable[list[Row]], report: IngestReport, settings: NearDuplicateSettings
    ) -> None:
        """Write rows to shards by way of `scratch/`; near duplicates are rejected."""
        scratch = self._store.child(SCRATCH)
        copies = self._copies = {}
        parts = self._scratch_parts(batches)
        found = found_near_duplicates(scratch, parts, settings, self._ranks, self._each)
        for rows, dropped in parted_rows(scratch, self._scratch.written, found):
            self._rows.add(rows, rows["chars"].to_pylist())
            self._rejects.add(table_of([one.reject for one in dropped], REJECTS))
            for one in dropped:
                report.sources[one.reject.source].drop_near_duplicate(
                    one.of, end_markers=one.end_markers, answered=one.answered
                )
                for copied in copies.get(one.reject.id or "", ()):
                    copied.follow_duplicate(one.reject.source, one.of)
        for source in self._sources:
            self._check_rows_left(source, report.sources[source.name])

    def _scratch_parts(self, batches: Iterable[list[Row]]) -> Iterator[tuple[str, int]]:
        """Names and rows of the shards in `scratch/`, each as soon as it is written."""
        given = 0
        for rows in batches:
            self._scratch.add(table_of(rows, _SCRATCH_SCHEMA), [row.chars for row in rows])
            yield from self._scratch.written[given:]
            given = len(self._scratch.written)
        self._scratch.flush()
        yield from self._scratch.written[given:]

    def _check(self, source: Source, report: SourceReport, first: Mapping[str, Reject]) -> None:
        who = f"{self._kind(source)} {source.name}"
        if report.records != report.kept + report.rejected.total():
            raise StageError(
                f"{who}: {report.records} records came in, but {report.kept} were kept and "
                f"{report.rejected.total()} rejected; this is a bug in tamis",
                stage="ingest",
            )
        if report.records == 0:
            part = f" in rows {list(source.rows)}" if source.rows else ""
            raise ConfigError(f"{who}: {source.path} holds no record{part}")
        bad = {c: n for c, n in report.rejected.most_common() if c not in NO_FAULT}
        rejected = sum(bad.values())
        limit = self._limit(source)
        if rejected > limit * report.records:
            code = next(iter(bad))
            example = first[code]
            raise StageError(
                f"{who}: {rejected} of {report.records} records are rejected "
                f"({rejected / report.records:.1%}), more than max_reject_rate {limit:g}: "
                f"{report.counts}. {code}: {REASONS[code]}. The first is record {example.record} "
                f"of {example.file} ({example.reason}); all are in {self._store.url}/rejects. Mend "
                f"the {self._kind(source)}, or raise its max_reject_rate",
                stage="ingest",
            )
        self._check_rows_left(source, report)

    def _check_any_row(self, report: IngestReport) -> None:
        if self._sources and not any(one.kept for one in report.sources.values()):
            raise StageError(
                "no source has a row left: all are duplicates of each other, or overlap targets "
                f"or evaluation sets; see {self._store.url}/rejects",
                stage="ingest",
            )

    def _check_rows_left(self, source: Source, report: SourceReport) -> None:
        if report.kept:
            return
        kind = self._kind(source)
        remedy = f"Remove it from the recipe, or mend the {kind}"
        if kind == "source" and any(report.rejected[code] for code in NO_FAULT):
            if self._settings.allow_empty_sources:
                return
            remedy = (
                "Remove it from the recipe, put it before the one that repeats it, or set "
                "ingest.allow_empty_sources: true"
            )
        raise StageError(
            f"{kind} {source.name}: every one of its {report.records} rows is rejected: "
            f"{report.counts}. {remedy}",
            stage="ingest",
        )

    def _kind(self, source: Source) -> str:
        if not isinstance(source, Target):
            return "source"
        ours = any(source is one for one in self._contamination.sets)
        return "evaluation set" if ours else "target"

    def _limit(self, source: Source) -> float:
        if source.max_reject_rate is not None:
            return source.max_reject_rate
        files = self._files[id(source)]
        known = [resolved(source, file.url).max_reject_rate for file in files]
        return max([rate for rate in known if rate is not None] + [self._settings.max_reject_rate])


def _source_of(row: Row, seen: _Seen, earlier: _Seen) -> str | None:
    """The source of an equal row that stays, or None."""
    key = bytes.fromhex(row.id)
    return seen.get(key) or earlier.get(key)
