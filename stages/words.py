r"""Words of texts, and runs of words as 64-bit numbers that arrays can compare.

A run of words with hashes :math:`h_s, \dots, h_{e-1}` has the number

.. math:: H(s, e) = \sum_{i=0}^{e-s-1} h_{s+i} c^i \bmod 2^{64}, \quad c \text{ odd}

(Karp and Rabin's polynomial, over hashes of words instead of characters). With the prefix sums
:math:`P_k = \sum_{i<k} h_i c^i` it is :math:`(P_e - P_s) c^{-s}`, so that runs of any length cost
the same. Equal runs have equal numbers in any process and on any machine.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
HashArray = NDArray[np.uint64]

# Scripts written without spaces, where a character is a word: kana and Han; Thai, Lao, Burmese and
# Khmer.
_SYLLABLES = "\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_LETTERS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_UNSPACED = _LETTERS + _SYLLABLES
_PER_WORD = ((re.compile(f"[{_SYLLABLES}]"), 2), (re.compile(f"[{_LETTERS}]"), 4))
_DASHES = "\u2012-\u2015"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_DASHES}{_UNSPACED}]+")
_AROUND = "()[]{}.,:;!?\"'“”‘’«»*_`~|<>#/。、「」『』《》【】"

# Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt) beyond the category Cf:
# joiners, fillers and variation selectors, which print nothing and would hide a word.
_IGNORABLE = (
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff"
)

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


def words(text: str) -> list[str]:
    """Words in order: NFKC, case folded, split at white space, punctuation around them dropped.

    Invisible characters (format controls and all that Unicode calls default-ignorable) are left
    out, and en and em dashes part words. A character of a script without spaces is a word. Signs
    inside a word stay, so that `2+3` and `2-3` differ.
    """
    found = text.lower().split() if text.isascii() else _folded_words(text)
    return [word for raw in found if (word := raw.strip(_AROUND))]


def characters_per_word(found: Sequence[str]) -> int:
    """How many of a text's words (see `words`) say as much as one of a script with spaces.

    1, or 2 where most of them are kana and Han, or 4 where most are Thai, Lao, Burmese and Khmer
    characters: what 30 English words say in article 1 of the Universal Declaration of Human Rights
    takes 39 characters in Chinese, 78 in Japanese and 129 in Thai.
    """
    text = "".join(found)
    if text.isascii():
        return 1
    kinds = {count: len(kind.findall(text)) for kind, count in _PER_WORD}
    kinds[1] = len(found) - sum(kinds.values())
    return min(kinds, key=lambda count: (-kinds[count], count))


def _folded_words(text: str) -> list[str]:
    """Words with the punctuation around them."""
    visible = _invisible().sub("", text)
    return _WORD.findall(unicodedata.normalize("NFKC", visible).casefold())


@cache
def _invisible() -> re.Pattern[str]:
    """Matches a default-ignorable character or a format control."""
    # Beyond the second plane the only format controls are tags, which are ignorable.
    some = map(chr, range(0x20000))
    controls = "".join(character for character in some if unicodedata.category(character) == "Cf")
    # Most characters are ASCII, and asking that first is quicker than the long list.
    return re.compile(rf"(?![\x00-\x7f])[{_IGNORABLE}{controls}]")


@dataclass(frozen=True)
class HashedWords:
    """Words of texts as numbers.

    Attributes:
        offsets: words before each text, and all of them, int64 [texts + 1].
        sums: prefix sums of the module's polynomial, uint64 [words + 1].
        unshift: inverse powers of its base, uint64 [words + 1].
    """

    offsets: IntArray
    sums: HashArray
    unshift: HashArray

    def runs(self, starts: IntArray, ends: IntArray) -> HashArray:
        """Numbers of the runs of words from `starts` to before `ends`, counted over all texts."""
        numbers: HashArray = (self.sums[ends] - self.sums[starts]) * self.unshift[starts]
        return numbers

    def ngrams(self, n: int) -> tuple[HashArray, IntArray]:
        """Numbers of every text's runs of n words in order, and grams before each text.

        A text of fewer words has one shorter run, an empty one none.

        Returns:
            uint64 [grams] and int64 [texts + 1].
        """
        counts = np.diff(self.offsets)
        grams = np.where(counts > n, counts - n + 1, np.minimum(counts, 1))
        before = np.concatenate([[0], np.cumsum(grams)])
        starts = np.arange(before[-1]) + np.repeat(self.offsets[:-1] - before[:-1], grams)
        return self.runs(starts, starts + np.repeat(np.minimum(counts, n), grams)), before


def hashed_words(texts: Sequence[str] | pa.Array) -> HashedWords:
    """The words of texts (large_string if in an array) as numbers, by XXH3 of their UTF-8 bytes.

    Raises:
        UnicodeEncodeError: a text holds half a character (a lone surrogate).
    """
    if not isinstance(texts, pa.Array):
        texts = pa.array(texts, pa.large_string())
    hashes, offsets = _hashed(texts)
    shift, unshift = (_powers(base, len(hashes)) for base in (_BASE, _INVERSE))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes * shift[:-1])])
    return HashedWords(offsets, sums, unshift)


def _hashed(texts: pa.Array) -> tuple[HashArray, IntArray]:
    """Numbers of what `words` gives for each text, and the words before each text.

    Arrow's kernels split and strip as Python does, in a third of the time. Texts repeat most of
    their words: what is done with a word is done once for equal ones.
    """
    # Not utf8_split_whitespace: it can leave the white space at the end of an array's last text
    # on its last word (pyarrow 26.0, where the text fills the array's memory).
    lists = pc.ascii_split_whitespace(_plain(texts))
    raw = lists.flatten().dictionary_encode()
    distinct = pc.utf8_trim(pc.ascii_lower(raw.dictionary), characters=_AROUND).to_pylist()
    numbers = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in distinct], np.uint64)
    places = raw.indices.to_numpy()
    filled = np.array([bool(word) for word in distinct], np.bool_)[places]
    before = np.concatenate([[0], np.cumsum(filled)])
    return numbers[places[filled]], before[lists.offsets.to_numpy()].astype(np.int64)


def _plain(texts: pa.Array) -> pa.Array:
    """The texts; of those that ASCII's white space doesn't split, words with spaces between."""
    separated = pc.match_substring_regex(texts, r"[\x1c-\x1f]")
    other = pc.or_(pc.invert(pc.string_is_ascii(texts)), separated)
    folded = [" ".join(_folded_words(text)) for text in texts.filter(other).to_pylist()]
    return pc.replace_with_mask(texts, other, pa.array(folded, texts.type)) if folded else texts


def _powers(base: int, highest: int) -> HashArray:
    """Powers of an odd number mod 2^64, from the zeroth on, uint64 [highest + 1]."""
    powers = np.full(highest + 1, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers)
