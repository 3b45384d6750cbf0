r"""Pairs of sets that may be similar, without a look at all pairs: prefix and positional filters.

Give each set's members one order over all sets, rarest first. Sets of a Jaccard similarity of at
least :math:`t` have in common at least

.. math:: \alpha(x, y) = \left\lceil \tfrac{t}{1 + t} (|x| + |y|) \right\rceil

members, so that the first :math:`|x| - \alpha + 1` of the one and the first
:math:`|y| - \alpha + 1` of the other share one: what all sets of a template hold is common, stands
last, and makes no pair. Of :math:`|y| \le |x|`, :math:`\alpha` is at least :math:`t |x|` and at
least :math:`2t / (1 + t) \, |y|`.

Sources: Bayardo, Ma and Srikant, Scaling up all pairs similarity search (WWW 2007); Xiao, Wang, Lin
and Yu, Efficient similarity joins for near duplicate detection (WWW 2008), lemmas 1 to 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.words import IntArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_MEETINGS_AT_ONCE = 2_000_000
"""Members that pairs of prefixes have in common, over all pairs in memory."""

_ROUNDING = 1e-9
"""Taken from bounds before they are rounded up: a pair too many is verified, none is lost."""


def least_common(sizes: IntArray | NDArray[np.float64], share: float) -> IntArray:
    """A share of sets' sizes, rounded up."""
    return np.ceil(share * sizes - _ROUNDING).astype(np.int64)


def pairs_to_verify(
    sets: csr_array, threshold: float, clusters: IntArray
) -> Iterator[tuple[IntArray, IntArray]]:
    """Pairs of sets of different clusters, with all whose similarity reaches a threshold.

    Args:
        sets: a row of ones a set, int32 [sets, members].
        threshold: Jaccard similarity, over 0.
        clusters: a number of each set's cluster, int64 [sets].

    Yields:
        The pairs' first and second sets, by place; each pair once, some thousands at a time.
    """
    if not len(clusters):
        return
    sizes = np.diff(sets.indptr)
    order = np.argsort(sizes, kind="stable")
    sets, sizes, clusters = _rarest_first(sets[order]), sizes[order], clusters[order]
    lengths = sizes - least_common(sizes, threshold) + 1
    short = sizes - least_common(sizes, 2 * threshold / (1 + threshold)) + 1
    probed, indexed = _prefixes(sets, lengths), _prefixes(sets, short)
    last_probed, last_indexed = _last(probed), _last(indexed)
    # Pairs inside a cluster are of no use, and most of them are inside the largest.
    inside = clusters == np.bincount(clusters).argmax()
    for probing, against in ((~inside, np.full(len(sizes), True)), (inside, ~inside)):
        larger, smaller = np.flatnonzero(probing), np.flatnonzero(against)
        for a, b, common in _meetings(probed[larger], indexed[smaller]):
            x, y = larger[a], smaller[b]
            wanted = (y < x) & (clusters[x] != clusters[y])
            x, y, common = x[wanted], y[wanted], common[wanted]
            # What both hold beyond the prefixes stands behind the one that ends first.
            ends_first = last_probed[x] < last_indexed[y]
            rest = np.where(ends_first, sizes[x] - lengths[x], sizes[y] - short[y])
            needed = least_common(sizes[x] + sizes[y], threshold / (1 + threshold))
            likely = common + rest >= needed
            yield order[x[likely]], order[y[likely]]


def _rarest_first(sets: csr_array) -> csr_array:
    """The sets with members numbered from the rarest on, sorted in every row."""
    from scipy.sparse import csr_array

    held = np.bincount(sets.indices, minlength=sets.shape[1])
    ranks = np.empty(len(held), sets.indices.dtype)
    ranks[np.argsort(held, kind="stable")] = np.arange(len(held))
    ranked = csr_array((sets.data, ranks[sets.indices], sets.indptr), shape=sets.shape)
    ranked.sort_indices()
    return ranked


def _prefixes(sets: csr_array, lengths: IntArray) -> csr_array:
    """The first members of each set."""
    from scipy.sparse import csr_array

    places = np.arange(sets.nnz) - np.repeat(sets.indptr[:-1], np.diff(sets.indptr))
    held = places < np.repeat(lengths, np.diff(sets.indptr))
    ends = np.concatenate([[0], np.cumsum(held)])[sets.indptr]
    return csr_array((sets.data[held], sets.indices[held], ends), shape=sets.shape)


def _last(prefixes: csr_array) -> IntArray:
    """The last member of each prefix."""
    last: IntArray = prefixes.indices[prefixes.indptr[1:] - 1]
    return last


def _meetings(
    probed: csr_array, indexed: csr_array
) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """Pairs of prefixes that share a member, by place, and how many they share."""
    holders = indexed.T.tocsr()
    meetings = np.cumsum(probed @ np.diff(holders.indptr))
    starts = np.flatnonzero(np.diff(meetings // _MEETINGS_AT_ONCE, prepend=-1)).tolist()
    for start, end in pairwise([*starts, probed.shape[0]]):
        found = (probed[start:end] @ holders).tocoo()
        yield found.row + start, found.col, found.data
