"""Conversations as token ids for a proxy: by a tokenizer trained on the rows, or by a model's own.

The small tokenizer is byte-level BPE, so that every text has ids; turns are marked by tokens that
no text can spell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stages.engines import MaskedSequence
from stages.errors import RowError
from stages.rows import ROLES, Message

END = "<end>"
_MARKS = [END, *(f"<{role}>" for role in ROLES)]


def trained_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer of some texts; the same texts in one order give the same one.

    Args:
        texts: what merges are counted on.
        vocabulary: tokens at most, the marks of turns and 256 bytes among them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A text that holds "<end>" is encoded letter by letter: it can't forge a turn.
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_tokenizer(text: str) -> Tokenizer:
    """A tokenizer from its JSON."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


def response_sequence(
    tokenizer: Tokenizer, messages: Sequence[Message], max_length: int
) -> MaskedSequence:
    """A conversation's ids, those of the last assistant turn and its end counted.

    Args:
        tokenizer: of `trained_tokenizer`.
        messages: the turns.
        max_length: tokens; what lies beyond is cut.

    Raises:
        RowError: no token of a response is left.
    """
    mark = dict(zip(_MARKS, (tokenizer.get_vocab()[name] for name in _MARKS), strict=True))
    ids: list[int] = []
    keep: list[bool] = []
    for place, turn in enumerate(messages):
        content = tokenizer.encode(turn["content"]).ids
        counted = place == len(messages) - 1 and turn["role"] == "assistant"
        ids += [mark[f"<{turn['role']}>"], *content, mark[END]]
        keep += [False, *[counted] * (len(content) + 1)]
    if not any(keep[:max_length]):
        raise RowError(f"no_tokens: none of the response within {max_length} tokens")
    return MaskedSequence(ids[:max_length], keep[:max_length])
