"""The reflection stage: two phases over a whole shard, one engine call a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from stages.base import Columns, EngineSpec
from stages.difficulty.losses import (
    InstructionLoss,
    ResponseLoss,
    instruction_losses,
    response_losses,
)
from stages.engines import TokenScorer
from stages.engines.model_files import load_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, RowError, StageError
from stages.reflection.answers import gives_answer
from stages.reflection.decision import choose_instruction, choose_response, unfit_pair
from stages.reflection.parsing import ParseFailure
from stages.reflection.record import ADDS, ReflectedRow, added_columns
from stages.reflection.settings import ReflectionSettings
from stages.reflection.teacher import Teacher
from stages.rows import Message, messages_of, with_turns
from stages.storage import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Texts = Sequence[Sequence[Message]]


class ReflectionStage:
    """Adds rewritten messages, the student's verdicts, and the scores of the text that stands."""

    name = "reflection"
    version = 1
    on_targets = False
    settings: ReflectionSettings

    def __init__(
        self, settings: ReflectionSettings, models: Mapping[str, ModelSettings], seed: int
    ) -> None:
        """Look up teacher and student.

        Args:
            settings: the recipe's section.
            models: the recipe's models by name.
            seed: the run's; the teacher's text is drawn from it, the row's id and the purpose.

        Raises:
            ConfigError: the recipe has no such model, or replies leave no room for a prompt.
        """
        for role, model in (("teacher", settings.teacher), ("student", settings.student)):
            if model not in models:
                raise ConfigError(
                    f"reflection.{role}: no model named {model!r} in models ({', '.join(models)})"
                )
        self.settings = settings
        self._teacher = models[settings.teacher]
        self._student = models[settings.student]
        self._seed = seed
        if self._teacher.endpoint is None and settings.max_new_tokens >= self._teacher.max_length:
            raise ConfigError(
                f"reflection.max_new_tokens: {settings.max_new_tokens} leaves no room for a prompt "
                f"in models.{settings.teacher}.max_length={self._teacher.max_length}"
            )

    def columns(self) -> Columns:
        """Needs the rows' text; adds what stands and why."""
        return Columns(needs=("id", "messages", "answer"), adds=ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The model that rewrites and the model that judges."""
        return {
            "teacher": EngineSpec(
                "generator", self.settings.teacher, self._teacher, asks="messages"
            ),
            "student": EngineSpec("scorer", self.settings.student, self._student),
        }

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Reflect on every row; same rows, same order.

        Raises:
            StageError: more rewrites failed than `max_failed_share` allows.
        """
        teacher = Teacher(engines["teacher"], self._teacher, self.settings, self._seed)
        student = engines["student"]
        reflected = [
            ReflectedRow(row, messages or [], answer, unusable_turns(messages or []))
            for row, messages, answer in zip(
                rows["id"].to_pylist(), messages_of(rows), rows["answer"].to_pylist(), strict=True
            )
        ]
        await self._score_originals(reflected, student)
        # Without a score of the original no rewrite can be accepted, so none is asked for.
        usable = [row for row in reflected if row.error is None]
        if self.settings.phases != "response":
            self._check_failures(await self._rewrite_instructions(usable, teacher, student), usable)
            usable = [row for row in usable if row.error is None]
        if self.settings.phases != "instruction":
            self._check_failures(await self._rewrite_responses(usable, teacher, student), usable)
        return added_columns(reflected)

    async def _score_originals(self, rows: Sequence[ReflectedRow], student: TokenScorer) -> None:
        """IFD and r-IFD before reflection; a row without IFD is a failed row."""
        rows = [row for row in rows if row.error is None]
        ifds = await self._response_losses([row.messages for row in rows], student)
        for row, ifd in zip(rows, ifds, strict=True):
            if isinstance(ifd, RowError):
                row.error = ifd
            else:
                row.ifd, row.ifd_before = ifd, ifd.ifd
        rows = [row for row in rows if row.error is None]
        rifds = await self._instruction_losses([row.messages for row in rows], student)
        for row, rifd in zip(rows, rifds, strict=True):
            if not isinstance(rifd, RowError):
                row.rifd, row.rifd_before = rifd, rifd.rifd

    async def _rewrite_instructions(
        self, rows: Sequence[ReflectedRow], teacher: Teacher, student: TokenScorer
    ) -> list[ParseFailure]:
        """Phase 1: the harder of the row and the teacher's pair stands."""
        failures: list[ParseFailure] = []
        offered: list[tuple[ReflectedRow, list[Message]]] = []
        for row, new in zip(rows, await teacher.instructions(rows), strict=True):
            if isinstance(new, ParseFailure):
                row.instruction_result = new.code
                failures.append(new)
                continue
            text = with_turns(row.messages, instruction=new.instruction, response=new.response)
            offered.append((row, text))
        losses = await self._response_losses([text for _, text in offered], student)
        won: list[ReflectedRow] = []
        for (row, text), result in zip(offered, losses, strict=True):
            ifd = _scored(result)
            row.ifd_candidate = ifd.ifd if ifd else None
            choice = choose_instruction(
                row.ifd, ifd, margin=self.settings.margin, max_ifd=self.settings.max_ifd
            )
            row.instruction_result = choice.reason
            if choice.accepted:
                row.messages, row.ifd = text, ifd
                won.append(row)
        # Phase 2 compares with the pair that stands, so the winners need an r-IFD of their own.
        rifds = await self._instruction_losses([row.messages for row in won], student)
        for row, rifd in zip(won, rifds, strict=True):
            row.rifd = _scored(rifd)
        return failures

    async def _rewrite_responses(
        self, rows: Sequence[ReflectedRow], teacher: Teacher, student: TokenScorer
    ) -> list[ParseFailure]:
        """Phase 2: the response that tells the student more about the instruction stands."""
        failures: list[ParseFailure] = []
        offered: list[tuple[ReflectedRow, list[Message]]] = []
        for row, new in zip(rows, await teacher.responses(rows), strict=True):
            if isinstance(new, ParseFailure):
                row.response_result = new.code
                failures.append(new)
            elif _loses_answer(row, new):
                row.response_result = "answer_missing"
            else:
                offered.append((row, with_turns(row.messages, response=new)))
        losses = await self._instruction_losses([text for _, text in offered], student)
        won: list[tuple[ReflectedRow, list[Message], InstructionLoss | None]] = []
        for (row, text), result in zip(offered, losses, strict=True):
            rifd = _scored(result)
            row.rifd_candidate = rifd.rifd if rifd else None
            choice = choose_response(row.rifd, rifd, margin=self.settings.margin)
            row.response_result = choice.reason
            if choice.accepted:
                won.append((row, text, rifd))
        # Only a winner needs its IFD: to report it, and to refuse a response that doesn't fit.
        ifds = await self._response_losses([text for _, text, _ in won], student)
        for (row, text, rifd), scored in zip(won, ifds, strict=True):
            ifd = _scored(scored)
            unfit = unfit_pair(ifd, max_ifd=self.settings.max_ifd)
            if unfit:
                row.response_result = unfit
            else:
                row.messages, row.ifd, row.rifd = text, ifd, rifd
        return failures

    async def _response_losses(
        self, texts: Texts, student: TokenScorer
    ) -> list[ResponseLoss | RowError]:
        if not texts:
            return []
        tokenizer = _tokenizer(self._student)
        return await response_losses(student, tokenizer, texts, self._student.max_length)

    async def _instruction_losses(
        self, texts: Texts, student: TokenScorer
    ) -> list[InstructionLoss | RowError]:
        if not texts:
            return []
        tokenizer = _tokenizer(self._student)
        return await instruction_losses(student, tokenizer, texts, self._student.max_length)

    def _check_failures(
        self, failures: Sequence[ParseFailure], asked: Sequence[ReflectedRow]
    ) -> None:
        limit = self.settings.max_failed_share
        if len(failures) <= limit * len(asked):
            return
        codes = Counter(failure.code for failure in failures).most_common()
        raise StageError(
            f"reflection: {len(failures)} of {len(asked)} rewrites by {self._teacher.model} failed "
            f"({', '.join(f'{code} {n}' for code, n in codes)}), more than "
            f"max_failed_share={limit}; for example: {failures[0].detail}. Choose another reply "
            "form or teacher, raise max_new_tokens, or raise the share",
            stage=self.name,
        )


def unusable_turns(messages: Sequence[Message]) -> RowError | None:
    """Why a conversation can't be reflected on, or None where it can.

    The last two turns must be the user's and the assistant's text: a rewrite would leave results of
    tool calls between them, or a call that the response makes, without what they belong to.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return RowError("no_response: the conversation doesn't end with an assistant turn")
    if messages[-2]["role"] != "user":
        return RowError(f"no_instruction: a {messages[-2]['role']} turn precedes the response")
    if messages[-1].get("tool_calls"):
        return RowError("tool_call: the response calls a tool")
    for turn, name in ((messages[-2], "instruction"), (messages[-1], "response")):
        if not (turn["content"] or "").strip():
            return RowError(f"empty_{name}: the {name} has no text")
    return None


@lru_cache(maxsize=8)
def _tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    return load_tokenizer(settings)


def _scored(result: T | RowError) -> T | None:
    return None if isinstance(result, RowError) else result


def _loses_answer(row: ReflectedRow, new: str) -> bool:
    """Whether a new response drops the answer (which doesn't count for a new instruction)."""
    if row.answer is None or row.instruction_changed:
        return False
    return not gives_answer(new, row.answer)
