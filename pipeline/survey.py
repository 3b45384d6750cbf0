"""What sources hold, found by ingesting them into a temporary folder."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stages.ingest import ContaminationSettings, IngestSettings, ingest
from stages.rows import ROWS, TARGETS, key_hash
from stages.sources.settings import Source, Target
from stages.storage import Store


@dataclass(frozen=True)
class Survey:
    """Rows as a run would have them.

    Attributes:
        report: of ingest.
        lengths: characters of every row's turns, in order.
        sample: the rows of lowest hash(id, seed), with all columns.
        targets: the target rows.
        target_lengths: characters of every target row's turns.
    """

    report: Mapping[str, Any]
    lengths: list[int]
    sample: pa.Table
    targets: pa.Table
    target_lengths: list[int]

    @property
    def rows(self) -> int:
        """Rows of all sources."""
        return len(self.lengths)


def surveyed(
    sources: Sequence[Source],
    targets: Sequence[Target],
    settings: IngestSettings,
    contamination: ContaminationSettings,
    folder: Store,
    *,
    blocked: Collection[str] = (),
    sample: int,
    seed: int,
) -> Survey:
    """Ingest into an empty folder, and read what came of it.

    Raises:
        ConfigError: a file is missing, or holds no record.
        StageError: a source lost more records than it may, or all of its rows.
    """
    report = ingest(
        sources, targets, settings, folder, contamination=contamination, blocked=blocked
    )
    return survey_of(folder, report.as_dict(), sample=sample, seed=seed)


def survey_of(folder: Store, report: Mapping[str, Any], *, sample: int, seed: int) -> Survey:
    """What a folder of ingest holds; a part is in memory at a time."""
    lengths: list[int] = []
    kept: list[tuple[int, str, pa.Table]] = []
    for name in _parts(folder):
        table = folder.read_table(name).cast(ROWS)
        lengths += row_lengths(table)
        keys = enumerate(table["id"].to_pylist())
        fresh = [(key_hash(row, seed), row, table.slice(place, 1)) for place, row in keys]
        kept = heapq.nsmallest(sample, [*kept, *fresh], key=lambda item: item[:2])
    inner = folder.child("targets")
    goals = [inner.read_table(name).cast(TARGETS) for name in _parts(inner)]
    found = pa.concat_tables([TARGETS.empty_table(), *goals]).unify_dictionaries()
    return Survey(
        report,
        lengths,
        pa.concat_tables([ROWS.empty_table(), *(row for _, _, row in kept)]).unify_dictionaries(),
        found,
        row_lengths(found),
    )


def row_lengths(table: pa.Table) -> list[int]:
    """Characters of every row's turns, reasoning included."""
    return [
        sum(len(turn["content"]) + len(turn["reasoning"] or "") for turn in messages)
        for messages in table["messages"].to_pylist()
    ]


def _parts(folder: Store) -> list[str]:
    return [name for name in folder.names() if name.startswith("part-")]
