"""What changed between two texts, word by word."""

from __future__ import annotations

import difflib
import re
from typing import Literal, NamedTuple

_WORDS = re.compile(
    # Han, kana, Hangul and Thai are written without spaces: each sign is a word.
    r"\s+|[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
    r"|[^\s\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)


class Piece(NamedTuple):
    """A run of words that is in both texts, was deleted, or was inserted."""

    kind: Literal["equal", "delete", "insert"]
    text: str


def word_diff(before: str, after: str) -> list[Piece]:
    """The runs of two texts, in order.

    The `equal` and `delete` runs make up `before`, the `equal` and `insert` runs `after`. White
    space alone between two changes belongs to them, so that a rewritten sentence is one run.
    """
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    pieces: list[Piece] = []
    gone, come = "", ""
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        was, now = "".join(old[a:b]), "".join(new[c:d])
        between = was.isspace() and bool(gone or come) and b < len(old) and d < len(new)
        if kind != "equal" or between:
            gone, come = gone + was, come + now
        else:
            pieces += _changed(gone, come)
            pieces.append(Piece("equal", was))
            gone, come = "", ""
    return pieces + _changed(gone, come)


def _changed(gone: str, come: str) -> list[Piece]:
    runs = [Piece("delete", gone), Piece("insert", come)]
    return [piece for piece in runs if piece.text]
