"""The reasoning stage: length, review ratio and failed-step fraction of a chain of thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from stages.base import Columns, EngineSpec
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.engines.tokens import text_ids
from stages.errors import ConfigError, RowError
from stages.reasoning.judge import Judge, Trace
from stages.reasoning.settings import ReasoningSettings
from stages.reasoning.steps import reasoning_steps
from stages.reasoning.structure import failed_step_fraction, reasoning_characters, review_ratio
from stages.reasoning.trace import chain_of_thought
from stages.reasoning.verdicts import StepVerdict
from stages.rows import OK, Message, canonical_json, instruction, messages_of, status_field
from stages.storage import Store

_ADDS = pa.schema(
    [
        ("reasoning_characters", pa.int32()),
        ("reasoning_steps", pa.int32()),
        ("review_ratio", pa.float32()),
        ("failed_step_fraction", pa.float32()),
        status_field("reasoning"),
    ]
)


class ReasoningStage:
    """Splits chains of thought by rule and has their steps judged.

    A chain of thought that is too short to be judged has its length and the status `short`, which
    isn't a failure; one whose verdicts failed has its length too.
    """

    name = "reasoning"
    version = 2
    on_targets = False

    def __init__(
        self, settings: ReasoningSettings, models: Mapping[str, ModelSettings], seed: int
    ) -> None:
        """Look up the judge.

        Args:
            settings: the recipe's section.
            models: the recipe's models by name.
            seed: the run's; a judge that samples draws from it, the row's id and the window.

        Raises:
            ConfigError: the recipe has no such model, or replies leave no room for a prompt.
        """
        if settings.judge not in models:
            raise ConfigError(
                f"reasoning.judge: no model named {settings.judge!r} in models "
                f"({', '.join(models)})"
            )
        self.settings = settings
        self._judge = models[settings.judge]
        self._seed = seed
        if self._judge.endpoint is None and settings.max_new_tokens >= self._judge.max_length:
            raise ConfigError(
                f"reasoning.max_new_tokens: {settings.max_new_tokens} leaves no room for a prompt "
                f"in models.{settings.judge}.max_length={self._judge.max_length}"
            )

    def check(self) -> None:
        """See that verdicts on a full window fit into a reply (an endpoint has no tokenizer here).

        Raises:
            ConfigError: the shortest form of such a reply is longer than `max_new_tokens`.
        """
        if self._judge.endpoint is not None:
            return
        count = self.settings.window_steps
        verdicts = [{"step": i + 1, "kind": "review", "failed": True} for i in range(count)]
        shortest = text_ids(cached_tokenizer(self._judge), canonical_json({"steps": verdicts}))
        if len(shortest) > self.settings.max_new_tokens:
            raise ConfigError(
                f"reasoning.max_new_tokens: verdicts on window_steps={count} steps take at least "
                f"{len(shortest)} tokens of {self._judge.model}, and "
                f"{self.settings.max_new_tokens} are allowed; raise it, or lower window_steps"
            )

    def columns(self) -> Columns:
        """Reads the original messages; adds length, steps, review ratio, failed-step fraction."""
        return Columns(("id", "messages"), _ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The judge writes verdicts."""
        judge = EngineSpec("generator", self.settings.judge, self._judge, asks="messages")
        return {"judge": judge}

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Length, steps and structure of every row's chain of thought, in order."""
        records: list[dict[str, Any]] = []
        judged: list[tuple[dict[str, Any], Trace]] = []
        for row, messages in zip(rows["id"].to_pylist(), messages_of(rows), strict=True):
            try:
                trace = self._trace(row, messages or [])
            except RowError as error:
                records.append({"reasoning_status": f"failed: {error}"})
                continue
            characters = reasoning_characters(trace.steps)
            record: dict[str, Any] = {
                "reasoning_characters": characters,
                "reasoning_steps": len(trace.steps),
            }
            records.append(record)
            # Without figures of the row: each status is counted under its whole text.
            if characters < self.settings.min_characters:
                record["reasoning_status"] = "short: fewer than min_characters"
            elif len(trace.steps) < self.settings.min_steps:
                record["reasoning_status"] = "short: fewer than min_steps"
            else:
                judged.append((record, trace))
        judge = Judge(engines["judge"], self._judge, self.settings, self._seed)
        verdicts = await judge.verdicts([trace for _, trace in judged])
        for (record, trace), found in zip(judged, verdicts, strict=True):
            record |= _structure(trace.steps, found)
        return pa.Table.from_pylist(records, schema=_ADDS)

    def _trace(self, row: str, messages: Sequence[Message]) -> Trace:
        if not messages or messages[-1]["role"] != "assistant":
            raise RowError("no_response: the conversation doesn't end with an assistant turn")
        text = chain_of_thought(messages[-1])
        steps = reasoning_steps(text, self.settings.min_step_characters)
        return Trace(row, instruction(messages), steps)


def _structure(steps: Sequence[str], verdicts: list[StepVerdict] | RowError) -> dict[str, Any]:
    if isinstance(verdicts, RowError):
        return {"reasoning_status": f"failed: {verdicts}"}
    return {
        "review_ratio": review_ratio(steps, [verdict.kind == "review" for verdict in verdicts]),
        "failed_step_fraction": failed_step_fraction([verdict.failed for verdict in verdicts]),
        "reasoning_status": OK,
    }
