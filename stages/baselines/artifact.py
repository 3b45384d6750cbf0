"""The targets' side of the baselines, as files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from stages.baselines.bm25 import Bm25, WordCounts
from stages.rows import canonical_json
from stages.storage import Store

_VECTORS = "vectors.safetensors"
_WORDS = "words.json"


@dataclass(frozen=True)
class TargetSide:
    """What rows are compared with, by score.

    Attributes:
        vectors: unit vectors of target rows, float32 [targets, width].
        tasks: number of each target row's task, int64 [targets]; of bm25 too.
        queries: words of each target row, for bm25.
        counts: words of all rows, for bm25; None where it wasn't asked for.
    """

    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    tasks: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    queries: list[list[str]] = field(default_factory=list)
    counts: WordCounts | None = None


def target_files(side: TargetSide) -> dict[str, bytes]:
    """The artifact's files; equal sides give equal bytes."""
    tensors: dict[str, NDArray[Any]] = dict(side.vectors)
    tensors |= {f"{score}_tasks": numbers for score, numbers in side.tasks.items()}
    files = {_VECTORS: save({k: np.ascontiguousarray(v) for k, v in tensors.items()})}
    if side.counts is not None:
        words: Mapping[str, Any] = {
            "queries": side.queries,
            "rows": side.counts.rows,
            "words": side.counts.words,
            "having": side.counts.having,
        }
        files[_WORDS] = canonical_json(words).encode()
    return files


def read_targets(store: Store) -> tuple[TargetSide, Bm25 | None]:
    """What rows are compared with, and the scorer of their words where there is one."""
    tensors = load(store.read_bytes(_VECTORS))
    side = TargetSide(
        {name: value for name, value in tensors.items() if not name.endswith("_tasks")},
        {
            name.removesuffix("_tasks"): value
            for name, value in tensors.items()
            if name.endswith("_tasks")
        },
    )
    if not store.exists(_WORDS):
        return side, None
    words = store.read_json(_WORDS)
    counts = WordCounts(words["rows"], words["words"], Counter(words["having"]))
    return side, Bm25(words["queries"], counts)


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of length 1; a zero vector stays, and is at right angles to all others."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, np.finfo(np.float32).tiny), np.float32)
