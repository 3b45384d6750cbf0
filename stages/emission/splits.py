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
    """Emitted row numbers by split, each in the order written.

    Prompts are held out in the order of a hash until their lines make up the share (rounded, at
    least one); a prompt that would pass it is left in training, unless none fits.

    Args:
        gathered: the emitted rows.
        order: emitted row numbers, copies included, int64 [n].
        share: of the lines to hold out; 0 holds out none.
        seed: the recipe's.

    Raises:
        StageError: all lines share one prompt, so that nothing would be left to train on.
    """
    if not share:
        return {TRAIN: order}
    rows, lines = np.unique(order, return_counts=True)
    prompts, hashes = _prompts(gathered, rows, seed)
    sizes = np.bincount(prompts, weights=lines).astype(np.int64)
    wanted = max(1, round(share * len(order)))
    held: list[int] = []
    total = 0
    for prompt in np.argsort(hashes, kind="stable").tolist():
        if total + sizes[prompt] <= wanted:
            held.append(prompt)
            total += int(sizes[prompt])
    if not held:
        held = [min(range(len(sizes)), key=lambda prompt: (sizes[prompt], hashes[prompt]))]
    if len(held) == len(sizes):
        raise StageError(
            f"emission.validation: all {len(order):,} lines share one prompt, so that none would "
            "be left to train on; set it to 0",
            stage="emission",
        )
    out = np.isin(order, rows[np.isin(prompts, held)])
    return {TRAIN: order[~out], VALIDATION: order[out]}


def prompt_count(gathered: Gathered, order: IntArray) -> int:
    """How many prompts these lines have (one where a rewrite and its original share rows)."""
    return len(_prompts(gathered, np.unique(order), 0)[1]) if len(order) else 0


def prompt_keys(
    messages: Sequence[Message], original: Sequence[Message] | None, tools: str | None
) -> set[str]:
    """Digests of a row's prompt, and of what it was before it was rewritten."""
    keys = {group_id(messages, tools)}
    if original is not None:
        keys.add(group_id(original, tools))
    return keys


def _prompts(gathered: Gathered, rows: IntArray, seed: int) -> tuple[IntArray, IntArray]:
    """The prompt's number of every row, and a hash of every prompt (the least of its keys').

    A rewritten row is joined to the rows of its old prompt and to those of its new one.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[str, int] = {}
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
                for key in prompt_keys(*texts):
                    ends.append((place, numbers.setdefault(key, len(numbers))))
    edges = np.array(ends, dtype=np.int64)
    size = len(rows) + len(numbers)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], len(rows) + edges[:, 1])), (size, size))
    count, labels = connected_components(graph, directed=False)
    hashes = np.full(count, np.iinfo(np.uint64).max, dtype=np.uint64)
    keyed = np.array([key_hash(f"validation:{key}", seed) for key in numbers], dtype=np.uint64)
    np.minimum.at(hashes, labels[len(rows) :], keyed)
    return labels[: len(rows)].astype(np.int64), hashes
