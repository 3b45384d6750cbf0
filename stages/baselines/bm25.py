"""BM25 of rows for the target rows, with counts of words taken once over all rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

K1, B = 1.5, 0.75
"""The library's defaults, which are those of Lucene's variant in the literature."""


def words_of(texts: Sequence[str]) -> list[list[str]]:
    """Lower-case words of two characters or more of each text, English stop words left out."""
    import bm25s

    words = bm25s.tokenize(list(texts), return_ids=False, show_progress=False)
    return [list(each) for each in words]


@dataclass(frozen=True)
class WordCounts:
    """Counts over rows that add up.

    Attributes:
        rows: rows counted.
        words: words in all of them.
        having: rows that have a word, by word.
    """

    rows: int
    words: int
    having: Counter[str]

    def __add__(self, other: WordCounts) -> WordCounts:
        """Counts of both."""
        return WordCounts(
            self.rows + other.rows, self.words + other.words, self.having + other.having
        )


def word_counts(rows: Iterable[Sequence[str]], vocabulary: frozenset[str]) -> WordCounts:
    """Counts of the words of rows, document frequencies of those in the vocabulary alone."""
    found = list(rows)
    having = Counter(word for row in found for word in vocabulary.intersection(row))
    return WordCounts(len(found), sum(map(len, found)), having)


class Bm25:
    r"""Scores of rows (documents) for target rows (queries).

    .. math::
        s(q, d) = \sum_{w \in q} \ln\Bigl(1 + \frac{N - n_w + \frac12}{n_w + \frac12}\Bigr)
            \frac{f_{w,d}}{f_{w,d} + k_1 \bigl(1 - b + b\, |d| / \bar{\ell}\bigr)}

    N rows of mean length l, n_w of them with word w, f occurrences in the row. A word that a query
    has twice counts twice. Source: Lucene's variant as in Kamphuis et al. 2020, the default of the
    library bm25s, which needs all rows at once.
    """

    def __init__(self, queries: Sequence[Sequence[str]], counts: WordCounts) -> None:
        """Keep the queries, and the weight of each of their words."""
        vocabulary = sorted(set().union(*queries))
        self._place = {word: place for place, word in enumerate(vocabulary)}
        having = np.array([counts.having[word] for word in vocabulary], np.float64)
        self._rarity = np.log(1 + (counts.rows - having + 0.5) / (having + 0.5))
        self._mean_length = counts.words / max(counts.rows, 1)
        self._queries = self._occurrences(queries)

    def scores(self, rows: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """Scores of rows, given as words, for every query; float32 [rows, queries]."""
        lengths = np.array([len(row) for row in rows], np.float64)
        found = self._occurrences(rows)
        norms = K1 * (1 - B + B * lengths / max(self._mean_length, 1e-9))
        found.data /= found.data + np.repeat(norms, np.diff(found.indptr))
        scores = (found * self._rarity) @ self._queries.T
        return np.asarray(scores.toarray(), np.float32)

    def _occurrences(self, texts: Sequence[Sequence[str]]) -> csr_array:
        """How often each text has each word of the vocabulary, float64 [texts, words]."""
        counted = [Counter(word for word in text if word in self._place) for text in texts]
        places = [self._place[word] for each in counted for word in each]
        values = [count for each in counted for count in each.values()]
        starts = np.cumsum([0, *map(len, counted)])
        shape = (len(texts), len(self._place))
        return csr_array((np.array(values, np.float64), np.array(places, np.int64), starts), shape)
