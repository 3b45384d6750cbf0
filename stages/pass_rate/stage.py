"""The pass rate stage: how often a model answers each row correctly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from stages.base import Columns, EngineSpec
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, RowError
from stages.pass_rate.checker import AnswerChecker
from stages.pass_rate.gradient import gradient_norms
from stages.pass_rate.rollouts import (
    Problem,
    Rollout,
    Tally,
    drawn_rollouts,
    problems_of,
    sampling_of,
)
from stages.pass_rate.settings import PassRateSettings
from stages.rows import OK, status_field
from stages.storage import Store

_ADDS = pa.schema(
    [
        ("rollouts", pa.int32()),
        ("correct", pa.int32()),
        ("truncated", pa.int32()),
        ("unverified", pa.int32()),
        ("rollout_verdicts", pa.list_(pa.string())),
        ("rollout_tokens", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("pass_rate", pa.float32()),
        ("pass_rate_low", pa.float32()),
        ("pass_rate_high", pa.float32()),
        ("gradient_norm", pa.float32()),
        status_field("pass_rate"),
    ]
)


class PassRateStage:
    """Draws rollouts of every row, checks them, and adds the pass rate with its interval."""

    name = "pass_rate"
    version = 1
    on_targets = False

    def __init__(
        self, settings: PassRateSettings, models: Mapping[str, ModelSettings], seed: int
    ) -> None:
        """Look up the models.

        Args:
            settings: the recipe's section.
            models: the recipe's models by name.
            seed: the run's; a rollout is drawn from it, the row's id and the rollout's number.

        Raises:
            ConfigError: the recipe has no such model, rollouts leave no room for a prompt, or the
                model can't give gradients.
        """
        gradient = settings.gradient_model or settings.model
        for field, model in (("model", settings.model), ("gradient_model", gradient)):
            if model not in models:
                raise ConfigError(
                    f"pass_rate.{field}: no model named {model!r} in models ({', '.join(models)})"
                )
        self.settings = settings
        self._model = models[settings.model]
        self._gradient_name, self._gradient = gradient, models[gradient]
        self._seed = seed
        if settings.max_new_tokens >= self._model.max_length:
            raise ConfigError(
                f"pass_rate.max_new_tokens: {settings.max_new_tokens} leaves no room for a prompt "
                f"in models.{settings.model}.max_length={self._model.max_length}"
            )
        if settings.gradient:
            self._check_gradient_model()

    def columns(self) -> Columns:
        """Needs the prompt and the reference answer; adds counts, rate, interval and costs."""
        return Columns(("id", "source", "messages", "answer"), _ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The model that answers, and where gradients are measured the one that gives them."""
        specs = {"model": EngineSpec("generator", self.settings.model, self._model)}
        if self.settings.gradient:
            specs["gradient"] = EngineSpec("scorer", self._gradient_name, self._gradient)
        return specs

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Pass rate of every row, in order.

        Raises:
            StageError: answers can't be checked at all.
        """
        tokenizer = cached_tokenizer(self._model)
        settings = self.settings
        with AnswerChecker(settings.timeout_s) as checker:
            asked = await problems_of(rows, tokenizer, self._model, settings, checker)
            problems = [problem for problem in asked if isinstance(problem, Problem)]
            drawn = await drawn_rollouts(
                problems,
                [range(settings.rollouts)] * len(problems),
                engines["model"],
                checker,
                sampling_of(settings),
                self._seed,
            )
        norms: list[float | None] = [None] * len(problems)
        if settings.gradient:
            norms = await gradient_norms(problems, drawn, engines["gradient"])
        done = iter(map(_record, problems, drawn, norms))
        records = [
            {"pass_rate_status": f"failed: {problem}"}
            if isinstance(problem, RowError)
            else next(done)
            for problem in asked
        ]
        return pa.Table.from_pylist(records, schema=_ADDS)

    def _check_gradient_model(self) -> None:
        where = f"models.{self._gradient_name}"
        if self._gradient.engine != "transformers":
            raise ConfigError(
                f"{where}: pass_rate.gradient needs engine: transformers, and this has "
                f"{self._gradient.engine}; declare the model a second time with engine: "
                "transformers and name it in pass_rate.gradient_model"
            )
        if self._gradient.model != self._model.model:
            raise ConfigError(
                f"{where} is {self._gradient.model} and models.{self.settings.model} is "
                f"{self._model.model}; pass_rate.gradient_model must be the same model"
            )
        if self._gradient.max_length < self._model.max_length:
            raise ConfigError(
                f"{where}.max_length={self._gradient.max_length} is below the "
                f"{self._model.max_length} of models.{self.settings.model}, whose rollouts it reads"
            )


def _record(problem: Problem, drawn: list[Rollout], norm: float | None) -> dict[str, Any]:
    verdicts = [rollout.verdict for rollout in drawn]
    tally = Tally.of(verdicts)
    low, high = tally.interval or (None, None)
    return {
        "rollouts": tally.rollouts,
        "correct": tally.correct,
        "truncated": tally.truncated,
        "unverified": tally.unverified,
        "rollout_verdicts": verdicts,
        "rollout_tokens": sum(len(rollout.completion.token_ids) for rollout in drawn),
        "prompt_tokens": len(problem.prompt_ids),
        "pass_rate": tally.pass_rate,
        "pass_rate_low": low,
        "pass_rate_high": high,
        "gradient_norm": norm,
        "pass_rate_status": f"undecided: {tally.undecided}" if tally.undecided else OK,
    }
