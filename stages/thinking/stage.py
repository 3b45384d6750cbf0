"""The thinking stage: one forward pass a row tells whether a model would think about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from stages.base import Columns, EngineSpec
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import RowError
from stages.rows import OK, messages_of, prompt, status_field
from stages.storage import Store
from stages.thinking.odds import nothinking_log_odds, thinking_probability
from stages.thinking.prompts import nothinking_id, open_thinking_ids
from stages.thinking.settings import ThinkingSettings

_ADDS = pa.schema(
    [
        ("thinks", pa.bool_()),
        ("p_think", pa.float64()),
        ("nothinking_log_odds", pa.float64()),
        ("first_token", pa.string()),
        status_field("thinking"),
    ]
)


class ThinkingStage:
    """Flags a row as difficult where the model's first token isn't the one that skips thinking."""

    name = "thinking"
    version = 1
    on_targets = False

    def __init__(self, settings: ThinkingSettings, models: Mapping[str, ModelSettings]) -> None:
        """Keep the settings and the model's."""
        self.settings = settings
        self._model = models[settings.model]

    def check(self) -> None:
        """See that the tokenizer has the NoThinking token.

        Raises:
            ConfigError: it hasn't, or the model isn't there.
        """
        self._nothinking_id()

    def columns(self) -> Columns:
        """Reads the original messages; adds the greedy flag, probability, log-odds, first token."""
        return Columns(("id", "messages"), _ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The adaptive-thinking model scores."""
        return {"model": EngineSpec("scorer", self.settings.model, self._model)}

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Flag, probability and log-odds of every row, in order."""
        tokenizer = cached_tokenizer(self._model)
        prompts: list[list[int] | RowError] = []
        for messages in messages_of(rows):
            try:
                ids = open_thinking_ids(tokenizer, prompt(messages or []), self.settings.opening)
                if len(ids) > self._model.max_length:
                    raise RowError(
                        f"prompt_too_long: {len(ids)} tokens, over {self._model.max_length}"
                    )
                prompts.append(ids)
            except RowError as error:
                prompts.append(error)
        asked = [ids for ids in prompts if not isinstance(ids, RowError)]
        skip = self._nothinking_id()
        first = await engines["model"].first_tokens(asked, [skip])
        log_probs = first.log_probs[:, 0]
        found = zip(
            (first.greedy != skip).tolist(),
            thinking_probability(log_probs).tolist(),
            nothinking_log_odds(log_probs).tolist(),
            [str(tokenizer.decode([token])) for token in np.asarray(first.greedy).tolist()],
            strict=True,
        )
        records: list[dict[str, Any]] = []
        for known in prompts:
            if isinstance(known, RowError):
                records.append({"thinking_status": f"failed: {known}"})
                continue
            thinks, probability, odds, token = next(found)
            records.append(
                {
                    "thinks": thinks,
                    "p_think": probability,
                    "nothinking_log_odds": odds,
                    "first_token": token,
                    "thinking_status": OK,
                }
            )
        return pa.Table.from_pylist(records, schema=_ADDS)

    def _nothinking_id(self) -> int:
        return nothinking_id(
            cached_tokenizer(self._model), self.settings.nothinking, self._model.model
        )
