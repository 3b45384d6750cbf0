"""The fit stage of the baselines: vectors and words of the target rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.base import NO_ARTIFACTS, Artifact, Columns, EngineSpec, ShardedColumns
from stages.baselines.artifact import TargetSide, target_files, unit_rows
from stages.baselines.bm25 import WordCounts, word_counts, words_of
from stages.baselines.readers import Readers
from stages.baselines.settings import BaselineTargetSettings, Score
from stages.errors import RowError, StageError
from stages.rows import Message
from stages.storage import Store


class BaselineTargetsStage:
    """Reads the target rows as the baselines will read the rows, and counts the rows' words."""

    name = "baseline_targets"
    version = 1
    on_targets = True

    def __init__(self, readers: Readers) -> None:
        """Keep how rows are read."""
        self.settings: BaselineTargetSettings = readers.target_settings
        self._readers = readers

    def columns(self) -> Columns:
        """Reads the text that stands after reflection."""
        return Columns(("id", "effective_messages"), pa.schema([]))

    def engines(self) -> Mapping[str, EngineSpec]:
        """Those that the scores read with."""
        return self._readers.engines(embedder=True)

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def fit(
        self,
        columns: ShardedColumns,
        targets: ShardedColumns,
        engines: Mapping[str, Any],
        artifacts: Mapping[str, Store] = NO_ARTIFACTS,
    ) -> Artifact:
        """Unit vectors of the target rows, their words, and the counts of words over all rows.

        Raises:
            StageError: a score can read no target row.
        """
        rows = [
            (messages, str(task))
            for table in targets.iter(("effective_messages", "task"))
            for messages, task in zip(*(c.to_pylist() for c in table.columns), strict=True)
        ]
        tasks = sorted({task for _, task in rows})
        numbers: dict[str, NDArray[np.int64]] = {}
        vectors: dict[str, NDArray[np.float32]] = {}
        queries: list[list[str]] = []
        for score in self.settings.scores:
            inputs, places = self._inputs(score, [messages for messages, _ in rows])
            if not inputs:
                raise StageError(
                    f"baselines.scores: {score} can read no target row"
                    + ("; gradients need targets with a response" if score == "gradient" else ""),
                    stage=self.name,
                )
            numbers[score] = np.array([tasks.index(rows[i][1]) for i in places], np.int64)
            if score == "bm25":
                queries = words_of(inputs)
            else:
                vectors[score] = unit_rows(await self._readers.vectors(score, inputs, engines))
        counts = self._counted(columns, queries) if "bm25" in self.settings.scores else None
        side = TargetSide(vectors, numbers, queries, counts)
        used = {score: len(of_score) for score, of_score in numbers.items()}
        return Artifact(target_files(side), {"target_rows": len(rows), "used": used})

    def _inputs(
        self, score: Score, rows: Sequence[Sequence[Message]]
    ) -> tuple[list[Any], list[int]]:
        """What a score reads of the rows that it can read, and which these are."""
        inputs: list[Any] = []
        places: list[int] = []
        for place, messages in enumerate(rows):
            try:
                inputs.append(self._readers.input(score, messages))
            except RowError:
                continue
            places.append(place)
        return inputs, places

    def _counted(self, columns: ShardedColumns, queries: Sequence[Sequence[str]]) -> WordCounts:
        """Counts of words over the rows that have text."""
        vocabulary: frozenset[str] = frozenset().union(*queries)
        total = WordCounts(0, 0, Counter())
        for table in columns.iter(("effective_messages",)):
            texts, _ = self._inputs("bm25", table["effective_messages"].to_pylist())
            total = total + word_counts(words_of(texts), vocabulary)
        return total
