"""The reflection section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from stages.base import RowSettings
from stages.pass_rate.checks import Check

Form = Literal["tagged", "json", "whole"]
Reply = Form | Literal["auto"]
Phases = Literal["both", "instruction", "response"]


class ReflectionSettings(RowSettings):
    """Who rewrites, who judges, what is asked for, and when a rewrite stands."""

    teacher: str = Field(default="teacher", description="Entry of `models` that rewrites.")
    student: str = Field(default="student", description="Entry of `models` that scores.")
    mode: Literal["sequential", "grid"] = Field(
        default="sequential",
        description="sequential: the response is rewritten for the instruction that stands, two "
        "rewrites a row (the paper); grid: for both instructions, three rewrites a row, all "
        "versions scored and one chosen as the released code does.",
    )
    phases: Phases = Field(
        default="both",
        description="What may be rewritten: the instruction, then the response, or one of them.",
    )
    turns: Literal["last", "every"] = Field(
        default="last",
        description="last: the last exchange of user and assistant; every: each exchange in "
        "order, earlier turns as they stand by then.",
    )
    no_selection: bool = Field(
        default=False,
        description="Every rewrite that can be read and passes the checks stands, whatever the "
        "student's scores (the first Reflection-Tuning); needs max_ifd: null.",
    )
    require_response_rewrite: bool = Field(
        default=False,
        description="Selection drops the rows that were reflected on and whose response wasn't "
        "replaced (the paper).",
    )
    reply: Reply = Field(
        default="auto",
        description="Form of the teacher's reply. tagged: a critique, then the rewrite between "
        "tags; json: one JSON object; whole: the rewrite and nothing else, instruction and "
        "response asked for one at a time, for small teachers that keep to no format; auto: that "
        "of which most could be read when a few rows were tried (the stage `replies`).",
    )
    prompts: str | None = Field(
        default=None,
        description="File with the wording of what the teacher is asked (`tamis prompts` prints "
        "one); unset: the project's own.",
    )
    max_new_tokens: int = Field(
        default=512, ge=1, description="Longest reply; one that reaches it is refused as truncated."
    )
    temperature: float = Field(default=0.0, ge=0, description="Of the teacher; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the teacher's sampling.")
    margin: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Nats per token by which log IFD must rise, or log r-IFD fall, for a rewrite "
        "to stand; a difference within the margin keeps the original.",
    )
    max_ifd: float | None = Field(
        default=1.0,
        gt=0,
        description="A rewrite of this IFD or more is refused: its prompt doesn't help to predict "
        "its response, so they don't belong together. null: no such rule.",
    )
    max_rifd: float | None = Field(
        default=None,
        gt=0,
        description="A new response after which the instruction has this r-IFD or more is refused: "
        "it says nothing of the instruction. null: no such rule.",
    )
    rifd: bool = Field(
        default=False,
        description="Score r-IFD of every version, one or two more passes each. Phase 2 compares "
        "losses without it; max_rifd and grid score it in any case.",
    )
    check: Check = Field(
        default="math",
        description="How a new response is compared with the row's answer. math: as mathematics "
        "(math-verify); exact: the same text; normalised: the same text but for case, punctuation, "
        "articles and white space.",
    )
    checks: Mapping[str, Check] = Field(
        default_factory=dict, description="The check of single sources, by the source's name."
    )
    timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="Processor seconds that one comparison as mathematics may take before the "
        "rewrite is refused.",
    )
    max_failed_share: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the rewrites asked for in one phase of one shard that may fail "
        "(unreadable reply, prompt too long for the teacher) before the stage stops; 1: never.",
    )

    @property
    def scores_rifd(self) -> bool:
        """Whether the denominator of r-IFD is needed, and not the losses alone."""
        return self.rifd or self.max_rifd is not None or self.mode == "grid"

    def model_post_init(self, _: object) -> None:
        """Refuse settings that would have no effect beside each other."""
        if self.mode == "grid" and self.phases != "both":
            raise ValueError(
                f"mode grid rewrites both, not phases: {self.phases}; leave phases out"
            )
        if self.no_selection and self.mode == "grid":
            raise ValueError("mode grid is a selection; use mode: sequential with no_selection")
        if self.no_selection and (self.margin or self.max_ifd or self.max_rifd):
            raise ValueError(
                "no_selection lets no score decide; set max_ifd: null, and no margin or max_rifd"
            )
        if self.phases == "instruction" and self.max_rifd is not None:
            raise ValueError("max_rifd is a rule for new responses; phases: instruction has none")
        if self.phases == "instruction" and self.require_response_rewrite:
            raise ValueError(
                "require_response_rewrite would drop every row with phases: instruction"
            )
