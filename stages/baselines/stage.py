"""The baselines stage: scores that any selection should be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.base import Columns, EngineSpec
from stages.baselines.artifact import read_targets, unit_rows
from stages.baselines.bm25 import words_of
from stages.baselines.readers import Readers
from stages.baselines.settings import BaselinesSettings, Score
from stages.errors import RowError
from stages.rows import OK, key_hash, row_id, status_field
from stages.storage import Store

COLUMNS: Mapping[Score, pa.Field] = {
    "random": pa.field("random", pa.float64()),
    "longest": pa.field("longest", pa.int32()),
    "bm25": pa.field("bm25", pa.float32()),
    "embedding": pa.field("embedding_similarity", pa.float32()),
    "hidden": pa.field("hidden_similarity", pa.float32()),
    "gradient": pa.field("gradient_similarity", pa.float32()),
}
"""The column of each score."""


class BaselinesStage:
    """Adds a column for each of the chosen scores."""

    name = "baselines"
    version = 1
    on_targets = False

    def __init__(self, settings: BaselinesSettings, readers: Readers, seed: int) -> None:
        """Keep the settings, how rows are read, and the seed."""
        self.settings = settings
        self._readers = readers
        self._seed = seed
        lists = settings.to_targets if settings.by_target else ()
        self._adds = pa.schema(
            [
                *(COLUMNS[score] for score in settings.scores),
                *(pa.field(f"{score}_by_target", pa.list_(pa.float32())) for score in lists),
                status_field("baselines"),
            ]
        )

    def columns(self) -> Columns:
        """Reads the text that stands after reflection, and its sentence vector."""
        vector = ("embedding",) if "embedding" in self.settings.scores else ()
        return Columns(("id", "effective_messages", *vector), self._adds)

    def engines(self) -> Mapping[str, EngineSpec]:
        """Those that the scores read with."""
        return self._readers.engines(embedder=False)

    def artifacts(self) -> tuple[str, ...]:
        """The targets' side, where a score has one."""
        return ("baseline_targets",) if self.settings.to_targets else ()

    def check(self) -> None:
        """Refuse a block that the student doesn't have.

        Raises:
            ConfigError: naming the layer.
        """
        self._readers.check()

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Scores of every row that all of them can read, in order."""
        inputs: dict[Score, list[Any]] = {score: [] for score in self.settings.scores}
        records: list[dict[str, Any]] = []
        for row in rows.to_pylist():
            try:
                found = {score: self._input(score, row) for score in self.settings.scores}
            except RowError as error:
                records.append({"baselines_status": f"failed: {error}"})
                continue
            records.append({"baselines_status": OK})
            for score, value in found.items():
                inputs[score].append(value)
        scored = [record for record in records if record["baselines_status"] == OK]
        for score in ("random", "longest"):
            for record, value in zip(scored, inputs.get(score, ()), strict=False):
                record[COLUMNS[score].name] = value
        if self.settings.to_targets and scored:
            await self._compare(scored, inputs, engines, artifacts["baseline_targets"])
        return pa.Table.from_pylist(records, schema=self._adds)

    def _input(self, score: Score, row: Mapping[str, Any]) -> Any:
        messages = row["effective_messages"]
        if score == "random":
            # Of the text, not of the id: a row's columns are a function of its text.
            return key_hash(f"random:{row_id(messages, None)}", self._seed) / 2**64
        if score == "embedding":
            if row["embedding"] is None:
                raise RowError("no_embedding: the row has no sentence vector")
            return row["embedding"]
        return self._readers.input(score, messages)

    async def _compare(
        self,
        records: list[dict[str, Any]],
        inputs: Mapping[Score, list[Any]],
        engines: Mapping[str, Any],
        store: Store,
    ) -> None:
        """Add each row's scores against the targets to its record."""
        side, bm25 = read_targets(store)
        for score in self.settings.to_targets:
            if score == "bm25":
                assert bm25 is not None
                by_target = bm25.scores(words_of(inputs[score]))
            else:
                vectors = (
                    np.array(inputs[score], np.float32)
                    if score == "embedding"
                    else await self._readers.vectors(score, inputs[score], engines)
                )
                by_target = unit_rows(vectors) @ side.vectors[score].T
            best = best_task(by_target, side.tasks[score], self.settings.target_rows)
            for record, value, each in zip(records, best.tolist(), by_target, strict=True):
                record[COLUMNS[score].name] = value
                if self.settings.by_target:
                    record[f"{score}_by_target"] = each


def best_task(
    by_target: NDArray[np.float32], tasks: NDArray[np.int64], target_rows: str
) -> NDArray[np.float32]:
    """The largest, over tasks, of the largest (or mean) score over the task's rows, float32 [n].

    Args:
        by_target: float32 [n, targets].
        tasks: of each target, int64 [targets].
        target_rows: `max` or `mean`.
    """
    fold = np.max if target_rows == "max" else np.mean
    scores = [fold(by_target[:, tasks == task], axis=1) for task in np.unique(tasks)]
    best: NDArray[np.float32] = np.max(scores, axis=0)
    return best
