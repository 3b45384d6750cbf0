"""The difficulty stage: IFD of every row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from stages.base import Columns, EngineSpec
from stages.difficulty.compat import compat_losses
from stages.difficulty.losses import ResponseLoss, response_losses
from stages.difficulty.settings import DifficultySettings
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import RowError
from stages.rows import OK, Message, messages_of, status_field
from stages.storage import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADDS = pa.schema(
    [
        ("ifd", pa.float32()),
        ("loss_conditional", pa.float32()),
        ("loss_unconditional", pa.float32()),
        ("response_tokens", pa.int32()),
        ("response_truncated", pa.bool_()),
        status_field("difficulty"),
    ]
)


class DifficultyStage:
    """Scores rows with the student; undefined scores are null with a status."""

    name = "difficulty"
    version = 1
    on_targets = False

    def __init__(self, settings: DifficultySettings, models: Mapping[str, ModelSettings]) -> None:
        """Keep the settings and the student's."""
        self.settings = settings
        self._student = models[settings.student]

    def columns(self) -> Columns:
        """Reads the original messages; adds losses and IFD."""
        return Columns(("id", "messages"), _ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The student scores."""
        return {"student": EngineSpec("scorer", self.settings.student, self._student)}

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Losses and IFD of every row, in order."""
        conversations = [messages or [] for messages in messages_of(rows)]
        tokenizer = cached_tokenizer(self._student)
        if self.settings.mode == "strict":
            losses = await response_losses(
                engines["student"], tokenizer, conversations, self._student.max_length
            )
        else:
            losses = await self._compat(engines["student"], tokenizer, conversations)
        return pa.Table.from_pylist([self._record(loss) for loss in losses], schema=_ADDS)

    async def _compat(
        self, scorer: Any, tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]]
    ) -> list[ResponseLoss | RowError]:
        single = [
            {"instruction": turns[0]["content"], "output": turns[1]["content"]}
            if [turn["role"] for turn in turns] == ["user", "assistant"]
            else None
            for turns in conversations
        ]
        template = self.settings.template
        assert template != "chat"
        scored = iter(
            await compat_losses(
                scorer, tokenizer, [r for r in single if r], template, self._student.max_length
            )
        )
        results: list[ResponseLoss | RowError] = []
        for row in single:
            if row is None:
                results.append(RowError("not_single_turn: compat mode scores one user turn"))
                continue
            loss = next(scored)
            tokens = len(tokenizer(row["output"])["input_ids"])
            if loss.response_given_instruction is None or loss.response is None:
                results.append(RowError("undefined: no token could be scored"))
            else:
                results.append(
                    ResponseLoss(loss.response_given_instruction, loss.response, tokens, False)
                )
        return results

    def _record(self, loss: ResponseLoss | RowError) -> dict[str, Any]:
        if isinstance(loss, RowError):
            return {"difficulty_status": f"failed: {loss}"}
        record = {
            "loss_conditional": loss.given_prompt,
            "loss_unconditional": loss.alone,
            "response_tokens": loss.tokens,
            "response_truncated": loss.truncated,
        }
        if loss.tokens < self.settings.min_response_tokens:
            return record | {
                "difficulty_status": f"failed: short_response: {loss.tokens} tokens, "
                f"fewer than {self.settings.min_response_tokens}"
            }
        ifd = loss.ifd if self.settings.variant == "ppl_ratio" else loss.loss_ratio
        if not math.isfinite(ifd):
            return record | {"difficulty_status": "failed: undefined: the ratio isn't finite"}
        return record | {"ifd": ifd, "difficulty_status": OK}
