"""The losses that IFD and r-IFD are made of, in `strict` mode.

Ids are concatenated, never re-encoded; the response has the same ids with and without its prompt;
a text without a prompt is scored after a start token, so that its first token counts in both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

from stages.difficulty.templates import Template, conversation_ids, header_ids, prompt_ids
from stages.engines import ScoreRequest, TokenScorer
from stages.engines.tokens import start_ids, text_ids
from stages.errors import EngineError, RowError
from stages.rows import Message, instruction, prompt, response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OVERFLOW = 700.0
"""Nats; e to a higher power is no float64."""

REVERSE_PROMPT = (
    "Here is a reply that an assistant gave:\n\n{response}\n\n"
    "Write the request that this reply answers. Give the request only."
)
"""Asks for the instruction behind a response; its wording is part of r-IFD's identity."""


def reverse_prompt_digest() -> str:
    """What tells one wording of REVERSE_PROMPT from another, in hex."""
    return hashlib.sha256(REVERSE_PROMPT.encode()).hexdigest()


@dataclass(frozen=True)
class ResponseLoss:
    """Mean losses of a response, nats per token, over the same tokens with and without prompt."""

    given_prompt: float
    alone: float
    tokens: int
    truncated: bool

    @property
    def ifd(self) -> float:
        r"""How little the prompt helps to predict the response.

        .. math:: \mathrm{IFD}(y \mid x) = \exp\bigl(L(y \mid x) - L(y)\bigr)

        Source: Selective Reflection-Tuning (arXiv 2402.10110), Eq. 3; Superfiltering's form.
        """
        return math.exp(min(self.given_prompt - self.alone, _OVERFLOW))

    @property
    def loss_ratio(self) -> float:
        r"""A ratio of losses: :math:`L(y \mid x) / L(y)`.

        Source: Cherry LLM (arXiv 2308.12032), Eq. 5; its published script takes L(y) after the
        response's header (variant `loss_ratio_prefixed`).
        """
        return self.given_prompt / self.alone


@dataclass(frozen=True)
class InstructionLoss:
    """Mean losses of an instruction, nats a token, after and without the response wrapped as y'.

    `alone` is None where it wasn't asked for.
    """

    given_response: float
    alone: float | None
    tokens: int

    @property
    def rifd(self) -> float | None:
        r"""How little the response tells about the instruction; None without its denominator.

        .. math:: \mathrm{rIFD}(x \mid y) = \exp\bigl(L(x \mid y') - L(x)\bigr)

        Source: Selective Reflection-Tuning (arXiv 2402.10110), Eq. 8.
        """
        if self.alone is None:
            return None
        return math.exp(min(self.given_response - self.alone, _OVERFLOW))


async def response_losses(
    scorer: TokenScorer,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_length: int,
    *,
    template: Template = "chat",
    prefixed: bool = False,
) -> list[ResponseLoss | RowError]:
    """L(y|x) and L(y) of every conversation's response.

    Args:
        scorer: the student.
        tokenizer: the student's tokenizer.
        conversations: turns that end with the assistant's; earlier turns are context.
        max_length: tokens; a longer response is cut (the same cut in both passes).
        template: how turns become a prompt.
        prefixed: L(y) is taken after the response's header instead of a start token.

    Returns:
        One result a conversation, in order: its losses, or why it has none.

    Raises:
        EngineError: the tokenizer has no token that a text could start with.
    """
    start = [] if prefixed else _start(tokenizer)
    requests: list[_Pair | RowError] = []
    for messages in conversations:
        try:
            before, whole = conversation_ids(tokenizer, messages, template)
            alone = header_ids(tokenizer, prompt(messages), template) if prefixed else start
            target, truncated = _fitting(before, whole, max_length)
        except RowError as error:
            requests.append(error)
            continue
        requests.append(_Pair(ScoreRequest(before, target), ScoreRequest(alone, target), truncated))
    return [
        result
        if isinstance(result, RowError)
        else ResponseLoss(result.conditional, cast(float, result.alone), *result[2:])
        for result in await _pair_losses(scorer, requests)
    ]


async def instruction_losses(
    scorer: TokenScorer,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_length: int,
    *,
    template: Template = "chat",
    alone: bool = True,
) -> list[InstructionLoss | RowError]:
    """L(x|y') and L(x) of every conversation's instruction, the response wrapped as a question.

    Args:
        scorer: the student.
        tokenizer: the student's tokenizer.
        conversations: turns that end with the assistant's.
        max_length: tokens; where the wrapped response leaves no room, the row has no score.
        template: how the question becomes a prompt.
        alone: whether L(x) is wanted too, the denominator of r-IFD.

    Returns:
        One result a conversation, in order: its losses, or why it has none.

    Raises:
        EngineError: the tokenizer has no token that a text could start with.
    """
    start = _start(tokenizer) if alone else []
    requests: list[_Pair | RowError] = []
    for messages in conversations:
        asked, answered = instruction(messages), response(messages)
        if asked is None or answered is None:
            requests.append(RowError("no_instruction: the conversation has no user turn"))
            continue
        question: Message = {"role": "user", "content": REVERSE_PROMPT.format(response=answered)}
        try:
            context = prompt_ids(tokenizer, [question], template)
            target, _ = _fitting(context, text_ids(tokenizer, asked), max_length)
        except RowError as error:
            requests.append(error)
            continue
        without = ScoreRequest(start, target) if alone else None
        requests.append(_Pair(ScoreRequest(context, target), without, False))
    return [
        result if isinstance(result, RowError) else InstructionLoss(*result[:3])
        for result in await _pair_losses(scorer, requests)
    ]


class _Pair(NamedTuple):
    """The same target after its prompt and, where wanted, without it, and whether it was cut."""

    conditional: ScoreRequest
    alone: ScoreRequest | None
    truncated: bool


class _PairLoss(NamedTuple):
    """Mean losses of a pair, nats a token; tokens scored; whether the target was cut."""

    conditional: float
    alone: float | None
    tokens: int
    truncated: bool


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    start = start_ids(tokenizer)
    if not start:
        raise EngineError(
            "the student's tokenizer has neither BOS nor EOS, so a response without its prompt has "
            "no first token to be scored; use variant loss_ratio_prefixed or mode compat"
        )
    return start


def _fitting(prompt: Sequence[int], target: list[int], max_length: int) -> tuple[list[int], bool]:
    """The target cut to the window, and whether it was cut."""
    room = max_length - len(prompt)
    if not target:
        raise RowError("empty_target: there is no token to score")
    if room < 1:
        raise RowError(f"prompt_too_long: {len(prompt)} tokens leave no room in {max_length}")
    return target[:room], len(target) > room


async def _pair_losses(
    scorer: TokenScorer, requests: Sequence[_Pair | RowError]
) -> list[_PairLoss | RowError]:
    """Mean losses of the requests of every pair, by one engine call."""
    pairs = [request for request in requests if not isinstance(request, RowError)]
    flat = [single for pair in pairs for single in (pair.conditional, pair.alone) if single]
    scores = await scorer.score(flat)
    scored = iter(zip(scores.mean_losses().tolist(), scores.counts.tolist(), strict=True))
    results: list[_PairLoss | RowError] = []
    for request in requests:
        if isinstance(request, RowError):
            results.append(request)
            continue
        conditional, tokens = next(scored)
        alone = next(scored)[0] if request.alone else None
        if math.isfinite(conditional) and (alone is None or math.isfinite(alone)):
            results.append(_PairLoss(conditional, alone, tokens, request.truncated))
        else:
            results.append(RowError("undefined: no token could be scored"))
    return results
