"""The reflection stage: a shard's rows through the phases, one engine call a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from stages.base import UNSEEN, Columns, EngineSpec
from stages.difficulty.losses import ResponseLoss, reverse_prompt_digest
from stages.difficulty.settings import DifficultySettings
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError
from stages.ingest.settings import ContaminationSettings
from stages.overlap import OverlapIndex
from stages.pass_rate.checker import AnswerChecker
from stages.reflection.checks import RewriteChecks, folder_digest, unseen_index
from stages.reflection.grid import reflect_in_grid
from stages.reflection.offers import Offers
from stages.reflection.probe import REPLIES, probed_form
from stages.reflection.prompts import read_prompts
from stages.reflection.record import (
    ReflectedConversation,
    ReflectedRow,
    added_columns,
    added_schema,
    exchange_ends,
)
from stages.reflection.sequential import reflect_in_sequence
from stages.reflection.settings import ReflectionSettings
from stages.reflection.student import Student
from stages.reflection.teacher import Teacher
from stages.rows import messages_of
from stages.sources.catalogue import resolved
from stages.sources.settings import Source
from stages.storage import Store

_LOSSES = ("loss_conditional", "loss_unconditional", "response_tokens", "response_truncated")
"""Columns of difficulty from which a response's losses are known."""


class ReflectionStage:
    """Adds rewritten messages, the student's verdicts, and the scores of the text that stands."""

    name = "reflection"
    version = 4
    on_targets = False
    settings: ReflectionSettings

    def __init__(
        self,
        settings: ReflectionSettings,
        models: Mapping[str, ModelSettings],
        seed: int,
        *,
        difficulty: DifficultySettings | None = None,
        unseen: ContaminationSettings | None = None,
        sources: Sequence[Source] = (),
    ) -> None:
        """Look up teacher and student, and read the prompts.

        Args:
            settings: the recipe's section.
            models: the recipe's models by name.
            seed: the run's; the teacher's text is drawn from it, the row's id and the purpose.
            difficulty: the section of the stage that scored the rows before, where there is one.
            unseen: how texts are found that no rewrite may bring in; None: there are none.
            sources: of the rows; where one names an `answer_pattern`, what it finds in a new
                response must be the row's answer.

        Raises:
            ConfigError: the recipe has no such model, replies leave no room for a prompt, or the
                prompts can't be used.
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
        self._prompts = read_prompts(settings.prompts)
        self._contamination = unseen
        self._sources = {source.name: source for source in sources}
        self._is_scored = difficulty is not None and _scores_alike(
            models[difficulty.student], difficulty, self._student
        )
        if self._teacher.endpoint is None and settings.max_new_tokens >= self._teacher.max_length:
            raise ConfigError(
                f"reflection.max_new_tokens: {settings.max_new_tokens} leaves no room for a prompt "
                f"in models.{settings.teacher}.max_length={self._teacher.max_length}"
            )

    def columns(self) -> Columns:
        """Needs the rows' text, and its losses where difficulty has them; adds what stands."""
        losses = _LOSSES if self._is_scored else ()
        file = ("file",) if self._sources else ()
        return Columns(
            needs=("id", "source", "messages", "answer", *file, *losses),
            adds=added_schema(self.settings),
        )

    def engines(self) -> Mapping[str, EngineSpec]:
        """The model that rewrites and the model that judges."""
        return {
            "teacher": EngineSpec(
                "generator", self.settings.teacher, self._teacher, asks="messages"
            ),
            "student": EngineSpec("scorer", self.settings.student, self._student),
        }

    def artifacts(self) -> tuple[str, ...]:
        """What must stay unseen, and the form of reply, each where there is any to find."""
        found = (REPLIES,) if self.settings.reply == "auto" else ()
        return (*found, UNSEEN) if self._contamination else found

    def file_contents(self) -> Mapping[str, str]:
        """The prompts count by their texts, wherever their file lies, the student's among them."""
        return {"prompts": self._prompts.digest, "reverse_prompt": reverse_prompt_digest()}

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Reflect on every row; same rows, same order.

        Raises:
            StageError: more rewrites failed than `max_failed_share` allows.
        """
        settings = self.settings
        reply = settings.reply
        form = probed_form(artifacts[REPLIES]) if reply == "auto" else reply
        teacher = Teacher(
            engines["teacher"], self._teacher, settings, form, self._prompts, self._seed
        )
        student = Student(
            engines["student"],
            cached_tokenizer(self._student),
            self._student.max_length,
            ratio=settings.scores_rifd,
        )
        conversations = self._conversations(rows)
        with AnswerChecker(settings.timeout_s) as checker:
            checks = RewriteChecks(checker, self._unseen(artifacts))
            offers = Offers(teacher, checks, self._teacher.model, settings.max_failed_share)
            for number in range(max((len(one.ends) for one in conversations), default=0)):
                asked = [
                    one
                    for one in conversations
                    if len(one.ends) > number and one.unanswered is None
                ]
                exchanges = [one.next_row() for one in asked]
                await self._reflect(exchanges, offers, student)
                for conversation, row in zip(asked, exchanges, strict=True):
                    conversation.take(row)
        records = [one.values(self._teacher.portable_name) for one in conversations]
        return added_columns(records, self.columns().adds)

    async def _reflect(
        self, rows: Sequence[ReflectedRow], offers: Offers, student: Student
    ) -> None:
        """One exchange of every row."""
        rows = [row for row in rows if row.error is None]
        await student.score_responses(row.original for row in rows)
        if not self.settings.no_selection:
            # Without a score of the original no rewrite can be accepted, so none is asked for.
            for row in rows:
                row.error = row.original.error
            rows = [row for row in rows if row.error is None]
        if self.settings.scores_rifd:
            await student.score_instructions(row.original for row in rows)
        reflect = reflect_in_grid if self.settings.mode == "grid" else reflect_in_sequence
        await reflect(rows, offers, student, self.settings)

    def _conversations(self, rows: pa.Table) -> list[ReflectedConversation]:
        every = self.settings.turns == "every"
        others = rows.drop_columns(["messages"]).to_pylist()
        return [
            ReflectedConversation(
                id=row["id"],
                messages=messages or [],
                answer=row["answer"],
                check=self.settings.checks.get(row["source"], self.settings.check),
                ends=exchange_ends(messages or [], every=every),
                answer_pattern=self._answer_pattern(row),
                ifd=_known_loss(row) if self._is_scored else None,
            )
            for row, messages in zip(others, messages_of(rows), strict=True)
        ]

    def _answer_pattern(self, row: Mapping[str, Any]) -> str | None:
        source = self._sources.get(row["source"])
        return resolved(source, row["file"] or "").answer_pattern if source else None

    def _unseen(self, artifacts: Mapping[str, Store]) -> OverlapIndex:
        if self._contamination is None:
            return OverlapIndex(())
        store = artifacts[UNSEEN]
        digest = folder_digest(store)
        return unseen_index(store.url, digest, self._contamination.ngram, self._contamination.short)


def _scores_alike(
    scorer: ModelSettings, difficulty: DifficultySettings, student: ModelSettings
) -> bool:
    """Whether difficulty's losses are those that this student gives to the original texts."""
    return (
        scorer == student
        and difficulty.mode == "strict"
        and difficulty.template == "chat"
        and difficulty.variant != "loss_ratio_prefixed"
    )


def _known_loss(row: Mapping[str, Any]) -> ResponseLoss | None:
    """The losses in difficulty's columns, or None where it wasn't asked for them or failed."""
    if row["loss_conditional"] is None:
        return None
    conditional, alone, tokens, truncated = (row[name] for name in _LOSSES)
    return ResponseLoss(conditional, alone, tokens, truncated)
