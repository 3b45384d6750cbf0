"""The embedding stage: one L2-normalised sentence vector a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

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
        texts = [
            embedded_text(messages, self.settings.part)
            for messages in rows["effective_messages"].to_pylist()
        ]
        embedded = await engines["encoder"].embed([text for text in texts if text])
        pairs = iter(zip(embedded.vectors, embedded.chunks.tolist(), strict=True))
        records: list[dict[str, Any]] = []
        for text in texts:
            if not text:
                reason = f"failed: no_text: the row has no {self.settings.part}"
                records.append({"embedding_status": reason})
                continue
            vector, chunks = next(pairs)
            records.append(
                {"embedding": vector, "embedding_chunks": chunks, "embedding_status": OK}
            )
        return pa.Table.from_pylist(records, schema=_ADDS)


def embedded_text(messages: Sequence[Message], part: Part) -> str:
    """The turns of a part, one a paragraph; system turns left out, they say little of the topic."""
    turns = [turn["content"] for turn in prompt(messages) if turn["role"] != "system"]
    if part == "prompt":
        return "\n\n".join(turns)
    answer = response(messages)
    if part == "response":
        return answer or ""
    return "\n\n".join([*turns, *([answer] if answer else [])])
