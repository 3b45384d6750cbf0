"""Asking the judge: windows of steps of many rows in one engine call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from stages.engines import GenerationRequest, Sampling, TextGenerator
from stages.engines.settings import ModelSettings
from stages.engines.tokens import chat_tokens
from stages.errors import RowError
from stages.reasoning.prompts import judge_prompt
from stages.reasoning.settings import ReasoningSettings
from stages.reasoning.verdicts import StepVerdict, step_verdicts
from stages.rows import key_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Trace(NamedTuple):
    """A row's chain of thought: its steps, and the problem they are about (None: not known)."""

    id: str
    problem: str | None
    steps: Sequence[str]


class Judge:
    """Asks for verdicts; every window of every row goes in one call."""

    def __init__(
        self,
        engine: TextGenerator,
        tokenizer: PreTrainedTokenizerBase,
        model: ModelSettings,
        settings: ReasoningSettings,
        seed: int,
    ) -> None:
        """Keep the engine, and how it is asked."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._model = model
        self._settings = settings
        self._sampling = Sampling(settings.max_new_tokens, settings.temperature)
        self._seed = seed

    async def verdicts(self, traces: Sequence[Trace]) -> list[list[StepVerdict] | RowError]:
        """The verdict on every step of every chain of thought, in order, or why there is none.

        A row of which one window can't be asked, or has an unreadable reply, has no verdicts.
        """
        asked = [self._requests(trace) for trace in traces]
        flat = [pair for pairs in asked if not isinstance(pairs, RowError) for pair in pairs]
        requests = [request for request, _ in flat]
        replies = iter(await self._engine.generate(requests, self._sampling) if flat else [])
        results: list[list[StepVerdict] | RowError] = []
        for pairs in asked:
            if isinstance(pairs, RowError):
                results.append(pairs)
                continue
            # Taken whether readable or not, so that the next row meets its own replies.
            answered = [(next(replies), window) for _, window in pairs]
            try:
                results.append([verdict for pair in answered for verdict in step_verdicts(*pair)])
            except RowError as error:
                results.append(error)
        return results

    def _requests(self, trace: Trace) -> list[tuple[GenerationRequest, range]] | RowError:
        """One request a window, or why the row can't be asked about."""
        try:
            return [
                (self._request(trace, number, window), window)
                for number, window in enumerate(
                    windows(len(trace.steps), self._settings.window_steps)
                )
            ]
        except RowError as error:
            return error

    def _request(self, trace: Trace, number: int, window: range) -> GenerationRequest:
        prompt = judge_prompt(trace.problem, trace.steps, window, self._settings.opening_characters)
        ids = chat_tokens(self._tokenizer, prompt, open_turn=True).ids
        new = self._sampling.max_new_tokens
        if len(ids) + new > self._model.max_length:
            raise RowError(
                f"prompt_too_long: {len(ids)} tokens and {new} new ones exceed the judge's "
                f"{self._model.max_length}; lower window_steps or opening_characters"
            )
        return GenerationRequest(ids, key_hash(f"{trace.id}:reasoning:{number}", self._seed))


def windows(steps: int, at_most: int) -> list[range]:
    """Consecutive windows over the steps, as few as can be and of nearly equal size."""
    count = -(-steps // at_most)
    return [range(i * steps // count, (i + 1) * steps // count) for i in range(count)]
