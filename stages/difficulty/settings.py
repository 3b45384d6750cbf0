"""Settings of the difficulty stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import RowSettings
from stages.difficulty.templates import Template


class DifficultySettings(RowSettings):
    """The `difficulty` section of a recipe."""

    student: str = Field(default="student", description="Name of the scoring model in `models`.")
    variant: Literal["ppl_ratio", "loss_ratio", "loss_ratio_prefixed"] = Field(
        default="ppl_ratio",
        description="exp of the loss difference (Superfiltering, Selective Reflection-Tuning); "
        "ratio of losses; ratio with L(y) taken after the response's header (Cherry LLM's script).",
    )
    mode: Literal["strict", "compat"] = Field(
        default="strict",
        description="strict: ids concatenated, the same response ids in both passes; compat: what "
        "the published scorers compute, single-turn rows only.",
    )
    template: Template = Field(
        default="chat",
        description="Prompt format: the model's own chat template, or a plain training format; "
        "compat takes alpaca, vicuna or plain.",
    )
    rifd: bool = Field(
        default=False,
        description="Score the instruction against the response as well (r-IFD): two more passes.",
    )
    min_response_tokens: int = Field(
        default=2, ge=1, description="A shorter response has no score: its IFD is noise."
    )

    def model_post_init(self, _: object) -> None:
        """Refuse a template that the mode or the variant has no meaning for."""
        if self.mode == "compat" and self.template == "chat":
            raise ValueError("mode compat needs template alpaca, vicuna or plain, not chat")
        if self.variant == "loss_ratio_prefixed" and self.template == "plain":
            raise ValueError(
                "variant loss_ratio_prefixed needs a template with a response header, and plain "
                "has none: use chat, alpaca or vicuna, or variant loss_ratio"
            )
        if self.mode == "compat" and self.template == "plain" and self.rifd:
            raise ValueError("the published scorer of template plain has no r-IFD; set rifd: false")
