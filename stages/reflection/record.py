"""One exchange on its way through reflection, and the columns that come of a row's exchanges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from stages.engines import Usage
from stages.errors import RowError
from stages.pass_rate.checks import Check
from stages.reflection.decision import VersionName
from stages.reflection.parsing import Rewrite
from stages.reflection.settings import ReflectionSettings
from stages.rows import LABEL, MESSAGES, OK, Message, instruction, response, status_field

if TYPE_CHECKING:
    from stages.difficulty.losses import InstructionLoss, ResponseLoss

_NO_TOKENS = Usage(0, 0)

Outcome = Literal["both", "instruction", "response", "none", "failed"]

_VERSIONS: dict[str, VersionName] = {
    "before": "none",
    "instruction": "instruction",
    "response": "response",
    "both": "both",
}
"""Versions of an exchange, by what their columns are called."""


@dataclass
class Version:
    """A text of an exchange and what the student says of it.

    Attributes:
        messages: turns up to the exchange's response.
        answer: the reference answer that belongs to this text, or None.
        ifd: losses of the response, or None where it isn't scored.
        rifd: losses of the instruction after the response, or None where it isn't scored.
        error: why it can't be scored, or None.
    """

    messages: list[Message]
    answer: str | None
    ifd: ResponseLoss | None = None
    rifd: InstructionLoss | None = None
    error: RowError | None = None

    @property
    def exchange(self) -> Rewrite:
        """Its instruction and its response."""
        return Rewrite(instruction(self.messages) or "", response(self.messages) or "")


@dataclass
class ReflectedRow:
    """A row up to one of its exchanges: its versions, and what happened to each rewrite.

    Attributes:
        id: what the teacher's seed depends on: the row's identity, and the exchange's place in it.
        check: how a response is compared with the row's answer.
        versions: the texts there are, by which of their parts are the teacher's.
        answer_pattern: where the row's source keeps answers in responses, or None.
        standing: the version that stands so far, which is what the teacher is shown.
        error: why the exchange can't be reflected on, or None.
        refused: by version, why there is no such text.
        instruction_result: the verdict on the instruction's rewrite, or the code of its failure.
        response_result: the same for the response.
        unanswered: why an endpoint gave no reply, which it may do another time, or None.
        usage: tokens that the teacher read and generated for this exchange; None where an endpoint
            doesn't report them.
    """

    id: str
    check: Check
    versions: dict[VersionName, Version]
    answer_pattern: str | None = None
    standing: VersionName = "none"
    error: RowError | None = None
    refused: dict[VersionName, str] = field(default_factory=dict)
    instruction_result: str | None = None
    response_result: str | None = None
    unanswered: RowError | None = None
    usage: Usage | None = _NO_TOKENS

    def count(self, usage: Usage | None) -> None:
        """Add the tokens of one more reply."""
        self.usage = added_usage(self.usage, usage)

    @property
    def original(self) -> Version:
        """The text that came in."""
        return self.versions["none"]

    @property
    def current(self) -> Version:
        """The text that stands."""
        return self.versions[self.standing]

    @property
    def messages(self) -> list[Message]:
        """The turns that stand."""
        return self.current.messages

    @property
    def exchange(self) -> Rewrite:
        """The instruction and the response that stand."""
        return self.current.exchange

    @property
    def offer(self) -> VersionName:
        """What a new response to the instruction that stands makes of the row."""
        return "both" if self.standing in ("instruction", "both") else "response"

    @property
    def offered(self) -> Version:
        """The version with the new response that was offered last."""
        return self.versions[self.offer]

    @property
    def outcome(self) -> Outcome:
        """Which rewrites stand."""
        return "failed" if self.error is not None else self.standing

    def values(self) -> dict[str, Any]:
        """The columns that describe one exchange; a failed one has no verdicts, but why."""
        if self.error is not None:
            kept = _kept_scores(self.original.ifd, self.original.rifd)
            return {"reflection_outcome": self.outcome, "error": str(self.error), **kept}
        scores: dict[str, float | None] = {}
        for name, version in _VERSIONS.items():
            if version in self.versions:
                scores |= _scores(name, self.versions[version].ifd, self.versions[version].rifd)
        return {
            "reflection_outcome": self.outcome,
            "reflection_instruction_result": self.instruction_result,
            "reflection_response_result": self.response_result,
            **scores,
            **_scores("effective", self.current.ifd, self.current.rifd),
            **_tokens(self.usage),
        }


@dataclass
class ReflectedConversation:
    """A row and its exchanges, which are reflected on one after another.

    Attributes:
        id: the row's identity.
        messages: its turns as they stand by now.
        answer: its reference answer, or None.
        check: how a response is compared with it.
        ends: how many turns precede the end of each exchange.
        answer_pattern: where its source keeps answers in responses, or None.
        ifd: losses of the original response where they are known already.
        done: exchanges that were reflected on.
    """

    id: str
    messages: list[Message]
    answer: str | None
    check: Check
    ends: list[int]
    answer_pattern: str | None = None
    ifd: ResponseLoss | None = None
    done: list[ReflectedRow] = field(default_factory=list)

    @property
    def unanswered(self) -> RowError | None:
        """Why an endpoint gave no reply for an exchange, or None."""
        return next((row.unanswered for row in self.done if row.unanswered), None)

    @property
    def changed(self) -> bool:
        """Whether a rewrite stands."""
        return any(row.standing != "none" for row in self.done)

    def next_row(self) -> ReflectedRow:
        """The row up to its next exchange, earlier turns as they stand."""
        end = self.ends[len(self.done)]
        last = end == len(self.messages)
        original = Version(
            self.messages[:end],
            self.answer if last else None,
            self.ifd if last and not self.changed else None,
        )
        key = self.id if last else f"{self.id}:{end}"
        return ReflectedRow(
            key,
            self.check,
            {"none": original},
            self.answer_pattern,
            error=unusable_turns(original.messages),
        )

    def take(self, row: ReflectedRow) -> None:
        """Put what stands of the next exchange in its place."""
        self.messages = [*row.messages, *self.messages[self.ends[len(self.done)] :]]
        self.done.append(row)

    def values(self, teacher: str) -> dict[str, Any]:
        """The added columns: those of the last exchange, but for what the row has in all."""
        last = self.done[-1]
        tokens = _tokens(reduce(added_usage, [row.usage for row in self.done]))
        if self.unanswered is not None:
            return {
                "reflection_outcome": "failed",
                "reflection_status": f"failed: {self.unanswered}",
                "reflection_teacher": teacher,
                "answer_effective": self.answer,
                **self._incoming_scores(),
                **tokens,
            }
        made = last.values() | {
            "reflection_outcome": self._outcome(),
            "answer_effective": self._answer(),
        }
        if all(row.error for row in self.done):
            return made | {"reflection_status": f"failed: {last.error}"}
        return made | {
            "messages_reflected": self.messages if self.changed else None,
            "reflection_status": OK,
            "reflection_teacher": teacher,
            **tokens,
            "reflection_exchanges": [
                {_bare(name): value for name, value in row.values().items()} for row in self.done
            ],
        }

    def _incoming_scores(self) -> dict[str, float | None]:
        """Scores of the last exchange after the turns that came in, as far as they are known."""
        *earlier, last = self.done
        reached = len(self.done) == len(self.ends)
        if reached and all(row.standing == "none" for row in earlier):
            return _kept_scores(last.original.ifd, last.original.rifd)
        return _kept_scores(self.ifd, None)

    def _outcome(self) -> Outcome:
        if all(row.error for row in self.done):
            return "failed"
        standing = {row.standing for row in self.done}
        asked = bool(standing & {"instruction", "both"})
        answered = bool(standing & {"response", "both"})
        if asked:
            return "both" if answered else "instruction"
        return "response" if answered else "none"

    def _answer(self) -> str | None:
        """The reference answer, where it still holds.

        After an earlier instruction that changed it holds only where a new response gave it again.
        """
        *earlier, last = self.done
        asked = any(row.standing in ("instruction", "both") for row in earlier)
        return None if asked and last.standing == "none" else last.current.answer


def exchange_ends(messages: Sequence[Message], *, every: bool) -> list[int]:
    """How many turns precede the end of each exchange of user and assistant to reflect on.

    The last exchange ends with the conversation. One whole conversation where there is none, so
    that it fails with its reason.
    """
    ends = [
        end
        for end in range(2, len(messages) + 1)
        if messages[end - 1]["role"] == "assistant" and messages[end - 2]["role"] == "user"
    ]
    return ends if every and ends else [len(messages)]


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


def added_schema(settings: ReflectionSettings) -> pa.Schema:
    """The columns that the stage adds: r-IFD where it is scored, exchanges where there are several.

    `before` is the text that came in; `instruction`, `response` and `both` are the versions offered
    with these parts the teacher's; `effective` is the one that stands. `reverse_loss` is L(x|y'),
    which phase 2 compares.
    """
    kinds = ["ifd", "reverse_loss", *(["rifd"] if settings.scores_rifd else [])]
    numbers = [
        *(
            pa.field(f"{kind}_{version}", pa.float32())
            for kind in kinds
            for version in (*_VERSIONS, "effective")
        ),
        pa.field("teacher_prompt_tokens", pa.int64()),
        pa.field("teacher_tokens", pa.int64()),
    ]
    labels = (
        "reflection_outcome",
        "reflection_instruction_result",
        "reflection_response_result",
    )
    fields = [
        pa.field("messages_reflected", MESSAGES),
        status_field("reflection"),
        *(pa.field(name, LABEL) for name in labels),
        pa.field("reflection_teacher", LABEL),
        *numbers,
        pa.field("answer_effective", pa.string()),
    ]
    if settings.turns == "every":
        texts = (*map(_bare, labels), "error")
        inner = [*(pa.field(name, pa.string()) for name in texts), *numbers]
        fields.append(pa.field("reflection_exchanges", pa.list_(pa.struct(inner))))
    return pa.schema(fields)


def added_columns(records: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """The added columns of all rows, in order."""
    columns = {
        field.name: pa.array([record.get(field.name) for record in records], field.type)
        for field in schema
    }
    return pa.table(columns, schema=schema)


def added_usage(first: Usage | None, second: Usage | None) -> Usage | None:
    """Tokens of both; None where either isn't known."""
    if first is None or second is None:
        return None
    return Usage(
        first.prompt_tokens + second.prompt_tokens,
        first.generated_tokens + second.generated_tokens,
    )


def _scores(
    name: str, ifd: ResponseLoss | None, rifd: InstructionLoss | None
) -> dict[str, float | None]:
    return {
        f"ifd_{name}": ifd.ifd if ifd else None,
        f"rifd_{name}": rifd.rifd if rifd else None,
        f"reverse_loss_{name}": rifd.given_response if rifd else None,
    }


def _kept_scores(ifd: ResponseLoss | None, rifd: InstructionLoss | None) -> dict[str, float | None]:
    """Scores where nothing has changed: the text that came in is the one that stands."""
    return _scores("before", ifd, rifd) | _scores("effective", ifd, rifd)


def _tokens(usage: Usage | None) -> dict[str, int | None]:
    prompt, generated = usage or (None, None)
    return {"teacher_prompt_tokens": prompt, "teacher_tokens": generated}


def _bare(name: str) -> str:
    return name.removeprefix("reflection_")
