"""Which emitted rows are held out for validation: all rows of one prompt on one side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.emission.gather import Gathered
from stages.emission.sample import IntArray
from stages.errors import StageError
from stages.rows import Message, group_id, key_hash

TRAIN, VALIDATION = "train", "validation"


def split_rows(gathered: Gathered, order: IntArray, share: float, seed: int) -> dict[str, IntArray]:
    """Emitted row numbers by split, each in the order written; no split is empty.

    A prompt is held out where its hash falls into the share of all hashes, so that its side depends
    on no other row: what was held out once is never trained on when rows are added. The share of
    the lines is met on average, and a small data set can have no validation split.

    Args:
        gathered: the emitted rows.
        order: emitted row numbers, copies included, int64 [n].
        share: of the prompts to hold out; 0 holds out none.
        seed: the recipe's.

    Raises:
        StageError: all prompts are held out, so that nothing would be left to train on.
    """
    if not share:
        return {TRAIN: order}
    rows = np.unique(order)
    prompts, names = _prompts(gathered, rows)
    held = [key_hash(f"validation:{name}", seed) < share * 2**64 for name in names]
    if all(held):
        raise StageError(
            f"emission.validation: the hashes of all {len(names):,} prompts fall into the share "
            f"{share:g}, so that none would be left to train on; set it to 0, or emit more rows",
            stage="emission",
        )
    out = np.isin(order, rows[np.array(held)[prompts]])
    splits = {TRAIN: order[~out], VALIDATION: order[out]}
    return {split: lines for split, lines in splits.items() if len(lines)}


def prompt_count(gathered: Gathered, order: IntArray) -> int:
    """How many prompts these lines have (one where a rewrite and its original share rows)."""
    return len(_prompts(gathered, np.unique(order))[1]) if len(order) else 0


def prompt_keys(
    messages: Sequence[Message], original: Sequence[Message] | None, tools: str | None
) -> list[str]:
    """Digests of a row's prompt as it was ingested, and of what it was rewritten to."""
    return [group_id(text, tools) for text in (original, messages) if text is not None]


def _prompts(gathered: Gathered, rows: IntArray) -> tuple[IntArray, list[str]]:
    """The prompt's number of every row, and a digest of every prompt as it was ingested.

    A rewritten row is joined to the rows of its old prompt and to those of its new one; of several
    ingested prompts that are joined so, the least digest stands for all.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[str, int] = {}
    ingested: set[str] = set()
    ends: list[tuple[int, int]] = []
    for chunk_rows, table in gathered.chunks:
        nothing = [None] * table.num_rows
        columns = (
            table["effective"].to_pylist(),
            table["original"].to_pylist() if "original" in table.column_names else nothing,
            table["tools"].to_pylist() if "tools" in table.column_names else nothing,
        )
        places = np.searchsorted(rows, chunk_rows)
        for place, row, *texts in zip(places.tolist(), chunk_rows.tolist(), *columns, strict=True):
            if place < len(rows) and rows[place] == row:
                keys = prompt_keys(*texts)
                ingested.add(keys[0])
                ends += [(place, numbers.setdefault(key, len(numbers))) for key in keys]
    edges = np.array(ends, dtype=np.int64)
    size = len(rows) + len(numbers)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], len(rows) + edges[:, 1])), (size, size))
    _, labels = connected_components(graph, directed=False)
    names: dict[int, str] = {}
    for key in sorted(ingested):
        names.setdefault(int(labels[len(rows) + numbers[key]]), key)
    return labels[: len(rows)].astype(np.int64), [names[label] for label in sorted(names)]
