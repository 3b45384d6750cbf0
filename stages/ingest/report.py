"""What ingest did, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from stages.errors import StageError
from stages.ingest.parse import Reject, Row
from stages.sources.reasons import REASONS, code_of


@dataclass
class SourceReport:
    """What became of one source's records.

    Attributes:
        files: its files as rows name them.
        records: records read (those of its slice, where it names one).
        kept: rows written.
        rejected: rejects by code (see `stages.sources.reasons.REASONS`).
        end_markers: rows kept from whose responses end-of-text markers were stripped.
        answers: rows kept that have a reference answer.
        damaged_files: files whose rest could not be read: more records may be lost than counted.
        tasks: a target's rows by task.
        duplicate_of: exact duplicates by the source of the row that stays; where the row that they
            equal is a near duplicate in turn, of the one that stays for it.
        near_duplicate_of: near duplicates by the source of the row that stays.
        overlaps: contaminated rows by target or evaluation set, and how they overlap it.
    """

    files: list[str]
    records: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    end_markers: int = 0
    answers: int = 0
    damaged_files: list[str] = field(default_factory=list)
    tasks: Counter[str] = field(default_factory=Counter)
    duplicate_of: Counter[str] = field(default_factory=Counter)
    near_duplicate_of: Counter[str] = field(default_factory=Counter)
    overlaps: dict[str, Counter[str]] = field(default_factory=dict)

    def keep(self, row: Row) -> None:
        """Count a row that is written."""
        self.kept += 1
        self.end_markers += row.end_markers
        self.answers += row.answer is not None
        if row.task is not None:
            self.tasks[row.task] += 1

    def reject(self, reject: Reject) -> None:
        """Count a record that is rejected."""
        code = code_of(reject.reason)
        if code not in REASONS:
            raise StageError(f"unknown reject reason {reject.reason!r}", stage="ingest")
        self.rejected[code] += 1
        if code == "damaged_file":
            self.damaged_files.append(reject.file)

    def drop_near_duplicate(self, of: str, *, end_markers: bool, answered: bool) -> None:
        """Count a row that was kept as a near duplicate of a source's row instead.

        Args:
            of: the source of the row that stays.
            end_markers: whether it counts in `end_markers`.
            answered: whether it counts in `answers`.
        """
        self.kept -= 1
        self.end_markers -= end_markers
        self.answers -= answered
        self.rejected["near_duplicate"] += 1
        self.near_duplicate_of[of] += 1

    def follow_duplicate(self, of: str, to: str) -> None:
        """Count a copy of a source's row, now a near duplicate, by the source whose row stays."""
        self.duplicate_of[of] -= 1
        if not self.duplicate_of[of]:
            del self.duplicate_of[of]
        self.duplicate_of[to] += 1

    @property
    def counts(self) -> str:
        """Rejects by code, most first, as text."""
        return ", ".join(f"{code} {count}" for code, count in self.rejected.most_common())

    def as_dict(self) -> dict[str, Any]:
        """The numbers as JSON values; `in` is `kept` plus all that is in `rejected`."""
        numbers: dict[str, Any] = {
            "in": self.records,
            "kept": self.kept,
            "rejected": dict(sorted(self.rejected.items())),
            "end_markers": self.end_markers,
            "answers": self.answers,
            "files": self.files,
            "damaged_files": self.damaged_files,
            "duplicate_of": dict(sorted(self.duplicate_of.items())),
            "near_duplicate_of": dict(sorted(self.near_duplicate_of.items())),
            "overlaps": {
                name: dict(sorted(kinds.items())) for name, kinds in sorted(self.overlaps.items())
            },
        }
        return {**numbers, "tasks": dict(sorted(self.tasks.items()))} if self.tasks else numbers


@dataclass
class IngestReport:
    """What ingest did: by source, target and evaluation set, and the shards it wrote."""

    sources: dict[str, SourceReport] = field(default_factory=dict)
    targets: dict[str, SourceReport] = field(default_factory=dict)
    sets: dict[str, SourceReport] = field(default_factory=dict)
    shards: list[tuple[str, int]] = field(default_factory=list)
    target_shards: list[tuple[str, int]] = field(default_factory=list)
    reject_shards: list[tuple[str, int]] = field(default_factory=list)

    @property
    def tasks(self) -> dict[str, int]:
        """Target rows by task, over all targets."""
        total: Counter[str] = Counter()
        for report in self.targets.values():
            total.update(report.tasks)
        return dict(sorted(total.items()))

    def totals(self) -> dict[str, Any]:
        """The numbers of all sources and targets together."""
        reports = [*self.sources.values(), *self.targets.values()]
        rejected: Counter[str] = Counter()
        for report in reports:
            rejected.update(report.rejected)
        return {
            "in": sum(report.records for report in reports),
            "kept": sum(report.kept for report in reports),
            "rows": sum(report.kept for report in self.sources.values()),
            "targets": sum(report.kept for report in self.targets.values()),
            "rejected": dict(sorted(rejected.items())),
            "end_markers": sum(report.end_markers for report in reports),
        }

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "sources": {name: report.as_dict() for name, report in self.sources.items()},
            "targets": {name: report.as_dict() for name, report in self.targets.items()},
            "evaluation_sets": {name: report.as_dict() for name, report in self.sets.items()},
            "tasks": self.tasks,
            "totals": self.totals(),
            "shards": [list(shard) for shard in self.shards],
            "target_shards": [list(shard) for shard in self.target_shards],
            "reject_shards": [list(shard) for shard in self.reject_shards],
        }
