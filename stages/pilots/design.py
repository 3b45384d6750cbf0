"""Which mixtures to train on: a lattice of the simplex, filled up with random ones."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np

from stages.mixture.simplex import FloatArray


def simplex_lattice(sources: int, parts: int) -> FloatArray:
    r"""All mixtures whose weights are multiples of 1 / parts.

    .. math:: \{ p : p_k \in \{0, 1/q, \dots, 1\},\ \sum_k p_k = 1 \}, \qquad
              \binom{q + K - 1}{K - 1} \text{ points}

    Source: Scheffé 1958, Experiments with mixtures (the simplex-lattice design).

    Args:
        sources: K.
        parts: q.

    Returns:
        float64 [points, K], vertices among them, in lexicographic order.
    """
    slots = parts + sources - 1
    bars = np.array(list(combinations(range(slots), sources - 1)), np.int64).reshape(
        -1, sources - 1
    )
    edges = np.hstack([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), slots)])
    return np.asarray((np.diff(edges, axis=1) - 1) / parts, np.float64)


def random_mixtures(sources: int, count: int, seed: int) -> FloatArray:
    """Mixtures drawn uniformly from the simplex, Dirichlet(1, ..., 1); float64 [count, K]."""
    return np.random.default_rng(seed).dirichlet(np.ones(sources), size=count)


def mixture_design(sources: int, count: int, seed: int) -> FloatArray:
    """The finest lattice of at most `count` mixtures, filled up with random ones.

    Args:
        sources: K, at least 2.
        count: mixtures, at least K.
        seed: of the random ones.

    Returns:
        float64 [count, K].

    Raises:
        ValueError: the vertices alone are more than `count`, or there is one source.
    """
    if sources < 2:
        raise ValueError("one source has one mixture: there is nothing to try")
    if count < sources:
        raise ValueError(f"{count} mixtures can't hold each of {sources} sources alone; raise it")
    parts = 1
    while comb(parts + sources, sources - 1) <= count:
        parts += 1
    lattice = simplex_lattice(sources, parts)
    return np.vstack([lattice, random_mixtures(sources, count - len(lattice), seed)])
