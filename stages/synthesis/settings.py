"""What a synthesis recipe says of the three models and the filters."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.base import Settings
from stages.synthesis.wording import REQUEST_WORDS

Share = Annotated[float, Field(ge=0, le=1)]

BOXED_REQUEST = "Reason step by step, and put your final answer in \\boxed{}."


class GeneratorSettings(Settings):
    """Who writes problems, and how many."""

    model: str = Field(default="generator", description="Entry of `models` that writes problems.")
    samples: int = Field(ge=1, description="Problems to sample, before any filter.")
    temperature: float = Field(default=1.0, gt=0, description="Of the sampling.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the sampling.")
    max_new_tokens: int = Field(
        default=1024, ge=1, description="Longest problem; one that reaches it is left out."
    )


class TeacherSettings(Settings):
    """Who solves them."""

    model: str = Field(default="teacher", description="Entry of `models` that solves problems.")
    request: str | None = Field(
        default=BOXED_REQUEST,
        min_length=1,
        description="Sentence after the problem, which the row doesn't keep. null: none.",
    )
    template: dict[str, Any] = Field(
        default_factory=dict, description="Variables of the chat template (enable_thinking: true)."
    )
    temperature: float = Field(default=0.6, ge=0, description="Of the sampling; 0 is greedy.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Nucleus of the sampling.")
    max_new_tokens: int = Field(
        default=4096, ge=1, description="Longest solution; one that reaches it is left out."
    )


class StudentSettings(Settings):
    """Who mustn't solve them."""

    model: str = Field(default="student", description="Entry of `models` that tries the problems.")
    request: str | None = Field(
        default=BOXED_REQUEST, min_length=1, description="Sentence after the problem. null: none."
    )
    template: dict[str, Any] = Field(
        default_factory=dict, description="Variables of the chat template (enable_thinking: false)."
    )
    rollouts: int = Field(default=1, ge=1, description="Attempts at each problem.")
    temperature: float = Field(default=0.0, ge=0, description="Of the sampling; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the sampling.")
    max_new_tokens: int = Field(
        default=2048, ge=1, description="Longest attempt; one that reaches it says nothing."
    )
    check: Literal["math", "exact", "normalised"] = Field(
        default="math", description="How its answer is compared with the teacher's."
    )
    timeout_s: float = Field(
        default=5.0, gt=0, description="Longest comparison; one that takes longer says nothing."
    )
    solved_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="A problem is left out when at least this share of the finished attempts "
        "agrees with the teacher.",
    )

    @model_validator(mode="after")
    def _rollouts_differ(self) -> Self:
        if self.rollouts > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.rollouts} greedy rollouts are one and the same; "
                "set a temperature, or rollouts: 1"
            )
        return self


class FilterSettings(Settings):
    """What a problem and its solution have to be."""

    require_request: bool = Field(default=True, description="Leave out what asks for nothing.")
    request_words: tuple[str, ...] = Field(
        default=REQUEST_WORDS,
        description="Words that open a request where there is no question mark.",
    )
    languages: tuple[str, ...] | None = Field(
        default=("en",), min_length=1, description="ISO 639-1 codes. null: any language."
    )
    min_language_probability: Share = Field(
        default=0.5, description="Of the most probable language; formulas aren't looked at."
    )
    min_characters: int = Field(default=20, ge=1, description="Of a problem.")
    max_characters: int = Field(default=4000, ge=1, description="Of a problem.")
    repetition_words: int = Field(
        default=6, ge=1, description="Length of the word n-grams that a text may repeat."
    )
    max_problem_repetition: Share = Field(
        default=0.2, description="Share of a problem's n-grams that may be repeats."
    )
    max_solution_repetition: Share = Field(
        default=0.5, description="Share of a solution's n-grams that may be repeats."
    )
    overlap_words: int = Field(
        default=8, ge=1, description="Length of the word n-grams shared with sources and targets."
    )
    max_source_overlap: Share = Field(
        default=0.5, description="Share of a problem's n-grams that one source row may hold."
    )
    max_target_overlap: Share = Field(
        default=0.0, description="Share of a problem's n-grams that one target row may hold."
    )
    require_answer: bool = Field(
        default=True, description="Leave out solutions that state no final answer."
    )

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters {self.min_characters} is more than max_characters "
                f"{self.max_characters}"
            )
        return self
