"""One row on its way through the phases, and the columns that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from stages.errors import RowError
from stages.reflection.parsing import Rewrite
from stages.rows import LABEL, MESSAGES, OK, Message, instruction, response, status_field

if TYPE_CHECKING:
    from stages.difficulty.losses import InstructionLoss, ResponseLoss

ADDS = pa.schema(
    [
        ("messages_reflected", MESSAGES),
        status_field("reflection"),
        ("reflection_outcome", LABEL),
        ("reflection_instruction_result", LABEL),
        ("reflection_response_result", LABEL),
        ("ifd_before", pa.float32()),
        ("ifd_candidate", pa.float32()),
        ("ifd_effective", pa.float32()),
        ("rifd_before", pa.float32()),
        ("rifd_candidate", pa.float32()),
        ("rifd_effective", pa.float32()),
        ("teacher_tokens", pa.int32()),
        ("answer_effective", pa.string()),
    ]
)
"""`candidate`: the instruction candidate's IFD, the response candidate's r-IFD. `effective`: scores
of the text that stands after reflection. `answer_effective`: the row's answer while its instruction
stands, else null."""

Outcome = Literal["both", "instruction", "response", "none", "failed"]


@dataclass
class ReflectedRow:
    """A row, what stands of it so far, and what happened to each rewrite.

    Attributes:
        id: the row's identity.
        messages: the text that stands so far.
        answer: the row's reference answer, or None.
        error: why the row can't be reflected on, or None.
        ifd: losses of the response that stands.
        rifd: losses of the instruction that stands, or None where it can't be scored.
        instruction_result: the verdict on the instruction candidate, or the code of its failure.
        response_result: the same for the response candidate.
        teacher_tokens: tokens that the teacher generated for this row; None where an endpoint
            doesn't report them.
    """

    id: str
    messages: list[Message]
    answer: str | None
    error: RowError | None = None
    ifd: ResponseLoss | None = None
    rifd: InstructionLoss | None = None
    instruction_result: str | None = None
    response_result: str | None = None
    teacher_tokens: int | None = 0
    ifd_before: float | None = None
    ifd_candidate: float | None = None
    rifd_before: float | None = None
    rifd_candidate: float | None = None

    @property
    def exchange(self) -> Rewrite:
        """The instruction and the response that stand."""
        return Rewrite(instruction(self.messages) or "", response(self.messages) or "")

    @property
    def instruction_changed(self) -> bool:
        """Whether the teacher's instruction stands."""
        return self.instruction_result == "accepted"

    @property
    def outcome(self) -> Outcome:
        """Which rewrites stand."""
        if self.error is not None:
            return "failed"
        response_changed = self.response_result == "accepted"
        if self.instruction_changed:
            return "both" if response_changed else "instruction"
        return "response" if response_changed else "none"

    def values(self) -> dict[str, Any]:
        """The added columns; a failed row has nulls but for status, outcome and answer."""
        if self.error is not None:
            return {
                "reflection_status": f"failed: {self.error}",
                "reflection_outcome": self.outcome,
                "answer_effective": self.answer,
            }
        return {
            "messages_reflected": self.messages if self.outcome != "none" else None,
            "reflection_status": OK,
            "reflection_outcome": self.outcome,
            "reflection_instruction_result": self.instruction_result,
            "reflection_response_result": self.response_result,
            "ifd_before": self.ifd_before,
            "ifd_candidate": self.ifd_candidate,
            "ifd_effective": self.ifd.ifd if self.ifd else None,
            "rifd_before": self.rifd_before,
            "rifd_candidate": self.rifd_candidate,
            "rifd_effective": self.rifd.rifd if self.rifd else None,
            "teacher_tokens": self.teacher_tokens,
            "answer_effective": None if self.instruction_changed else self.answer,
        }


def added_columns(rows: Sequence[ReflectedRow]) -> pa.Table:
    """The added columns of all rows, in order."""
    values = [row.values() for row in rows]
    return pa.table(
        [pa.array([value.get(field.name) for value in values], field.type) for field in ADDS],
        schema=ADDS,
    )
