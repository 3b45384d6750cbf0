"""`compat` mode: the four losses as the method's authors' published scorer computes them.

It differs from `strict` in what it scores: texts are joined and encoded whole, a text alone loses
its first token where the tokenizer adds no BOS, and the conditional pass counts from the length of
the encoded prefix. Use it to compare with published scores, `strict` for everything else.

The templates are the public training formats of Alpaca and Vicuna, and the wrapper around a
response is the scorer's; they are kept to the letter because the losses depend on each character.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stages.engines import ScoreRequest, TokenScorer
from stages.engines.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CompatTemplate = Literal["alpaca", "vicuna", "plain"]

_ALPACA = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
)
_PREFIXES: Mapping[CompatTemplate, tuple[str, str]] = {
    "alpaca": (
        "Below is an instruction that describes a task. " + _ALPACA + "{instruction}"
        "\n\n### Response:",
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. " + _ALPACA + "{instruction}\n\n### Input:\n{input}\n\n### Response:",
    ),
    "vicuna": (
        _VICUNA + "{instruction} ASSISTANT:",
        _VICUNA + "{instruction}\nInput:\n{input} ASSISTANT:",
    ),
    "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
}
# The published script adds the length that its header has under Llama's tokenizer, BOS included.
_HEADERS: Mapping[CompatTemplate, tuple[str, int]] = {
    "alpaca": ("### Response:", 4),
    "vicuna": ("ASSISTANT:", 6),
}
_REVERSE = (
    "Below is the response to an instruction, please guess the corresponding instruction for the "
    "given response.\n{output}\nGenerate the instruction for the above response."
)


@dataclass(frozen=True)
class ReferenceLosses:
    """Mean losses, nats per token; None where the published scorer has no value.

    `response` is taken after the response's header where the variant is `loss_ratio_prefixed`.
    """

    instruction: float | None
    response: float | None
    instruction_given_response: float | None
    response_given_instruction: float | None


def reference_losses(
    rows: Sequence[Mapping[str, str]],
    model: str,
    *,
    template: CompatTemplate = "alpaca",
    max_length: int = 2048,
    prefixed: bool = False,
) -> list[ReferenceLosses]:
    """The losses of Alpaca-form rows (`instruction`, `input`, `output`), float32.

    Args:
        rows: records with an instruction, an output and an optional input.
        model: reference of the student.
        template: training format of the prompt; `plain` has no losses of the instruction.
        max_length: tokens; longer texts are cut as the published scorer cuts them.
        prefixed: the response's own loss is taken after its header, as Cherry LLM's script does.

    Raises:
        ConfigError: the model can't be found.
    """
    from stages.engines.local import opened

    with opened("scorer", ModelSettings(model=model, max_length=max_length)) as (scorer, tokenizer):
        return asyncio.run(
            compat_losses(
                scorer,
                tokenizer,
                rows,
                template,
                max_length,
                prefixed=prefixed,
                reverse=template != "plain",
            )
        )


async def compat_losses(
    scorer: TokenScorer,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    template: CompatTemplate,
    max_length: int,
    *,
    prefixed: bool = False,
    reverse: bool = True,
) -> list[ReferenceLosses]:
    """The losses of every row, in order (see `reference_losses`); `reverse`: the instruction's."""
    requests: list[ScoreRequest] = []
    for row in rows:
        asked, given, output = row["instruction"], row.get("input") or "", row["output"]
        plain, with_input = _PREFIXES[template]
        prefix = (with_input if given else plain).format(instruction=asked, input=given)
        room = max_length - len(_ids(tokenizer, prefix, max_length)) + 1
        if prefixed:
            header, length = _HEADERS[template]
            alone = _span(tokenizer, header + output, output, room - 1 + length)
        else:
            alone = ScoreRequest([], _ids(tokenizer, output, room))
        requests += [alone, _span(tokenizer, prefix + output, output, max_length)]
        if reverse:
            question = plain.format(instruction=_REVERSE.format(output=output))
            reverse_room = max_length - len(_ids(tokenizer, question, max_length)) + 1
            requests += [
                ScoreRequest([], _ids(tokenizer, asked + given, reverse_room)),
                _span(tokenizer, question + asked + given, asked, max_length),
            ]
    losses = (await scorer.score(requests)).mean_losses().tolist()
    values = [value if value == value else None for value in losses]
    if not reverse:
        return [
            ReferenceLosses(None, values[i], None, values[i + 1]) for i in range(0, len(values), 2)
        ]
    return [
        ReferenceLosses(values[i + 2], values[i], values[i + 3], values[i + 1])
        for i in range(0, len(values), 4)
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[int]:
    """Ids of a whole text, cut on the right."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[: max(max_length, 0)]


def _span(
    tokenizer: PreTrainedTokenizerBase, text: str, target: str, max_length: int
) -> ScoreRequest:
    """The target's tokens, counted from the length of the encoded text before its last place."""
    start = len(_ids(tokenizer, text[: text.rfind(target)], len(text) + 1))
    ids = _ids(tokenizer, text, max_length)
    return ScoreRequest(ids[:start], ids[start:])
