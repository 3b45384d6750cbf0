"""A row's prompt with thinking open, and the token that would close it at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.engines.tokens import chat_tokens
from stages.errors import ConfigError
from stages.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def nothinking_id(tokenizer: PreTrainedTokenizerBase, text: str, model: str) -> int:
    """The id of the NoThinking token. Never a number from elsewhere: vocabularies differ.

    Raises:
        ConfigError: the text isn't exactly one known token of this tokenizer.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = " ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
        raise ConfigError(
            f"thinking.nothinking {text!r} is {len(ids)} tokens for the model {model} ({pieces}); "
            "it has to be one: name an adaptive-thinking model, or the token that yours uses"
        )
    if ids[0] == tokenizer.unk_token_id:
        raise ConfigError(
            f"thinking.nothinking {text!r} is unknown to the tokenizer of the model {model}; name "
            "an adaptive-thinking model, or the token that yours uses"
        )
    return ids[0]


def open_thinking_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], opening: str
) -> list[int]:
    """Ids of a prompt under the model's own chat template, ending where thinking would begin.

    The template's own special tokens are the only ones: nothing is encoded twice, so that a
    template which writes BOS gives one BOS.

    Args:
        tokenizer: of the adaptive-thinking model.
        turns: everything before the response.
        opening: the text that opens thinking; where the template has written it, it isn't added.

    Raises:
        RowError: the template refuses the turns.
    """
    ids = chat_tokens(tokenizer, turns, open_turn=True, options={"enable_thinking": True}).ids
    start: list[int] = tokenizer(opening, add_special_tokens=False)["input_ids"]
    bare: list[int] = tokenizer(opening.rstrip(), add_special_tokens=False)["input_ids"]
    written = any(form and ids[-len(form) :] == form for form in (start, bare))
    return ids if written else [*ids, *start]
