"""Settings of the difficulty stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import RowSettings


class DifficultySettings(RowSettings):
    """The `difficulty` section of a recipe."""

    student: str = Field(default="student", description="Name of the scoring model in `models`.")
    variant: Literal["ppl_ratio", "loss_ratio"] = Field(
        default="ppl_ratio",
        description="exp of the loss difference (Superfiltering), or ratio of losses (Cherry LLM).",
    )
    mode: Literal["strict", "compat"] = Field(
        default="strict",
        description="strict: same response ids in both passes, under the model's chat template; "
        "compat: what the published scorer computes, single-turn rows only.",
    )
    template: Literal["chat", "alpaca", "vicuna"] = Field(
        default="chat", description="Prompt format; strict takes chat, compat alpaca or vicuna."
    )
    min_response_tokens: int = Field(
        default=2, ge=1, description="A shorter response has no score: its IFD is noise."
    )

    def model_post_init(self, _: object) -> None:
        """Refuse a template that the mode has no meaning for."""
        if (self.mode == "strict") != (self.template == "chat"):
            wanted = "chat" if self.mode == "strict" else "alpaca or vicuna"
            raise ValueError(f"mode {self.mode} needs template {wanted}, not {self.template}")
