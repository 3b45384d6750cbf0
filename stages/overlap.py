"""Whether texts overlap others that training must not see: those of targets and evaluation sets.

Texts are compared as words (`stages.words`), so case, white space and punctuation around words
don't matter. A text overlaps an unseen one where

* it is the same (`exact`), or
* they share a run of n words (`ngram`); of an unseen text of fewer words, but at least `short`, the
  run is all of it. A shorter one counts as a whole text only: many texts hold "what is two plus".

In scripts without spaces a word is several characters (`stages.words.characters_per_word`), by the
script of the unseen text.

n = 13 is GPT-3's (arXiv 2005.14165, appendix C), which also takes shorter runs where an unseen text
has no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.words import HashedWords, IntArray, characters_per_word, hashed_words, words

TELLING_WORDS = 13
"""Words from which on a response can be told from any other: `yes` and `42` answer much else."""


class Overlap(NamedTuple):
    """What a text overlaps: the name of the set, how, and the words that they share."""

    set: str
    kind: Literal["exact", "ngram"]
    text: str


class _Place(NamedTuple):
    """An unseen text, and the word in it where a run starts."""

    text: int
    word: int


def are_telling(found: Sequence[str]) -> bool:
    """Whether a response of these words can be told from any other."""
    return len(found) >= TELLING_WORDS * characters_per_word(found)


def normalised(text: str) -> str:
    """The words of a text with one space between them: texts that differ in no word are equal."""
    return " ".join(words(text))


class OverlapIndex:
    """Unseen texts by the name of their set. Holds about 200 bytes a word of theirs."""

    def __init__(
        self,
        texts: Iterable[tuple[str, str]],
        *,
        n: int = 13,
        short: int = 6,
    ) -> None:
        """Index pairs of a set's name and a text; where texts share a run, the first one counts.

        Args:
            texts: pairs; a text without a word is left out.
            n: words in a run.
            short: fewest words of a run that is a whole text.
        """
        pairs = list(texts)
        self._sets = [name for name, _ in pairs]
        self._words = [words(text) for _, text in pairs]
        hashed = hashed_words([text for _, text in pairs])
        self._whole: dict[int, int] = {}
        counts = np.diff(hashed.offsets)
        for place, number in enumerate(hashed.runs(hashed.offsets[:-1], hashed.offsets[1:])):
            if counts[place]:
                self._whole.setdefault(int(number), place)
        self._runs: dict[int, dict[int, _Place]] = {}
        per_word = np.array([characters_per_word(found) for found in self._words], np.int64)
        lengths = np.minimum(counts, n * per_word)
        lengths[counts < min(short, n) * per_word] = 0
        for length in np.unique(lengths[lengths > 0]).tolist():
            self._runs[length] = _runs(hashed, np.flatnonzero(lengths == length), length)
        self._keys = {
            length: pa.array(np.fromiter(runs, np.uint64, len(runs)))
            for length, runs in self._runs.items()
        }

    def match(self, text: str) -> Overlap | None:
        """The unseen text that a text overlaps first, or None."""
        return self.matches([text])[0]

    def matches(self, texts: Sequence[str]) -> list[Overlap | None]:
        """The same for many texts at once, in their order.

        Raises:
            UnicodeEncodeError: a text holds half a character (a lone surrogate).
        """
        found: list[Overlap | None] = [None] * len(texts)
        if not self._whole:
            return found
        hashed = hashed_words(texts)
        wholes = hashed.runs(hashed.offsets[:-1], hashed.offsets[1:])
        for place, number in enumerate(wholes.tolist()):
            if number in self._whole and hashed.offsets[place] < hashed.offsets[place + 1]:
                found[place] = self._exact(texts[place], self._whole[number])
        for length in reversed(self._runs):
            for text, start, number in self._hits(hashed, length):
                if found[text] is None:
                    found[text] = self._shared(texts[text], start, self._runs[length][number])
        return found

    def _hits(self, hashed: HashedWords, length: int) -> list[tuple[int, int, int]]:
        """Text, first word in it, and number of the runs that are in the index too."""
        numbers, before = hashed.ngrams(length)
        hits = np.flatnonzero(pc.is_in(pa.array(numbers), value_set=self._keys[length]))
        texts = np.searchsorted(before, hits, side="right") - 1
        enough = np.diff(hashed.offsets)[texts] >= length
        return [
            (int(text), int(hit - before[text]), int(numbers[hit]))
            for text, hit in zip(texts[enough], hits[enough], strict=True)
        ]

    def _exact(self, text: str, place: int) -> Overlap | None:
        found = words(text)
        if found != self._words[place]:
            return None
        return Overlap(self._sets[place], "exact", " ".join(found))

    def _shared(self, text: str, start: int, place: _Place) -> Overlap | None:
        """The longest run around a hit that both texts hold."""
        mine, theirs = words(text), self._words[place.text]
        first, end, shift = start, start, place.word - start
        while first and first + shift and mine[first - 1] == theirs[first + shift - 1]:
            first -= 1
        while end < len(mine) and end + shift < len(theirs) and mine[end] == theirs[end + shift]:
            end += 1
        return Overlap(self._sets[place.text], "ngram", " ".join(mine[first:end]))


def _runs(hashed: HashedWords, texts: IntArray, length: int) -> dict[int, _Place]:
    """Runs of some texts by their number; the first text that holds one counts."""
    numbers, before = hashed.ngrams(length)
    found: dict[int, _Place] = {}
    for text in texts.tolist():
        for word, number in enumerate(numbers[before[text] : before[text + 1]].tolist()):
            found.setdefault(number, _Place(text, word))
    return found
