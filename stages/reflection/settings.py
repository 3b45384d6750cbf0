"""The reflection section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import RowSettings

Reply = Literal["tagged", "json", "whole"]
Phases = Literal["both", "instruction", "response"]


class ReflectionSettings(RowSettings):
    """Who rewrites, who judges, what is asked for, and when a rewrite stands."""

    teacher: str = Field(default="teacher", description="Entry of `models` that rewrites.")
    student: str = Field(default="student", description="Entry of `models` that scores.")
    reply: Reply = Field(
        default="tagged",
        description="Form of the teacher's reply. tagged: a critique, then the rewrite between "
        "tags; json: one JSON object; whole: the rewrite and nothing else, instruction and "
        "response asked for one at a time, for small teachers that keep to no format.",
    )
    phases: Phases = Field(
        default="both",
        description="What may be rewritten: the instruction, then the response, or one of them.",
    )
    max_new_tokens: int = Field(
        default=512, ge=1, description="Longest reply; one that reaches it is refused as truncated."
    )
    temperature: float = Field(default=0.0, ge=0, description="Of the teacher; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the teacher's sampling.")
    margin: float = Field(
        default=0.0,
        ge=0,
        description="Nats per token by which log IFD must rise, or log r-IFD fall, for a rewrite "
        "to stand; a difference within the margin keeps the original.",
    )
    max_ifd: float | None = Field(
        default=1.0,
        gt=0,
        description="A rewrite of this IFD or more is refused: its prompt doesn't help to predict "
        "its response, so they don't belong together. null: no such rule.",
    )
    max_failed_share: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the rewrites asked for in one phase of one shard that may fail "
        "(unreadable reply, prompt too long for the teacher) before the stage stops; 1: never.",
    )
