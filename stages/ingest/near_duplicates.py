"""Near duplicates over all shards: sketched and verified in tasks, joined here."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from stages.base import Each
from stages.ingest.candidates import candidate_tasks
from stages.ingest.clusters import Duplicates, near_duplicates
from stages.ingest.parse import Reject
from stages.ingest.settings import NearDuplicateSettings
from stages.ingest.sketch import SketchTask, band_names, write_sketch
from stages.sources.readers import shown
from stages.sources.settings import Source
from stages.storage import Store
from stages.words import IntArray

_TASK_ROWS = 65_536
"""Candidates verified in one task, unless more of them hang together: about 2 KB each."""

_REJECTED = ["id", "source", "tools", "answer", "file", "record", "end_markers"]
"""Columns of a row, beside its messages, that its reject or the report has something of."""


def source_ranks(
    sources: Sequence[Source], prefer: Sequence[str], blocked: Collection[str]
) -> dict[str, int]:
    """The order in which sources' rows stay.

    Anchors (below 0), preferred sources, the others; then, in that order, the blocked ones.
    """
    preferred = {name: rank for rank, name in enumerate(prefer)}
    behind = len(prefer) + 1
    return {
        source.name: -1
        if source.role == "anchor"
        else preferred.get(source.name, len(prefer)) + behind * (source.name in blocked)
        for source in sources
    }


def found_near_duplicates(
    store: Store,
    parts: Iterable[tuple[str, int]],
    settings: NearDuplicateSettings,
    ranks: Mapping[str, int],
    each: Each,
) -> Duplicates:
    """Rows of some shards that are near duplicates of others.

    The answer depends on the rows and their order alone: not on how they are spread over shards
    and tasks. Holds about 70 bytes a row.

    Args:
        store: holds the shards, and gets a sketch of each.
        parts: names and rows of the shards, in order; each is sketched as soon as it is named.
        settings: what is compared, and which row of a cluster stays.
        ranks: of every source (see `source_ranks`).
        each: runs the tasks.
    """
    sketches: list[tuple[str, int]] = []
    total = 0

    def tasks() -> Iterator[SketchTask]:
        nonlocal total
        for number, (part, rows) in enumerate(parts):
            sketches.append((f"sketch-{number:05d}.arrow", total))
            yield SketchTask(part, total, sketches[-1][0])
            total += rows

    for _ in each(partial(write_sketch, store, settings, ranks), tasks()):
        pass
    names = [name for name, _ in sketches]
    clusters = candidate_tasks(store, names, total, band_names(settings), _TASK_ROWS)
    return Duplicates.joined(
        list(each(partial(near_duplicates, store, sketches, settings), clusters))
    )


class Dropped(NamedTuple):
    """A near duplicate as a reject, the source of the row that stays, and what it counted in."""

    reject: Reject
    of: str
    end_markers: bool
    answered: bool


def parted_rows(
    store: Store, parts: Sequence[tuple[str, int]], found: Duplicates
) -> Iterator[tuple[pa.Table, list[Dropped]]]:
    """For each shard its rows that stay, sources as plain strings, and its near duplicates."""
    stay = _named_rows(store, parts, np.unique(found.kept))
    start = 0
    for part, rows in parts:
        table = store.read_arrow(part)
        place = table.schema.get_field_index("source")
        table = table.set_column(place, "source", table["source"].cast(pa.string()))
        first, end = np.searchsorted(found.rows, (start, start + rows))
        places = found.rows[first:end] - start
        stays = np.ones(rows, dtype=bool)
        stays[places] = False
        gone = table.take(pa.array(places))
        dropped = [
            _dropped(row, turns, *stay[kept], similarity)
            for row, turns, kept, similarity in zip(
                gone.select(_REJECTED).to_pylist(),
                _turns(gone["messages"].combine_chunks()),
                found.kept[first:end].tolist(),
                found.similarity[first:end].tolist(),
                strict=True,
            )
        ]
        yield table.filter(pa.array(stays)), dropped
        start += rows


def _named_rows(
    store: Store, parts: Sequence[tuple[str, int]], numbers: IntArray
) -> dict[int, tuple[str, str]]:
    """Id and source of the rows with these numbers over all shards, sorted."""
    found: dict[int, tuple[str, str]] = {}
    start = 0
    for part, rows in parts:
        first, end = np.searchsorted(numbers, (start, start + rows))
        if first < end:
            table = store.read_arrow(part, ["id", "source"])
            mine = table.take(pa.array(numbers[first:end] - start))
            named = zip(mine["id"].to_pylist(), mine["source"].to_pylist(), strict=True)
            found.update(zip(numbers[first:end].tolist(), named, strict=True))
        start += rows
    return found


def _turns(messages: pa.ListArray) -> list[list[dict[str, Any]]]:
    """Conversations' turns, null fields left out."""
    # Arrow makes Python's dictionaries of a struct in ten times what its columns take.
    flat = messages.flatten()
    filled = [field.name for field in flat.type if flat.field(field.name).null_count < len(flat)]
    turns = [
        {name: value for name, value in zip(filled, values, strict=True) if value is not None}
        for values in zip(*(flat.field(name).to_pylist() for name in filled), strict=True)
    ]
    offsets = (messages.offsets.to_numpy() - messages.offsets[0].as_py()).tolist()
    return [turns[start:end] for start, end in pairwise(offsets)]


def _dropped(
    row: Mapping[str, Any], turns: list[dict[str, Any]], kept: str, of: str, similarity: float
) -> Dropped:
    # The record's own text isn't held any more: the reject shows the row as JSON.
    said: dict[str, Any] = {"messages": turns}
    if row["tools"] is not None:
        said["tools"] = row["tools"]
    reject = Reject(
        source=row["source"],
        file=row["file"],
        record=row["record"],
        reason=f"near_duplicate: of {kept} (Jaccard {math.floor(100 * similarity) / 100:.2f})",
        raw=shown(orjson.dumps(said, option=orjson.OPT_SORT_KEYS).decode()),
        id=row["id"],
        kept=kept,
    )
    return Dropped(reject, of, row["end_markers"], row["answer"] is not None)
