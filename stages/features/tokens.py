"""Which tokens of a conversation are read: its content, never the template around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.dictionary.settings import Part
from stages.engines import MaskedSequence
from stages.engines.tokens import PROMPT, RESPONSE, TEMPLATE, chat_tokens, start_ids
from stages.errors import RowError
from stages.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COUNTED = {"prompt": {PROMPT}, "response": {RESPONSE}, "both": {PROMPT, RESPONSE}}


def masked_sequence(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], part: Part, max_length: int
) -> MaskedSequence:
    """A conversation's ids under the chat template, and which of them are content to be read.

    The paper doesn't say which tokens it averages; template, special and padding tokens are left
    out here because their residual norms dwarf those of content. Most of all does the first
    position's, whatever stands there: a conversation that would begin with content gets the start
    token before it.

    Args:
        tokenizer: the model's.
        messages: the turns.
        part: whose content counts.
        max_length: tokens; what lies beyond is not read.

    Raises:
        RowError: no token of that part is left.
    """
    tokens = chat_tokens(tokenizer, messages)
    start = start_ids(tokenizer) if tokens.parts[:1] != [TEMPLATE] else []
    ids = [*start, *tokens.ids]
    counted = [p in _COUNTED[part] for p in [*[TEMPLATE] * len(start), *tokens.parts]]
    keep = counted[:max_length]
    if not any(keep):
        raise RowError(f"no_tokens: none of the {part} within {max_length} tokens")
    # Tokens after the last one that counts can't change it.
    last = max(i for i, kept in enumerate(keep) if kept) + 1
    return MaskedSequence(ids[:last], keep[:last], truncated=any(counted[max_length:]))
