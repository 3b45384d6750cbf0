"""The embedding stage: one L2-normalised sentence vector a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.base import Columns, EngineSpec
from stages.dictionary.settings import Part
from stages.embedding.settings import EmbeddingSettings
from stages.engines.settings import ModelSettings
from stages.rows import OK, Message, prompt, response, status_field
from stages.storage import Store

_ADDS = pa.schema(
    [
        ("embedding", pa.list_(pa.float32())),
        ("embedding_chunks", pa.int32()),
        status_field("embedding"),
    ]
)


class EmbeddingStage:
    """Embeds the text that stands after reflection; long texts in chunks, averaged."""

    name = "embedding"
    version = 1
    on_targets = True

    def __init__(self, settings: EmbeddingSettings, models: Mapping[str, ModelSettings]) -> None:
        """Keep the settings and the encoder's."""
        self.settings = settings
        self._encoder = models[settings.encoder]

    def columns(self) -> Columns:
        """Reads the text that stands after reflection."""
        return Columns(("id", "effective_messages"), _ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The sentence encoder."""
        return {"encoder": EngineSpec("embedder", self.settings.encoder, self._encoder)}

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """A vector for every row that has text of the wanted part."""
        settings = self.settings
        parts: tuple[Part, ...] = (
            ("prompt", "response") if settings.part == "apart" else (settings.part,)
        )
        conversations = rows["effective_messages"].to_pylist()
        texts = [[embedded_text(messages, part) for part in parts] for messages in conversations]
        embedded = await engines["encoder"].embed([t for mine in texts if all(mine) for t in mine])
        vectors = joined(embedded.vectors, len(parts), settings.prompt_weight)
        chunks = embedded.chunks.reshape(-1, len(parts)).sum(axis=1)
        pairs = iter(zip(vectors, chunks.tolist(), strict=True))
        records: list[dict[str, Any]] = []
        for mine in texts:
            if not all(mine):
                missing = parts[[bool(text) for text in mine].index(False)]
                reason = f"failed: no_text: the row has no {missing}"
                records.append({"embedding_status": reason})
                continue
            vector, count = next(pairs)
            records.append({"embedding": vector, "embedding_chunks": count, "embedding_status": OK})
        return pa.Table.from_pylist(records, schema=_ADDS)


def joined(vectors: NDArray[np.float32], parts: int, prompt_weight: float) -> NDArray[np.float32]:
    r"""One vector a row, of its parts' unit vectors: as they are, or both end to end.

    .. math:: z = (\sqrt{w}\, u, \sqrt{1 - w}\, v): \quad
              |z - z'|^2 = w |u - u'|^2 + (1 - w) |v - v'|^2, \quad |z| = 1

    Source: definition of the weighted squared distance.

    Args:
        vectors: prompt and response in turn where there are two parts, [rows * parts, d].
        parts: 1 or 2.
        prompt_weight: w.

    Returns:
        float32 [rows, parts * d].
    """
    if parts == 1:
        return vectors
    scale = np.sqrt([prompt_weight, 1 - prompt_weight])[:, None]
    pairs = vectors.reshape(-1, 2, vectors.shape[1]) * scale
    return pairs.reshape(len(pairs), -1).astype(np.float32)


def embedded_text(messages: Sequence[Message], part: Part) -> str:
    """The turns of a part, one a paragraph; system turns left out, they say little of the topic."""
    turns = [turn["content"] for turn in prompt(messages) if turn["role"] != "system"]
    if part == "prompt":
        return "\n\n".join(turns)
    answer = response(messages)
    if part == "response":
        return answer or ""
    return "\n\n".join([*turns, *([answer] if answer else [])])
