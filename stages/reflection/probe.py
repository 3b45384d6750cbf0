"""The form in which a teacher replies best, found by asking it about a few rows in every form."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pyarrow as pa

from stages.base import NO_ARTIFACTS, Artifact, Columns, EngineSpec, Settings, ShardedColumns
from stages.engines.chat import RETRIED
from stages.engines.settings import ModelSettings
from stages.errors import StageError
from stages.reflection.parsing import ParseFailure
from stages.reflection.prompts import read_prompts
from stages.reflection.record import ReflectedRow, Version, unusable_turns
from stages.reflection.settings import Form, Phases, ReflectionSettings
from stages.reflection.teacher import Teacher
from stages.rows import Message, key_hash, messages_of
from stages.storage import Store

REPLIES = "replies"
_FILE = "replies.json"
_ROWS = 8


class ProbeSettings(Settings):
    """What the probe depends on, and that it isn't made again because rows were added."""

    phases: Phases
    max_new_tokens: int
    temperature: float
    top_p: float
    rows: int = _ROWS
    refit: bool = False


class RepliesStage:
    """Asks the teacher to rewrite a few rows in every form, and takes what can be read most often.

    Of forms that fail equally often the first of `tagged`, `json`, `whole` is taken: the first two
    have the teacher judge before it writes.
    """

    name = REPLIES
    version = 2
    on_targets = False

    def __init__(
        self, settings: ReflectionSettings, models: Mapping[str, ModelSettings], seed: int
    ) -> None:
        """Keep whom to ask, and how."""
        self._reflection = settings
        self._teacher = models[settings.teacher]
        self._seed = seed
        self._prompts = read_prompts(settings.prompts)
        self.settings = ProbeSettings.model_validate(
            settings.model_dump(include={"phases", "max_new_tokens", "temperature", "top_p"})
        )

    def columns(self) -> Columns:
        """Reads the rows' text."""
        return Columns(("id", "messages"), pa.schema([]))

    def engines(self) -> Mapping[str, EngineSpec]:
        """The teacher."""
        model = self._reflection.teacher
        return {"teacher": EngineSpec("generator", model, self._teacher, asks="messages")}

    def file_contents(self) -> Mapping[str, str]:
        """The prompts count by their texts, wherever their file lies."""
        return {"prompts": self._prompts.digest}

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def fit(
        self,
        columns: ShardedColumns,
        targets: ShardedColumns,
        engines: Mapping[str, Any],
        artifacts: Mapping[str, Store] = NO_ARTIFACTS,
    ) -> Artifact:
        """`replies.json`: the form, and of every form how many replies failed by which code.

        Raises:
            StageError: no row can be reflected on, an endpoint left a request without a reply that
                it may answer another time, or no reply in any form could be read.
        """
        conversations = self._sample(columns)
        if not conversations:
            raise StageError(
                "no row ends with a question and its answer, so the teacher can't be tried; set "
                "reflection.reply, or leave reflection out",
                stage=self.name,
            )
        asked = 0
        failures: dict[Form, Counter[str]] = {}
        for form in get_args(Form):
            teacher = Teacher(
                engines["teacher"],
                self._teacher,
                self._reflection,
                form,
                self._prompts,
                self._seed,
            )
            replies = await self._replies(teacher, conversations)
            asked = len(replies)
            failed = [reply for reply in replies if isinstance(reply, ParseFailure)]
            self._check_answered(form, failed, asked)
            failures[form] = Counter(reply.code for reply in failed)
        best = min(failures, key=lambda form: failures[form].total())
        if failures[best].total() == asked:
            counted = {form: dict(codes) for form, codes in failures.items()}
            raise StageError(
                f"none of {asked} replies by {self._teacher.model} could be read in any form "
                f"({counted}); choose another teacher, or raise reflection.max_new_tokens",
                stage=self.name,
            )
        found = {
            "reply": best,
            "asked": asked,
            "failures": {form: dict(sorted(codes.items())) for form, codes in failures.items()},
        }
        return Artifact({_FILE: json.dumps(found, indent=1).encode()}, found)

    def _check_answered(self, form: Form, failed: Sequence[ParseFailure], asked: int) -> None:
        """Refuse to compare forms where a busy hour would decide, for as long as the run lasts."""
        passing = [failure for failure in failed if failure.code in RETRIED]
        if not passing:
            return
        raise StageError(
            f"{len(passing)} of {asked} requests to {self._teacher.model} in the form {form} got "
            f"no reply; for example {passing[0].code}: {passing[0].detail}. The forms can't be "
            "compared without them: run again later, what was answered is kept; or name a form in "
            "reflection.reply",
            stage=self.name,
        )

    async def _replies(
        self, teacher: Teacher, conversations: Mapping[str, list[Message]]
    ) -> list[object]:
        replies: list[object] = []
        if self.settings.phases != "response":
            replies += await teacher.instructions(_rows(conversations))
        if self.settings.phases != "instruction":
            replies += await teacher.responses(_rows(conversations))
        return replies

    def _sample(self, columns: ShardedColumns) -> dict[str, list[Message]]:
        """Of the rows that can be reflected on, those of lowest hash: whatever their order."""
        lowest: list[tuple[int, str, list[Message]]] = []
        for table in columns.iter(("id", "messages")):
            lowest += [
                (key_hash(row, self._seed), row, messages)
                for row, messages in zip(table["id"].to_pylist(), messages_of(table), strict=True)
                if messages and unusable_turns(messages) is None
            ]
            lowest = sorted(lowest, key=lambda item: item[:2])[: self.settings.rows]
        return {row: messages for _, row, messages in lowest}


def probed_form(store: Store) -> Form:
    """The form that the probe found."""
    form: Form = json.loads(store.read_bytes(_FILE))["reply"]
    return form


def _rows(conversations: Mapping[str, Sequence[Message]]) -> list[ReflectedRow]:
    return [
        ReflectedRow(row, "math", {"none": Version(list(messages), None)})
        for row, messages in conversations.items()
    ]
