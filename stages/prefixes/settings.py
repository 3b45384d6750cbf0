"""Settings of the prefixes stage."""

from __future__ import annotations

from pydantic import Field

from stages.base import RowSettings

FIRST_STEP = (
    "Write only how a solution begins: a first step that can be built on. It need not reach the "
    "result."
)
"""What the training prompt of a prefix asks for."""


class PrefixesSettings(RowSettings):
    """The `prefixes` section of a recipe."""

    model: str = Field(
        default="student", description="Entry of `models` that solves, and will be trained."
    )
    tokens: int = Field(
        default=32,
        ge=8,
        le=128,
        description="Tokens of a prefix. Published: 8 for a general model, 32 for one tuned to "
        "mathematics, 128 for one that reasons at length.",
    )
    share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of the prompts (by hash) that keep their whole solution instead.",
    )
    max_new_tokens: int = Field(
        default=1024, ge=1, description="Longest whole solution; one that reaches it is left out."
    )
    temperature: float = Field(default=0.7, ge=0, description="Of the sampling; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the sampling.")
    request: str | None = Field(
        default=None,
        min_length=1,
        description="Added to the last user turn after a blank line where a solution is sampled, "
        "and in the training prompt of a whole one; unset: the prompt as it is.",
    )
    prefix_request: str = Field(
        default=FIRST_STEP,
        min_length=1,
        description="Added instead in the training prompt of a prefix, so that a model learns to "
        "begin so only where it is asked to.",
    )
    end_token: bool = Field(
        default=False, description="Put the end-of-text token behind a prefix that was cut."
    )
