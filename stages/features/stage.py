"""The features stage: how alike a row and the targets are in what they activate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from stages.base import Columns, EngineSpec
from stages.dictionary.checks import check_student
from stages.dictionary.settings import DictionarySettings
from stages.engines import FeatureReader, MaskedSequence
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import RowError
from stages.features.settings import FeaturesSettings
from stages.features.tokens import masked_sequence
from stages.rows import LABEL, OK, status_field
from stages.storage import Store

_ADDS = (
    pa.field("similarity", pa.float32()),
    pa.field("similarity_by_task", pa.list_(pa.float32())),
    pa.field("nearest_task", LABEL),
    pa.field("tokens", pa.int32()),
    pa.field("features_truncated", pa.bool_()),
    status_field("features"),
)
_BY_TARGET = pa.field("similarity_by_target", pa.list_(pa.float32()))
_ACTIVE = pa.field("active_features", pa.list_(pa.int32()))


class FeaturesStage:
    """Similarity of each row's pooled sparse code to the targets', and its active latents.

    By default the generalised Jaccard similarity of mean-pooled codes to each task's prototype.
    Source: MoNA (arXiv 2503.15573), Eqs. 7-9.
    """

    name = "features"
    version = 3
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
        self._layer = dictionary.layer
        self._dictionary, self._models = dictionary, models
        asked = [(_BY_TARGET, settings.by_target), (_ACTIVE, settings.active_above is not None)]
        self._adds = pa.schema([*_ADDS[:-1], *(f for f, wanted in asked if wanted), _ADDS[-1]])

    def columns(self) -> Columns:
        """Reads the text that stands after reflection."""
        return Columns(("id", "effective_messages"), self._adds)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The student's activations."""
        return {"student": EngineSpec("reader", self.settings.student, self._student)}

    def artifacts(self) -> tuple[str, ...]:
        """The dictionary, and what the targets activate."""
        return ("dictionary", "prototypes")

    def check(self) -> None:
        """Refuse a student whose states the dictionary wasn't made for.

        Raises:
            ConfigError: it is another model than the dictionary's, or has no such block.
        """
        check_student("features", self.settings.student, self._dictionary, self._models)

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Similarities of every row, in order."""
        tokenizer = cached_tokenizer(self._student)
        sequences: list[MaskedSequence] = []
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
            records.append(
                {
                    "features_status": OK,
                    "tokens": sum(sequence.keep),
                    "features_truncated": sequence.truncated,
                }
            )
        tasks = [str(name) for name in artifacts["prototypes"].read_json("tasks.json")]
        reader: FeatureReader = engines["student"]
        dictionary, prototypes = (artifacts[name].url for name in self.artifacts())
        found = await reader.features(sequences, self._layer, dictionary, prototypes, self.settings)
        read = [record for record in records if record["features_status"] == OK]
        for place, (record, by_task) in enumerate(zip(read, found.by_task, strict=True)):
            record |= {
                "similarity": float(getattr(by_task, self.settings.aggregate)()),
                "similarity_by_task": by_task.tolist(),
                "nearest_task": tasks[int(by_task.argmax())],
            }
            if found.by_target is not None:
                record["similarity_by_target"] = found.by_target[place]
            if found.active is not None:
                record["active_features"] = found.active[place]
        return pa.Table.from_pylist(records, schema=self._adds)
