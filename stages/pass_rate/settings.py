"""Settings of the pass rate stage."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from stages.base import RowSettings
from stages.pass_rate.checks import Check


class PassRateSettings(RowSettings):
    """The `pass_rate` section of a recipe."""

    model: str = Field(default="student", description="Entry of `models` that answers.")
    rollouts: int = Field(
        default=4, ge=1, description="Answers drawn for each row; raising it keeps those drawn."
    )
    max_new_tokens: int = Field(
        default=1024, ge=1, description="Longest rollout; one that reaches it is truncated."
    )
    temperature: float = Field(default=1.0, ge=0, description="Of the sampling; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the sampling.")
    request: str | None = Field(
        default=None,
        min_length=1,
        description="Added to the last user turn after a blank line, for example how the answer is "
        "to be marked; unset: the prompt as it is.",
    )
    check: Check = Field(
        default="math",
        description="How a rollout is compared with the row's answer. math: as mathematics "
        "(math-verify); exact: the same text; normalised: the same text but for case, punctuation, "
        "articles and white space.",
    )
    checks: Mapping[str, Check] = Field(
        default_factory=dict, description="The check of single sources, by the source's name."
    )
    timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="Processor seconds that one comparison as mathematics may take before its "
        "rollout is unverified.",
    )
    gradient: bool = Field(
        default=False,
        description="Measure gradient_norm, which the allocation of further rollouts needs: one "
        "backward pass for every correct rollout.",
    )
    gradient_model: str | None = Field(
        default=None,
        description="Entry of `models` that measures gradients: the same model with engine: "
        "transformers, where `model` generates with vLLM; unset: `model`.",
    )

    def model_post_init(self, _: object) -> None:
        """Refuse rollouts that would all be the same, and a model that nothing would ask."""
        if self.temperature == 0 and self.rollouts > 1:
            raise ValueError(
                f"at temperature 0 all {self.rollouts} rollouts of a row are the same; set "
                "rollouts: 1 or a temperature above 0"
            )
        if self.gradient_model is not None and not self.gradient:
            raise ValueError("gradient_model is named but gradient is false; set gradient: true")
