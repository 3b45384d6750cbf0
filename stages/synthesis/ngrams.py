"""Word n-grams: how much a text repeats itself, and how much of it stands in other texts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from stages.words import words

Gram = tuple[str, ...]


def word_ngrams(text: str, n: int) -> list[Gram]:
    """Runs of n words in order; a text of fewer words is one shorter run, an empty one has none."""
    found = words(text)
    if len(found) <= n:
        return [tuple(found)] if found else []
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def repeated_share(text: str, n: int) -> float:
    r"""Share of a text's word n-grams that stood in it before; 0 for a text without words.

    .. math:: 1 - \frac{|\{g_1, \dots, g_m\}|}{m}

    with the text's m runs of n words :math:`g_i`. ScaleDiff (arXiv 2509.21070) leaves out solutions
    that repeat themselves and gives neither measure nor threshold; this one is the usual share of
    duplicate n-grams (Gopher, arXiv 2112.11446, appendix A).
    """
    grams = word_ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class NgramOverlap:
    """Problems by the n-grams that they hold: a few problems against any number of texts."""

    def __init__(self, problems: Sequence[str], n: int) -> None:
        """Index the problems.

        Args:
            problems: the texts that may be contaminated.
            n: words in a run.
        """
        self._n = n
        self._sizes: list[int] = []
        self._holders: defaultdict[Gram, list[int]] = defaultdict(list)
        for place, problem in enumerate(problems):
            grams = set(word_ngrams(problem, n))
            self._sizes.append(len(grams))
            for gram in grams:
                self._holders[gram].append(place)

    def containments(self, texts: Iterable[str]) -> dict[int, float]:
        r"""Share of each problem's n-grams that stand in a row, for problems with at least one.

        .. math:: C(p, r) = \frac{|G_n(p) \cap G_n(r)|}{|G_n(p)|}

        A share above 0 at n = 8 is s1's rule for contamination (arXiv 2501.19393). A problem of
        fewer than n words overlaps only with a text that holds the same words and no others.

        Args:
            texts: the row's turns; no n-gram runs from one into another.

        Returns:
            Containment by the problem's place.
        """
        grams = {gram for text in texts for gram in word_ngrams(text, self._n)}
        shared = Counter(place for gram in grams for place in self._holders.get(gram, ()))
        return {place: count / self._sizes[place] for place, count in shared.items()}
