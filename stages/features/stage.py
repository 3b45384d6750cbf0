"""The features stage: how alike a row and the targets are in what they activate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from stages.base import Columns, EngineSpec
from stages.dictionary.settings import DictionarySettings
from stages.engines import FeatureReader, MaskedSequence
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import RowError
from stages.features.settings import FeaturesSettings
from stages.features.tokens import masked_sequence
from stages.rows import LABEL, OK, status_field
from stages.storage import Store

_ADDS = pa.schema(
    [
        ("similarity", pa.float32()),
        ("similarity_by_task", pa.list_(pa.float32())),
        ("nearest_task", LABEL),
        ("tokens", pa.int32()),
        ("features_truncated", pa.bool_()),
        status_field("features"),
    ]
)


class FeaturesStage:
    """Generalised Jaccard similarity of mean-pooled sparse codes to each task's prototype.

    Source: MoNA (arXiv 2503.15573), Eqs. 7-9.
    """

    name = "features"
    version = 2
    on_targets = True

    def __init__(
        self,
        settings: FeaturesSettings,
        dictionary: DictionarySettings,
        models: Mapping[str, ModelSettings],
    ) -> None:
        """Keep the settings, and the layer that the dictionary was trained on."""
        self.settings = settings
        self._student = models[settings.student]
        self._layer = dictionary.layer if settings.layer is None else settings.layer

    def columns(self) -> Columns:
        """Reads the text that stands after reflection."""
        return Columns(("id", "effective_messages"), _ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The student's activations."""
        return {"student": EngineSpec("reader", self.settings.student, self._student)}

    def artifacts(self) -> tuple[str, ...]:
        """The dictionary."""
        return ("dictionary",)

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Similarities of every row, in order."""
        tokenizer = cached_tokenizer(self._student)
        sequences: list[MaskedSequence] = []
        sizes: list[int] = []
        records: list[dict[str, Any]] = []
        for messages in rows["effective_messages"].to_pylist():
            try:
                sequence = masked_sequence(
                    tokenizer, messages, self.settings.part, self._student.max_length
                )
            except RowError as error:
                records.append({"features_status": f"failed: {error}"})
                continue
            sequences.append(sequence)
            sizes.append(len(sequence.ids))
            records.append({"features_status": OK, "tokens": sum(sequence.keep)})
        tasks = [str(name) for name in artifacts["dictionary"].read_json("tasks.json")]
        reader: FeatureReader = engines["student"]
        scores = iter(
            zip(
                await reader.similarities(sequences, self._layer, artifacts["dictionary"].url),
                sizes,
                strict=True,
            )
        )
        for record in records:
            if record["features_status"] == OK:
                by_task, size = next(scores)
                record |= {
                    "similarity": float(getattr(by_task, self.settings.aggregate)()),
                    "similarity_by_task": by_task.tolist(),
                    "nearest_task": tasks[int(by_task.argmax())],
                    "features_truncated": size >= self._student.max_length,
                }
        return pa.Table.from_pylist(records, schema=_ADDS)
