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
    """

    files: list[str]
    records: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    end_markers: int = 0
    answers: int = 0
    damaged_files: list[str] = field(default_factory=list)
    tasks: Counter[str] = field(default_factory=Counter)

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
        }
        return {**numbers, "tasks": dict(sorted(self.tasks.items()))} if self.tasks else numbers


@dataclass
class IngestReport:
    """What ingest did: by source and target, and the shards it wrote."""

    sources: dict[str, SourceReport] = field(default_factory=dict)
    targets: dict[str, SourceReport] = field(default_factory=dict)
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
            "tasks": self.tasks,
            "totals": self.totals(),
            "shards": [list(shard) for shard in self.shards],
            "target_shards": [list(shard) for shard in self.target_shards],
            "reject_shards": [list(shard) for shard in self.reject_shards],
        }
