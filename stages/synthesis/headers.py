"""What a chat template writes around a user's content: where a problem starts, where it ends."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from stages.engines.tokens import TEMPLATE, chat_tokens
from stages.errors import ConfigError, RowError
from stages.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER: Message = {"role": "user", "content": "x"}
_ASSISTANT: Message = {"role": "assistant", "content": "x"}


def user_header_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that a user's content follows, at the start of a conversation without a system turn.

    Many templates write a system turn of their own before the first user turn. What they write
    before a later one too is the header alone; BOS, which only the first one has, goes before it.

    Raises:
        ConfigError: the tokenizer has no chat template, or one without a header of user turns.
    """
    opening, _, between, _ = _template_runs(tokenizer, [_USER, _ASSISTANT, _USER])
    header = _common_suffix(opening, between)
    # In ChatML both end the turn before: the template's own system turn, and the assistant's.
    end = _template_runs(tokenizer, [_USER])[1]
    if end and header[: len(end)] == end:
        header = header[len(end) :]
    if not header:
        raise ConfigError(
            f"{tokenizer.name_or_path}: its chat template has no header of user turns that a "
            "problem could follow; name a model whose template marks them"
        )
    has_bos = tokenizer.bos_token_id is not None and opening[0] == tokenizer.bos_token_id
    return header if not has_bos or header[0] == opening[0] else [opening[0], *header]


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a user's turn, up to the first special token; EOS where the template has none.

    Raises:
        ConfigError: the tokenizer has no chat template, or neither has an end.
    """
    end = _template_runs(tokenizer, [_USER])[1]
    special = special_ids(tokenizer)
    place = next((i for i, token in enumerate(end) if token in special), None)
    if place is not None:
        return end[: place + 1]
    if end and str(tokenizer.decode(end)).strip():
        return end
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{tokenizer.name_or_path}: neither its chat template nor the tokenizer says where a "
            "user's turn ends"
        )
    return [int(tokenizer.eos_token_id)]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of tokens that are no text."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What tokens that are no text look like when they are printed."""
    return tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)


def _template_runs(tokenizer: PreTrainedTokenizerBase, turns: list[Message]) -> list[list[int]]:
    """What the template writes before, between and after the turns' contents: one more than turns.

    Raises:
        ConfigError: there is no chat template, or it refuses such turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, so that there is no "
            "user header; name a chat model"
        )
    try:
        tokens = chat_tokens(tokenizer, turns)
    except RowError as error:
        raise ConfigError(f"{tokenizer.name_or_path}: {error}") from error
    runs: list[list[int]] = []
    pairs = zip(tokens.ids, tokens.parts, strict=True)
    for is_template, run in groupby(pairs, key=lambda pair: pair[1] == TEMPLATE):
        if is_template:
            runs.append([token for token, _ in run])
        elif not runs:
            runs.append([])
    if tokens.parts[-1] != TEMPLATE:
        runs.append([])
    if len(runs) != len(turns) + 1:
        raise ConfigError(
            f"{tokenizer.name_or_path}: its chat template writes nothing between turns, so that "
            "there is no user header; name a chat model"
        )
    return runs


def _common_suffix(left: list[int], right: list[int]) -> list[int]:
    length = 0
    for a, b in zip(reversed(left), reversed(right), strict=False):
        if a != b:
            break
        length += 1
    return left[len(left) - length :]
