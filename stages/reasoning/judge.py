"""Asking the judge: windows of steps of many rows in one engine call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from stages.engines import Completion, Sampling
from stages.engines.chat import ChatFailure, ChatRequest, chat_generator
from stages.engines.settings import ModelSettings
from stages.errors import RowError
from stages.reasoning.prompts import judge_prompt
from stages.reasoning.settings import ReasoningSettings
from stages.reasoning.verdicts import JudgeReply, StepVerdict, step_verdicts
from stages.rows import canonical_json, key_hash


class Trace(NamedTuple):
    """A row's chain of thought: its steps, and the problem they are about (None: not known)."""

    id: str
    problem: str | None
    steps: Sequence[str]


class Judge:
    """Asks for verdicts; every window of every row goes in one call."""

    def __init__(
        self, engine: Any, model: ModelSettings, settings: ReasoningSettings, seed: int
    ) -> None:
        """Keep the engine, and how it is asked."""
        self._chat = chat_generator(engine, model)
        self._settings = settings
        schema = canonical_json(JudgeReply.model_json_schema()) if model.takes_schema else None
        self._sampling = Sampling(settings.max_new_tokens, settings.temperature, schema=schema)
        self._seed = seed

    async def verdicts(self, traces: Sequence[Trace]) -> list[list[StepVerdict] | RowError]:
        """The verdict on every step of every chain of thought, in order, or why there is none.

        A row of which one window can't be asked, or has an unreadable reply, has no verdicts.
        """
        asked = [windows(len(trace.steps), self._settings.window_steps) for trace in traces]
        requests = [
            self._request(trace, number, window)
            for trace, found in zip(traces, asked, strict=True)
            for number, window in enumerate(found)
        ]
        replies = iter(await self._chat.chat(requests, self._sampling) if requests else [])
        results: list[list[StepVerdict] | RowError] = []
        for found in asked:
            # Taken whether readable or not, so that the next row meets its own replies.
            answered = [(next(replies), window) for window in found]
            try:
                results.append([verdict for pair in answered for verdict in _verdicts(*pair)])
            except RowError as error:
                results.append(error)
        return results

    def _request(self, trace: Trace, number: int, window: range) -> ChatRequest:
        prompt = judge_prompt(trace.problem, trace.steps, window, self._settings.opening_characters)
        return ChatRequest(prompt, key_hash(f"{trace.id}:reasoning:{number}", self._seed))


def _verdicts(reply: Completion | ChatFailure, window: range) -> list[StepVerdict]:
    if isinstance(reply, Completion):
        return step_verdicts(reply, window)
    remedy = "; lower window_steps or opening_characters"
    raise RowError(f"{reply}{remedy if reply.code == 'prompt_too_long' else ''}")


def windows(steps: int, at_most: int) -> list[range]:
    """Consecutive windows over the steps, as few as can be and of nearly equal size."""
    count = -(-steps // at_most)
    return [range(i * steps // count, (i + 1) * steps // count) for i in range(count)]
