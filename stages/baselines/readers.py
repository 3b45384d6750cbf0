"""How each score reads a text: the same for rows and for target rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.base import EngineSpec
from stages.baselines.settings import BaselinesSettings, BaselineTargetSettings, Score
from stages.dictionary.checks import check_layer
from stages.dictionary.settings import Part
from stages.embedding.settings import EmbeddingSettings
from stages.embedding.stage import embedded_text
from stages.engines import ScoreRequest
from stages.engines.model_files import cached_tokenizer, decoder_shape
from stages.engines.settings import ModelSettings
from stages.engines.tokens import chat_tokens
from stages.errors import ConfigError, RowError
from stages.features.tokens import masked_sequence
from stages.rows import Message


class Readers:
    """Inputs of a conversation for each score, and vectors of these inputs."""

    def __init__(
        self,
        settings: BaselinesSettings,
        embedding: EmbeddingSettings | None,
        models: Mapping[str, ModelSettings],
        seed: int,
    ) -> None:
        """Look up the models.

        Args:
            settings: the recipe's section.
            embedding: the section whose vectors `embedding` compares.
            models: the recipe's models by name.
            seed: of the adapters and the projection.

        Raises:
            ConfigError: a score needs a model or a section that the recipe hasn't.
        """
        if "embedding" in settings.scores and embedding is None:
            raise ConfigError(
                "baselines.scores: embedding compares sentence vectors; add a section embedding"
            )
        self._embedding_part: Part = "both"
        if embedding and embedding.part != "apart":
            self._embedding_part = embedding.part
        elif "embedding" in settings.scores:
            raise ConfigError(
                "baselines.scores: embedding compares one vector a text, and embedding.part: apart "
                "makes two of it; use another part, or leave this score out"
            )
        if settings.of_student and settings.student not in models:
            raise ConfigError(
                f"baselines.scores: {settings.of_student[0]} needs the model {settings.student!r}, "
                f"which `models` doesn't declare (declared: {', '.join(sorted(models)) or 'none'})"
            )
        self._settings = settings
        self._embedding = embedding
        self._models = models
        self._seed = seed
        for score in ("hidden", "gradient"):
            if score in settings.scores and self.student.engine != "transformers":
                raise ConfigError(
                    f"baselines.scores: {score} needs engine: transformers, and models."
                    f"{settings.student} has {self.student.engine}; declare the model a second "
                    "time with engine: transformers, and name that one in baselines.student"
                )

    @property
    def student(self) -> ModelSettings:
        """The model whose states and gradients are read."""
        return self._models[self._settings.student]

    @property
    def target_settings(self) -> BaselineTargetSettings:
        """What the targets' side is a function of."""
        settings = self._settings
        of_model = {"hidden", "gradient"} & set(settings.scores)
        return BaselineTargetSettings(
            scores=settings.to_targets,
            student=settings.student if of_model else None,
            layer=settings.layer if "hidden" in settings.scores else None,
            part=settings.part if {"bm25", "hidden"} & set(settings.scores) else None,
            rank=settings.rank if "gradient" in settings.scores else None,
            dimensions=settings.dimensions if "gradient" in settings.scores else None,
            embedded_part=self._embedding.part
            if self._embedding and "embedding" in settings.scores
            else None,
        )

    def check(self) -> None:
        """Refuse a block that the student doesn't have.

        Raises:
            ConfigError: the layer is out of range, or the student's configuration can't be read.
        """
        layer = self._settings.layer
        if layer is not None and "hidden" in self._settings.scores:
            blocks, _ = decoder_shape(self.student)
            check_layer("baselines.layer", layer, blocks, self.student.model)

    def engines(self, *, embedder: bool) -> dict[str, EngineSpec]:
        """The engines of the chosen scores; rows have their sentence vectors already."""
        specs: dict[str, EngineSpec] = {}
        if "hidden" in self._settings.scores:
            specs["reader"] = EngineSpec("reader", self._settings.student, self.student)
        if "gradient" in self._settings.scores:
            specs["scorer"] = EngineSpec("scorer", self._settings.student, self.student)
        if embedder and self._embedding and "embedding" in self._settings.scores:
            name = self._embedding.encoder
            specs["encoder"] = EngineSpec("embedder", name, self._models[name])
        return specs

    def input(self, score: Score, messages: Sequence[Message]) -> Any:
        """What a score reads of a conversation.

        Raises:
            RowError: nothing of it.
        """
        if score == "hidden":
            tokenizer, window = cached_tokenizer(self.student), self.student.max_length
            return masked_sequence(tokenizer, messages, self._settings.part, window)
        if score == "gradient":
            return self._response_request(messages)
        if score == "longest":
            return len(chat_tokens(cached_tokenizer(self.student), messages).response_ids)
        part = self._settings.part
        if score == "embedding":
            part = self._embedding_part
        text = embedded_text(messages, part)
        if not text:
            raise RowError(f"no_text: the row has no {part}")
        return text

    async def vectors(
        self, score: Score, inputs: Sequence[Any], engines: Mapping[str, Any]
    ) -> NDArray[np.float32]:
        """Vectors of inputs of `hidden`, `gradient` or `embedding`, float32 [n, width]."""
        if score == "hidden":
            states: NDArray[np.float32] = await engines["reader"].mean_states(
                inputs, self._settings.layer
            )
            return states
        if score == "gradient":
            settings = self._settings
            gradients: NDArray[np.float32] = await engines["scorer"].projected_gradients(
                inputs, settings.rank, settings.dimensions, self._seed
            )
            return gradients
        embedded: NDArray[np.float32] = (await engines["encoder"].embed(inputs)).vectors
        return embedded

    def _response_request(self, messages: Sequence[Message]) -> ScoreRequest:
        """The response after its prompt under the chat template, cut at the student's window."""
        tokens = chat_tokens(cached_tokenizer(self.student), messages)
        room = self.student.max_length - len(tokens.prompt_ids)
        target = tokens.response_ids[: max(room, 0)]
        if not target:
            raise RowError(f"no_response: no response token within {self.student.max_length}")
        return ScoreRequest(tokens.prompt_ids, target)
