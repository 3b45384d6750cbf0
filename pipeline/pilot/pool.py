"""What pilots are trained and measured on, in the order in which trainings take it.

Of each source the rows of lowest hash(id, seed) are kept, so that the rows of a smaller training
are among those of a larger one, whatever the mixture, and losses differ by what is added alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.rejects import check_mostly_read
from stages.engines import MaskedSequence
from stages.errors import ConfigError, RowError
from stages.ingest.parse import Row, iter_rows
from stages.ingest.settings import IngestSettings
from stages.rows import Message, key_hash, response
from stages.sources.settings import Source
from stages.storage import Store

PREPARED = "prepared.json"

Sequenced = Callable[[Sequence[Message]], MaskedSequence]
"""A conversation as token ids; RowError where it has no response token."""


@dataclass(frozen=True)
class FoundRows:
    """Rows of one source or of all targets, by rising hash.

    Attributes:
        rows: the rows.
        read: readable records.
        rejected: unreadable ones.
        unusable: readable ones that were found to be a target's, a repeat, or without a token to
            train on.
    """

    rows: list[Row]
    read: int
    rejected: int
    unusable: int


def target_rows(targets: Sequence[Source], count: int, seed: int) -> FoundRows:
    """Rows of the targets that end in a response, those of lowest hash of each task.

    Args:
        targets: what to read.
        count: rows at most, shared among the tasks as evenly as their rows allow.
        seed: of the hash.

    Raises:
        ConfigError: none has a response.
    """
    by_task: dict[str, dict[str, Row]] = {}
    read = rejected = unusable = 0
    for target in targets:
        for row in iter_rows(target, IngestSettings(max_chars=None)):
            if not isinstance(row, Row):
                rejected += 1
                continue
            read += 1
            if response(row.messages) and row.task is not None:
                by_task.setdefault(row.task, {})[row.id] = row
            else:
                unusable += 1
    if not by_task:
        raise ConfigError(
            f"targets: none of {read} rows ends in a response, whose loss could be measured; "
            "name targets with answers"
        )
    taken: list[Row] = []
    for place, task in enumerate(sorted(by_task, key=lambda name: (len(by_task[name]), name))):
        share = (count - len(taken)) // (len(by_task) - place)
        keyed = by_task[task].values()
        taken += heapq.nsmallest(max(share, 1), keyed, key=lambda row: key_hash(row.id, seed))
    return FoundRows(
        sorted(taken, key=lambda row: key_hash(row.id, seed)), read, rejected, unusable
    )


def source_rows(
    source: Source, count: int, seed: int, taken: set[str], usable: Callable[[Row], bool]
) -> FoundRows:
    """A source's usable rows of lowest hash, each once, none of a target's prompt.

    Args:
        source: what to read.
        count: rows at most.
        seed: of the hash.
        taken: groups (prompts) of the target rows.
        usable: whether a row has a token to train on; asked only of rows that would be kept.

    Raises:
        ConfigError: it holds no row, or too many records that are none.
    """
    best: dict[int, Row] = {}
    highest: list[int] = []
    seen: set[int] = set()
    read = rejected = unusable = 0
    for row in iter_rows(source, IngestSettings(max_chars=None)):
        if not isinstance(row, Row):
            rejected += 1
            continue
        read += 1
        key = key_hash(row.id, seed)
        if row.group in taken or key in seen or not response(row.messages):
            unusable += 1
            continue
        seen.add(key)
        if len(best) < count or key < -highest[0]:
            if not usable(row):
                unusable += 1
                continue
            best[key] = row
            heapq.heappush(highest, -key)
            if len(best) > count:
                del best[-heapq.heappop(highest)]
    check_mostly_read(source, read, rejected)
    return FoundRows([best[key] for key in sorted(best)], read, rejected, unusable)


def sequence_table(rows: Sequence[Row], sequenced: Sequenced) -> pa.Table:
    """Ids of the rows that have a response token, in order: columns id, ids, keep, task."""
    found = []
    for row in rows:
        try:
            sequence = sequenced(row.messages)
        except RowError:
            continue
        found.append((row.id, sequence.ids, sequence.keep, row.task))
    names = ("id", "ids", "keep", "task")
    kinds = (pa.string(), pa.list_(pa.int32()), pa.list_(pa.bool_()), pa.string())
    columns = list(zip(*found, strict=True)) or [()] * 4
    return pa.table(
        {
            name: pa.array(list(column), kind)
            for name, column, kind in zip(names, columns, kinds, strict=True)
        }
    )


def sequences_of(table: pa.Table) -> list[MaskedSequence]:
    """The rows of a `sequence_table`."""
    ids = table["ids"].combine_chunks()
    ends = ids.offsets.to_numpy()
    values = ids.values.to_numpy()
    keep = table["keep"].combine_chunks().values.to_numpy(zero_copy_only=False)
    return [
        MaskedSequence(values[a:b].tolist(), keep[a:b].tolist()) for a, b in pairwise(ends.tolist())
    ]


def training_rows(store: Store, counts: Mapping[str, int], seed: int) -> list[MaskedSequence]:
    """So many first rows of each source, in one order that the seed alone decides."""
    keyed: list[tuple[int, MaskedSequence]] = []
    for name, count in counts.items():
        if count:
            table = store.read_table(f"pool/{name}.parquet").slice(0, count)
            # The order of the pool is that of one seed; mixing takes another.
            keys = (key_hash(row, seed + 1) for row in table["id"].to_pylist())
            keyed += zip(keys, sequences_of(table.combine_chunks()), strict=True)
    return [sequence for _, sequence in sorted(keyed, key=lambda pair: pair[0])]


def tasks_of(table: pa.Table) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the tasks, sorted, and the number of each row's."""
    names = table["task"].to_pylist()
    tasks = sorted(set(names))
    return tasks, np.array([tasks.index(name) for name in names], np.int64)


def texts_of(rows: Sequence[Row]) -> Iterator[str]:
    """Contents of all turns."""
    return (turn["content"] for row in rows for turn in row.messages)
