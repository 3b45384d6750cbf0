"""Rollouts: drawn by a model, each with a seed of its own, and what came of them.

What a rollout is depends on its row and its number alone, so rollouts that are drawn later leave
the earlier ones as they are, and a cache finds them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from stages.engines import Completion, GenerationRequest, Sampling, TextGenerator
from stages.engines.settings import ModelSettings
from stages.engines.tokens import chat_tokens
from stages.errors import RowError
from stages.pass_rate.checker import AnswerChecker
from stages.pass_rate.checks import Case, Check, Verdict
from stages.pass_rate.prompts import question
from stages.pass_rate.settings import PassRateSettings
from stages.pass_rate.wilson import wilson_interval
from stages.rows import Message, key_hash, messages_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Problem:
    """A row that can be asked: its prompt's ids, and what its answer is checked against."""

    id: str
    prompt_ids: list[int]
    check: Check
    answer: str


class Rollout(NamedTuple):
    """One answer of the model, and the verdict on it."""

    completion: Completion
    verdict: Verdict


@dataclass(frozen=True)
class Tally:
    """Verdicts of one row, counted."""

    rollouts: int
    correct: int
    truncated: int
    unverified: int

    @classmethod
    def of(cls, verdicts: Sequence[str]) -> Tally:
        """The counts of a row's verdicts."""
        names = ("correct", "truncated", "unverified")
        return cls(len(verdicts), *(sum(verdict == name for verdict in verdicts) for name in names))

    @property
    def decided(self) -> int:
        """Rollouts that were finished and could be checked."""
        return self.rollouts - self.truncated - self.unverified

    @property
    def pass_rate(self) -> float | None:
        r"""The share of correct ones among the decided, or None where there are none.

        .. math:: \hat p = \frac{c}{n - n_\mathrm{truncated} - n_\mathrm{unverified}}
        """
        return self.correct / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % Wilson interval of the pass rate, or None where there is no pass rate."""
        return wilson_interval(self.correct, self.decided) if self.decided else None

    @property
    def undecided(self) -> str | None:
        """Why there is no pass rate, or None where there is one."""
        if self.decided:
            return None
        if self.truncated == self.rollouts:
            return "every rollout was truncated"
        if self.unverified == self.rollouts:
            return "no rollout could be checked in time"
        return "every rollout was truncated or could not be checked in time"


async def problems_of(
    rows: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelSettings,
    settings: PassRateSettings,
    checker: AnswerChecker,
) -> list[Problem | RowError]:
    """Every row as a problem, or why it can't be one, in order.

    Args:
        rows: with the columns id, source, messages and answer.
        tokenizer: the model's.
        model: that will answer; its window holds prompt and rollout.
        settings: the request, and the check of each source.
        checker: sees whether reference answers can be read.
    """
    problems = [
        _problem(*row, tokenizer, model, settings)
        for row in zip(
            rows["id"].to_pylist(),
            rows["source"].to_pylist(),
            messages_of(rows),
            rows["answer"].to_pylist(),
            strict=True,
        )
    ]
    answers = [(p.check, p.answer) for p in problems if isinstance(p, Problem)]
    reasons = iter(await asyncio.to_thread(checker.unusable, answers))
    checked: list[Problem | RowError] = []
    for problem in problems:
        reason = next(reasons) if isinstance(problem, Problem) else None
        checked.append(RowError(f"unreadable_answer: {reason}") if reason else problem)
    return checked


async def drawn_rollouts(
    problems: Sequence[Problem],
    numbers: Sequence[range],
    generator: TextGenerator,
    checker: AnswerChecker,
    sampling: Sampling,
    seed: int,
) -> list[list[Rollout]]:
    """Draw and check rollouts of the given numbers (counted from 0) of every problem.

    They are asked for in one call, rollout k of all problems before rollout k + 1 of any.

    Args:
        problems: any number.
        numbers: which rollouts, one range a problem.
        generator: the model.
        checker: of the answers.
        sampling: how they are drawn.
        seed: the run's.

    Returns:
        The rollouts of every problem, in order of their numbers.
    """
    order = sorted(
        ((number, place) for place, wanted in enumerate(numbers) for number in wanted),
    )
    requests = [
        GenerationRequest(
            problems[place].prompt_ids, rollout_seed(problems[place].id, number, seed)
        )
        for number, place in order
    ]
    completions = await generator.generate(requests, sampling) if requests else []
    finished = [
        Case(problems[place].check, problems[place].answer, completion.text)
        for (_, place), completion in zip(order, completions, strict=True)
        if completion.finish_reason != "length"
    ]
    verdicts = iter(await asyncio.to_thread(checker.verdicts, finished))
    rollouts: list[list[Rollout]] = [[] for _ in problems]
    for (_, place), completion in zip(order, completions, strict=True):
        cut = completion.finish_reason == "length"
        rollouts[place].append(Rollout(completion, "truncated" if cut else next(verdicts)))
    return rollouts


def rollout_seed(row: str, number: int, seed: int) -> int:
    """The 64-bit seed of a row's rollout of that number, counted from 0."""
    return key_hash(f"{row}:rollout:{number}", seed)


def sampling_of(settings: PassRateSettings) -> Sampling:
    """How rollouts are drawn."""
    return Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)


def _problem(
    row: str,
    source: str,
    messages: list[Message] | None,
    answer: str | None,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelSettings,
    settings: PassRateSettings,
) -> Problem | RowError:
    if answer is None or not answer.strip():
        return RowError("no_answer: the row has no reference answer")
    try:
        turns = question(messages or [], settings.request)
        ids = chat_tokens(tokenizer, turns, open_turn=True).ids
    except RowError as error:
        return error
    if len(ids) + settings.max_new_tokens > model.max_length:
        return RowError(
            f"prompt_too_long: {len(ids)} tokens and {settings.max_new_tokens} new ones exceed "
            f"{model.max_length}"
        )
    return Problem(row, ids, settings.checks.get(source, settings.check), answer)
