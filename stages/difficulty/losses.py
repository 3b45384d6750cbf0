"""The losses that IFD and r-IFD are made of, in `strict` mode.

Ids are concatenated, never re-encoded; the response has the same ids with and without its prompt;
a text without a prompt is scored after a start token, so that its first token counts in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.engines import ScoreRequest, TokenScorer
from stages.engines.tokens import chat_tokens, start_ids, text_ids
from stages.errors import RowError
from stages.rows import Message, instruction, response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REVERSE_PROMPT = (
    "Here is a reply that an assistant gave:\n\n{response}\n\n"
    "Write the request that this reply answers. Give the request only."
)
"""Asks for the instruction behind a response; its wording is part of r-IFD's identity."""


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
        return math.exp(self.given_prompt - self.alone)

    @property
    def loss_ratio(self) -> float:
        r"""The first published form, a ratio of losses: :math:`L(y \mid x) / L(y)`.

        Source: Cherry LLM (arXiv 2308.12032), Eq. 5.
        """
        return self.given_prompt / self.alone


@dataclass(frozen=True)
class InstructionLoss:
    """Mean losses of an instruction, nats a token, after and without the response wrapped as y'."""

    given_response: float
    alone: float
    tokens: int

    @property
    def rifd(self) -> float:
        r"""How little the response tells about the instruction.

        .. math:: \mathrm{rIFD}(x \mid y) = \exp\bigl(L(x \mid y') - L(x)\bigr)

        Source: Selective Reflection-Tuning (arXiv 2402.10110), Eq. 8.
        """
        return math.exp(self.given_response - self.alone)


async def response_losses(
    scorer: TokenScorer,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_length: int,
) -> list[ResponseLoss | RowError]:
    """L(y|x) and L(y) of every conversation's response, under the model's chat template.

    Args:
        scorer: the student.
        tokenizer: the student's tokenizer.
        conversations: turns that end with the assistant's; earlier turns are context.
        max_length: tokens; a longer response is cut (the same cut in both passes).

    Returns:
        One result a conversation, in order: its losses, or why it has none.
    """
    start = start_ids(tokenizer)
    requests: list[tuple[ScoreRequest, ScoreRequest, bool] | RowError] = []
    for messages in conversations:
        try:
            tokens = chat_tokens(tokenizer, messages)
            target, truncated = _fitting(tokens.prompt_ids, tokens.response_ids, max_length)
        except RowError as error:
            requests.append(error)
            continue
        requests.append(
            (ScoreRequest(tokens.prompt_ids, target), ScoreRequest(start, target), truncated)
        )
    return [
        result
        if isinstance(result, RowError)
        else ResponseLoss(result[0], result[1], result[2], result[3])
        for result in await _pair_losses(scorer, requests)
    ]


async def instruction_losses(
    scorer: TokenScorer,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_length: int,
) -> list[InstructionLoss | RowError]:
    """L(x|y') and L(x) of every conversation's instruction, the response wrapped as a question.

    Args:
        scorer: the student.
        tokenizer: the student's tokenizer.
        conversations: turns that end with the assistant's.
        max_length: tokens; where the wrapped response leaves no room, the row has no score.

    Returns:
        One result a conversation, in order: its losses, or why it has none.
    """
    start = start_ids(tokenizer)
    requests: list[tuple[ScoreRequest, ScoreRequest, bool] | RowError] = []
    for messages in conversations:
        asked, answered = instruction(messages), response(messages)
        if asked is None or answered is None:
            requests.append(RowError("no_instruction: the conversation has no user turn"))
            continue
        question: Message = {"role": "user", "content": REVERSE_PROMPT.format(response=answered)}
        try:
            context = chat_tokens(tokenizer, [question], open_turn=True).ids
            target, _ = _fitting(context, text_ids(tokenizer, asked), max_length)
        except RowError as error:
            requests.append(error)
            continue
        requests.append((ScoreRequest(context, target), ScoreRequest(start, target), False))
    return [
        result if isinstance(result, RowError) else InstructionLoss(result[0], result[1], result[2])
        for result in await _pair_losses(scorer, requests)
    ]


def _fitting(prompt: Sequence[int], target: list[int], max_length: int) -> tuple[list[int], bool]:
    """The target cut to the window, and whether it was cut."""
    room = max_length - len(prompt)
    if not target:
        raise RowError("empty_target: there is no token to score")
    if room < 1:
        raise RowError(f"prompt_too_long: {len(prompt)} tokens leave no room in {max_length}")
    return target[:room], len(target) > room


async def _pair_losses(
    scorer: TokenScorer, requests: Sequence[tuple[ScoreRequest, ScoreRequest, bool] | RowError]
) -> list[tuple[float, float, int, bool] | RowError]:
    """Mean losses of both requests of every pair, by one engine call."""
    pairs = [request for request in requests if not isinstance(request, RowError)]
    flat = [single for conditional, alone, _ in pairs for single in (conditional, alone)]
    scores = await scorer.score(flat)
    losses = scores.mean_losses().tolist()
    counts = scores.counts.tolist()
    results: list[tuple[float, float, int, bool] | RowError] = []
    place = 0
    for request in requests:
        if isinstance(request, RowError):
            results.append(request)
            continue
        conditional, alone = losses[2 * place], losses[2 * place + 1]
        if math.isfinite(conditional) and math.isfinite(alone):
            results.append((conditional, alone, counts[2 * place], request[2]))
        else:
            results.append(RowError("undefined: no token could be scored"))
        place += 1
    return results
