"""A conversation as token ids, with what each token is.

Contents are encoded apart from the template and with special tokens disabled, so that a text which
holds `<|im_end|>` cannot forge a turn, and ids are concatenated, so that a response has the same
ids after any prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.errors import RowError
from stages.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE, PROMPT, RESPONSE = 0, 1, 2


@dataclass(frozen=True)
class ChatTokens:
    """Token ids of a conversation and the part that each belongs to.

    Attributes:
        ids: the whole conversation under the chat template.
        parts: TEMPLATE, PROMPT (content of earlier turns) or RESPONSE, one a token.
    """

    ids: list[int]
    parts: list[int]

    @property
    def response_start(self) -> int:
        """Index of the first response token (the end where there is no response)."""
        return self.parts.index(RESPONSE) if RESPONSE in self.parts else len(self.ids)

    @property
    def prompt_ids(self) -> list[int]:
        """Everything before the response, the assistant's header included."""
        return self.ids[: self.response_start]

    @property
    def response_ids(self) -> list[int]:
        """The response's own tokens, end marker left out."""
        return [i for i, part in zip(self.ids, self.parts, strict=True) if part == RESPONSE]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's ids, with no special token added or recognised."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return ids


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    open_turn: bool = False,
    options: Mapping[str, Any] | None = None,
) -> ChatTokens:
    """A conversation under the model's own chat template.

    Args:
        tokenizer: its chat template is used; without one, turns are joined by blank lines.
        messages: the turns; where the last one is the assistant's its content is the response.
        open_turn: end with the header of an assistant turn (to generate, or to score a response).
        options: variables of the template (`enable_thinking`).

    Raises:
        RowError: the template refuses the turns, or drops or repeats the content of one.
    """
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    rendered = _rendered(tokenizer, messages, marks, open_turn, options or {})
    ids: list[int] = []
    parts: list[int] = []
    seen: list[int] = []
    for piece in re.split("(\ue000\\d+\ue001)", rendered):
        turn = marks.index(piece) if piece in marks else None
        if turn is None:
            new = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            part = TEMPLATE
        else:
            new = text_ids(tokenizer, messages[turn]["content"])
            last = turn == len(messages) - 1 and messages[turn]["role"] == "assistant"
            part = RESPONSE if last else PROMPT
            seen.append(turn)
        ids += new
        parts += [part] * len(new)
    if seen != list(range(len(messages))):
        raise RowError("chat_template: it drops, repeats or reorders turns of this conversation")
    return ChatTokens(ids, parts)


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a text without a prompt is scored after: BOS, else EOS, so its first token counts."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [int(token)]
    return []


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    marks: Sequence[str],
    open_turn: bool,
    options: Mapping[str, Any],
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(marks) + ("\n\n" if open_turn else "")
    from jinja2.exceptions import TemplateError

    turns = [
        {"role": turn["role"], "content": mark} for turn, mark in zip(messages, marks, strict=True)
    ]
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=open_turn, **options
        )
    except (TemplateError, ValueError) as error:
        raise RowError(f"chat_template: {error}") from error
    return str(text)
