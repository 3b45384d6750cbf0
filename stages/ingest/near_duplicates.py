"""Near duplicates over all shards: sketched and verified in tasks, joined here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from stages.base import Each
from stages.ingest.clusters import Duplicates, candidate_tasks, near_duplicates
from stages.ingest.settings import NearDuplicateSettings
from stages.ingest.sketch import SketchTask, band_names, write_sketch
from stages.sources.settings import Source
from stages.storage import Store

_TASK_ROWS = 65_536
"""Candidates verified in one task, unless more of them hang together: about 2 KB each."""


def source_ranks(sources: Sequence[Source], settings: NearDuplicateSettings) -> dict[str, int]:
    """The order in which sources' rows stay: anchors (below 0), preferred sources, the others."""
    preferred = {name: rank for rank, name in enumerate(settings.prefer)}
    return {
        source.name: -1
        if source.role == "anchor"
        else preferred.get(source.name, len(settings.prefer))
        for source in sources
    }


def found_near_duplicates(
    store: Store,
    parts: Sequence[tuple[str, int]],
    settings: NearDuplicateSettings,
    ranks: Mapping[str, int],
    each: Each,
) -> Duplicates:
    """Rows of some shards that are near duplicates of others.

    The answer depends on the rows and their order alone: not on how they are spread over shards
    and tasks. Holds about 40 bytes a row.

    Args:
        store: holds the shards, and gets a sketch of each.
        parts: names and rows of the shards, in order.
        settings: what is compared, and which row of a cluster stays.
        ranks: of every source (see `source_ranks`).
        each: runs the tasks.
    """
    tasks, first = [], 0
    for number, (part, rows) in enumerate(parts):
        tasks.append(SketchTask(part, first, f"sketch-{number:05d}.parquet"))
        first += rows
    for _ in each(partial(write_sketch, store, settings, ranks), tasks):
        pass
    sketches = [(task.name, task.first) for task in tasks]
    names = [name for name, _ in sketches]
    clusters = candidate_tasks(store, names, first, band_names(settings), _TASK_ROWS)
    return Duplicates.joined(
        list(each(partial(near_duplicates, store, sketches, settings), clusters))
    )
