"""The concepts stage: labels for training that predicts concepts beside tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from stages.base import Columns, EngineSpec
from stages.concepts.settings import ConceptsSettings
from stages.dictionary.checks import check_student
from stages.dictionary.settings import DictionarySettings
from stages.engines import FeatureReader, MaskedSequence
from stages.engines.attention import caps_scores
from stages.engines.model_files import cached_tokenizer, text_config
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, RowError
from stages.features.tokens import masked_sequence
from stages.rows import OK, status_field
from stages.storage import Store

_ADDS = pa.schema(
    [
        ("concept_input_ids", pa.list_(pa.int32())),
        ("concept_ids", pa.list_(pa.list_(pa.int32()))),
        ("concept_scores", pa.list_(pa.list_(pa.float32()))),
        ("concept_row_ids", pa.list_(pa.int32())),
        ("concept_row_scores", pa.list_(pa.float32())),
        status_field("concepts"),
    ]
)


class ConceptsStage:
    """The latents that bear most on what comes after each token, by activation times gradient.

    Source: CoCoMix (arXiv 2502.08524), section 2.1.
    """

    name = "concepts"
    version = 1
    on_targets = False

    def __init__(
        self,
        settings: ConceptsSettings,
        dictionary: DictionarySettings,
        models: Mapping[str, ModelSettings],
    ) -> None:
        """Keep the settings, and the layer that the dictionary reads."""
        self.settings = settings
        self._student = models[settings.student]
        self._layer = dictionary.layer
        self._dictionary, self._models = dictionary, models

    def columns(self) -> Columns:
        """Reads the text that stands after reflection."""
        return Columns(("id", "effective_messages"), _ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The student, forward and backward."""
        return {"student": EngineSpec("reader", self.settings.student, self._student)}

    def artifacts(self) -> tuple[str, ...]:
        """The dictionary."""
        return ("dictionary",)

    def check(self) -> None:
        """Refuse a student that the dictionary wasn't made for, or that two streams can't pass.

        Raises:
            ConfigError: naming the model, and what is wrong with it.
        """
        name = self.settings.student
        check_student("concepts", name, self._dictionary, self._models)
        if caps_scores(text_config(self._student)):
            raise ConfigError(
                f"concepts.student is {name} ({self._student.model}), whose attention bounds its "
                "scores (attn_logit_softcapping); concepts aren't there for such models: leave "
                "the section out, or use another model"
            )

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Concepts of every row and of its tokens, in order."""
        tokenizer, window = cached_tokenizer(self._student), self._student.max_length
        found: list[MaskedSequence | RowError] = []
        for messages in rows["effective_messages"].to_pylist():
            try:
                found.append(masked_sequence(tokenizer, messages, self.settings.part, window))
            except RowError as error:
                found.append(error)
        sequences = [one for one in found if isinstance(one, MaskedSequence)]
        reader: FeatureReader = engines["student"]
        made = iter(
            await reader.concepts(
                sequences, self._layer, artifacts["dictionary"].url, self.settings
            )
        )
        records: list[dict[str, Any]] = []
        for one in found:
            if isinstance(one, RowError):
                records.append({"concepts_status": f"failed: {one}"})
                continue
            concepts = next(made)
            records.append(
                {
                    "concept_input_ids": list(one.ids),
                    "concept_ids": concepts.ids.tolist(),
                    "concept_scores": concepts.scores.tolist(),
                    "concept_row_ids": concepts.row_ids,
                    "concept_row_scores": concepts.row_scores,
                    "concepts_status": OK,
                }
            )
        return pa.Table.from_pylist(records, schema=_ADDS)
