"""The difficulty stage: IFD of every row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from stages.base import Columns, EngineSpec
from stages.difficulty.compat import ReferenceLosses, compat_losses
from stages.difficulty.losses import (
    InstructionLoss,
    ResponseLoss,
    instruction_losses,
    response_losses,
    reverse_prompt_digest,
)
from stages.difficulty.settings import DifficultySettings
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import RowError
from stages.rows import OK, Message, messages_of, status_field
from stages.storage import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IFD = pa.schema(
    [
        ("ifd", pa.float32()),
        ("loss_conditional", pa.float32()),
        ("loss_unconditional", pa.float32()),
        ("response_tokens", pa.int32()),
        ("response_truncated", pa.bool_()),
    ]
)
_RIFD = pa.schema(
    [
        ("rifd", pa.float32()),
        ("loss_instruction_conditional", pa.float32()),
        ("loss_instruction_unconditional", pa.float32()),
    ]
)
_LARGEST = float(np.finfo(np.float32).max)
_Scored = tuple[ResponseLoss | RowError, InstructionLoss | RowError | None]


class DifficultyStage:
    """Scores rows with the student; undefined scores are null with a status."""

    name = "difficulty"
    version = 2
    on_targets = False

    def __init__(self, settings: DifficultySettings, models: Mapping[str, ModelSettings]) -> None:
        """Keep the settings and the student's."""
        self.settings = settings
        self._student = models[settings.student]

    def columns(self) -> Columns:
        """Reads the original messages; adds losses and IFD, and r-IFD where it is asked for."""
        fields = [*_IFD, *(_RIFD if self.settings.rifd else ()), status_field("difficulty")]
        return Columns(("id", "messages"), pa.schema(fields))

    def engines(self) -> Mapping[str, EngineSpec]:
        """The student scores."""
        return {"student": EngineSpec("scorer", self.settings.student, self._student)}

    def file_contents(self) -> Mapping[str, str]:
        """No file, but the wording that r-IFD depends on, where it is scored with it."""
        if not self.settings.rifd or self.settings.mode == "compat":
            return {}
        return {"reverse_prompt": reverse_prompt_digest()}

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Losses, IFD and r-IFD of every row, in order."""
        conversations = [messages or [] for messages in messages_of(rows)]
        tokenizer = cached_tokenizer(self._student)
        score = self._strict if self.settings.mode == "strict" else self._compat
        losses = await score(engines["student"], tokenizer, conversations)
        records = [self._record(loss, reverse) for loss, reverse in losses]
        return pa.Table.from_pylist(records, schema=self.columns().adds)

    async def _strict(
        self, scorer: Any, tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]]
    ) -> list[_Scored]:
        template, window = self.settings.template, self._student.max_length
        responses = await response_losses(
            scorer,
            tokenizer,
            conversations,
            window,
            template=template,
            prefixed=self.settings.variant == "loss_ratio_prefixed",
        )
        if not self.settings.rifd:
            return [(loss, None) for loss in responses]
        instructions = await instruction_losses(
            scorer, tokenizer, conversations, window, template=template
        )
        return list(zip(responses, instructions, strict=True))

    async def _compat(
        self, scorer: Any, tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]]
    ) -> list[_Scored]:
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
                scorer,
                tokenizer,
                [row for row in single if row],
                template,
                self._student.max_length,
                prefixed=self.settings.variant == "loss_ratio_prefixed",
                reverse=self.settings.rifd,
            )
        )
        return [
            (RowError("not_single_turn: compat mode scores one user turn"), None)
            if row is None
            else _compared(next(scored), len(tokenizer(row["output"])["input_ids"]))
            for row in single
        ]

    def _record(
        self, loss: ResponseLoss | RowError, reverse: InstructionLoss | RowError | None
    ) -> dict[str, Any]:
        if isinstance(loss, RowError):
            return {"difficulty_status": f"failed: {loss}"}
        record: dict[str, Any] = {
            "loss_conditional": loss.given_prompt,
            "loss_unconditional": loss.alone,
            "response_tokens": loss.tokens,
            "response_truncated": loss.truncated,
        }
        if isinstance(reverse, InstructionLoss):
            record |= {
                "rifd": reverse.rifd,
                "loss_instruction_conditional": reverse.given_response,
                "loss_instruction_unconditional": reverse.alone,
            }
        if loss.tokens < self.settings.min_response_tokens:
            return record | {
                "difficulty_status": f"failed: short_response: {loss.tokens} tokens, "
                f"fewer than {self.settings.min_response_tokens}"
            }
        ifd = loss.ifd if self.settings.variant == "ppl_ratio" else loss.loss_ratio
        if not ifd <= _LARGEST:
            return record | {"difficulty_status": "failed: undefined: the ratio isn't finite"}
        if self.settings.rifd and not isinstance(reverse, InstructionLoss):
            why = reverse or "undefined: no token of the instruction could be scored"
            return record | {"ifd": ifd, "difficulty_status": f"no_rifd: {why}"}
        return record | {"ifd": ifd, "difficulty_status": OK}


def _compared(loss: ReferenceLosses, tokens: int) -> _Scored:
    if loss.response_given_instruction is None or loss.response is None:
        return RowError("undefined: no token could be scored"), None
    response = ResponseLoss(loss.response_given_instruction, loss.response, tokens, False)
    if loss.instruction is None or loss.instruction_given_response is None:
        return response, None
    return response, InstructionLoss(loss.instruction_given_response, loss.instruction, tokens)
