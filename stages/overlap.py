"""Whether a text overlaps texts that must stay unseen: those of targets and evaluation sets.

Texts are compared as sequences of words, case and punctuation left out. Two overlap where they are
equal, or where they share 13 words in a row; of an unseen text of 8 to 12 words all must be there.
A shorter one is matched as a whole only, since many texts hold "what is the capital of".

Source: the rule of GPT-3's contamination study (arXiv 2005.14165, appendix C): n-grams of 8 to 13
words.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

_LONGEST = 13
_SHORTEST = 8

# Kana, Han, Thai, Lao, Burmese and Khmer are written without spaces: there a character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")


class Overlap(NamedTuple):
    """What a text overlaps: the name of the set, how, and the unseen text."""

    set: str
    kind: Literal["exact", "ngram"]
    text: str


def normalised(text: str) -> str:
    """The words of a text in NFKC and folded case, one space between them."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class OverlapIndex:
    """Unseen texts by name of their set, to be matched against. Holds about 100 bytes a word."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        """Index pairs of a set's name and a text; where sets share a text, the first one counts."""
        self._texts: list[tuple[str, str]] = []
        self._whole: dict[bytes, int] = {}
        self._grams: dict[bytes, int] = {}
        lengths: set[int] = set()
        for name, text in texts:
            words = normalised(text).split()
            if not words:
                continue
            place = len(self._texts)
            self._texts.append((name, text))
            self._whole.setdefault(_key(words), place)
            length = min(len(words), _LONGEST)
            if length >= _SHORTEST:
                lengths.add(length)
                for gram in _grams(words, length):
                    self._grams.setdefault(gram, place)
        self._lengths = sorted(lengths, reverse=True)

    def match(self, text: str) -> Overlap | None:
        """The first unseen text that a text overlaps, or None where it overlaps none."""
        words = normalised(text).split()
        whole = self._whole.get(_key(words))
        if whole is not None:
            return self._overlap(whole, "exact")
        for length in self._lengths:
            for gram in _grams(words, length):
                if gram in self._grams:
                    return self._overlap(self._grams[gram], "ngram")
        return None

    def _overlap(self, place: int, kind: Literal["exact", "ngram"]) -> Overlap:
        name, text = self._texts[place]
        return Overlap(name, kind, text)


def _grams(words: Sequence[str], length: int) -> Iterator[bytes]:
    for start in range(len(words) - length + 1):
        yield _key(words[start : start + length])


def _key(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
