"""How a conversation becomes a prompt: the model's chat template, or a plain training format.

The wording of `alpaca` and `vicuna` is the public training format of those models, kept to the
letter because scores depend on each character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stages.engines.tokens import chat_tokens, text_ids
from stages.errors import RowError
from stages.rows import Message, prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "alpaca", "vicuna", "plain"]


@dataclass(frozen=True)
class TextFormat:
    """A training format without special tokens; a system turn stands in place of `opening`."""

    opening: str
    user: str
    header: str
    after_response: str


FORMATS = {
    "alpaca": TextFormat(
        opening="Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n",
        user="### Instruction:\n{}\n\n",
        header="### Response:",
        after_response="\n\n",
    ),
    "vicuna": TextFormat(
        opening="A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user="USER: {} ",
        header="ASSISTANT:",
        after_response=" ",
    ),
    "plain": TextFormat(opening="", user="{}\n", header="", after_response="\n"),
}


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], template: Template
) -> list[int]:
    """Ids of all turns and of the header after which a response stands.

    Args:
        tokenizer: of the scoring model; where it writes BOS before a text, a plain format has it.
        turns: everything before the response; earlier responses are context.
        template: `chat` is the model's own.

    Raises:
        RowError: the template can't hold these turns.
    """
    if template == "chat":
        return chat_tokens(tokenizer, turns, open_turn=True).ids
    return [*_bos(tokenizer), *text_ids(tokenizer, _text(turns, FORMATS[template]))]


def header_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], template: Template
) -> list[int]:
    """Ids of the response's header alone, which `loss_ratio_prefixed` scores a response after.

    Raises:
        RowError: the template can't hold these turns, or has no header.
    """
    if template == "chat":
        closed = chat_tokens(tokenizer, turns).ids
        opened = chat_tokens(tokenizer, turns, open_turn=True).ids
        header = opened[len(closed) :]
    else:
        header = text_ids(tokenizer, FORMATS[template].header)
        header = [*_bos(tokenizer), *header] if header else []
    if not header:
        raise RowError("no_header: the template has no response header to score a response after")
    return header


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Template
) -> tuple[list[int], list[int]]:
    """Ids of everything before the response, and of the response, the same after any prompt.

    Raises:
        RowError: the template can't hold these turns, or there is no response.
    """
    if len(prompt(messages)) == len(messages):
        raise RowError("no_response: the conversation doesn't end with the assistant's turn")
    if template == "chat":
        tokens = chat_tokens(tokenizer, messages)
        return tokens.prompt_ids, tokens.response_ids
    before = prompt_ids(tokenizer, prompt(messages), template)
    return before, text_ids(tokenizer, messages[-1]["content"])


def _text(turns: Sequence[Message], form: TextFormat) -> str:
    text = form.opening
    for place, turn in enumerate(turns):
        if turn["role"] == "user":
            text += form.user.format(turn["content"])
        elif turn["role"] == "assistant":
            text += form.header + turn["content"] + form.after_response
        elif turn["role"] == "system" and place == 0:
            text = turn["content"] + "\n\n"
        else:
            raise RowError(f"template: a plain format has no place for a {turn['role']} turn here")
    return text + form.header


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS where this tokenizer writes it before a text of its own accord."""
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [
        tokenizer.bos_token_id
    ] else []  # fmt: skip
