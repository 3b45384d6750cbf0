"""Other ways to weigh sources, to compare with or to use: counts, neighbours, domain means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.mixture.simplex import FloatArray, IntArray, distribution, means_per_source
from stages.mixture.space import Space

_TILE = 2048


def proportional_weights(available: npt.ArrayLike) -> FloatArray:
    r"""Shares of what there is: :math:`p_k = n_k / \sum_l n_l`.

    Source: the natural mixture.

    Args:
        available: rows or tokens of each source, [K].

    Returns:
        float64 [K].
    """
    return distribution(available, "available")


def uniform_weights(n_sources: int) -> FloatArray:
    """The same for every source: p_k = 1 / K.

    Source: stratified sampling.

    Args:
        n_sources: K.

    Returns:
        float64 [K].
    """
    return np.full(n_sources, 1.0 / n_sources)


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows of each target point, over any number of blocks of rows.

    Attributes:
        costs: ascending, float64 [m, k]; infinite where fewer rows were seen.
        source: number of each one's source, int64 [m, k]; -1 where none.
    """

    costs: FloatArray
    source: IntArray

    def __add__(self, other: Neighbours) -> Neighbours:
        """The nearest rows of both: blocks add up, in any order."""
        costs = np.concatenate([self.costs, other.costs], axis=1)
        source = np.concatenate([self.source, other.source], axis=1)
        order = np.lexsort((source, costs), axis=1)[:, : self.costs.shape[1]]
        return Neighbours(
            np.take_along_axis(costs, order, axis=1), np.take_along_axis(source, order, axis=1)
        )


def nearest_rows(
    x: npt.ArrayLike, source: IntArray, y: npt.ArrayLike, space: Space, count: int
) -> Neighbours:
    """The `count` nearest of some rows to each target point; equal costs go by source number.

    Source: definition.

    Args:
        x: rows as `space` compares them, [n, r].
        source: number of each row's source, int64 [n].
        y: target points, [m, r].
        space: how they are compared.
        count: k.
    """
    m = len(np.asarray(y))
    best = Neighbours(np.full((m, count), np.inf), np.full((m, count), -1, dtype=np.int64))
    rows = np.asarray(x, dtype=np.float64)
    for start in range(0, len(source), _TILE):
        members = source[start : start + _TILE]
        costs = space.cost(rows[start : start + _TILE], members, y).T
        near = (costs <= best.costs[:, -1:]).any(axis=0)
        costs = costs[:, near]
        best = best + Neighbours(costs, np.broadcast_to(members[near], costs.shape))
    return best


def neighbour_shares(neighbours: Neighbours, b: npt.ArrayLike, n_sources: int) -> FloatArray:
    r"""Shares of the votes of each target point's nearest rows.

    .. math:: p_k = \sum_j b_j\, \tfrac{1}{|N_j|} \#\{ i \in N_j : x_i \in S_k \}

    A source with more rows is met more often, so the shares are of rows, not of sources.
    Source: nearest-neighbour voting, as round-robin selection counts it (arXiv 2602.14696).

    Args:
        neighbours: of each target point, over all rows.
        b: mass of the target points, [m].
        n_sources: K.

    Returns:
        float64 [K].
    """
    there = neighbours.source >= 0
    votes = (distribution(b, "b") / there.sum(axis=1))[:, None] * there
    counted = np.bincount(neighbours.source[there], weights=votes[there], minlength=n_sources)
    return np.asarray(counted, dtype=np.float64)


def chameleon_weights(
    vectors: npt.ArrayLike,
    source: IntArray,
    counts: IntArray,
    ridge: float = 10.0,
    temperature: float = 0.2,
) -> FloatArray:
    r"""Weights by kernel ridge leverage of the sources' mean vectors; no target takes part.

    .. math:: p = \mathrm{softmax}(S / \tau), \qquad
              S_k = \bigl[ G (G + \lambda K I)^{-1} \bigr]_{kk}

    with G the Gram matrix of the mean vectors, centred.
    Source: Chameleon, its weights for fine-tuning (arXiv 2505.24844).

    Args:
        vectors: [n, d].
        source: number of each row's source, int64 [n].
        counts: rows of each source, int64 [K], none 0.
        ridge: lambda; the published value is for hidden states of a model, whose norms are far
            above 1, and makes weights of normalised vectors nearly equal.
        temperature: tau.

    Returns:
        float64 [K].
    """
    means = means_per_source(np.asarray(vectors, dtype=np.float64), source, counts).T
    centred = means - means.mean(axis=0)
    gram = centred @ centred.T
    n_sources = len(gram)
    leverage = np.diagonal(np.linalg.solve(gram + ridge * n_sources * np.eye(n_sources), gram))
    return distribution(np.exp((leverage - leverage.max()) / temperature), "leverages")


def kept_in_proportion(
    sources: Sequence[str],
    keep: dict[str, float],
    lower: FloatArray,
    upper: FloatArray,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    r"""Mixtures in which some sources keep the proportions of an earlier mixture.

    .. math:: p = W q: \quad p_k = q_0 \frac{w_k}{\sum_{l \in \mathrm{kept}} w_l}
              \;(k \in \mathrm{kept}), \qquad p_k = q_k \;\text{else}

    Source: mixture reuse (Olmix, arXiv 2602.12237).

    Args:
        sources: K names.
        keep: earlier weights w of the sources that are kept, at least one above 0.
        lower: of p, float64 [K].
        upper: of p, float64 [K].

    Returns:
        W float64 [K, G], and bounds of q, float64 [G] each; the kept sources come first.

    Raises:
        ValueError: an earlier weight can't be kept within the bounds.
    """
    kept = np.array([name in keep for name in sources])
    share = np.zeros(len(sources))
    share[kept] = distribution([keep[name] for name in sources if name in keep], "mixture.keep")
    for number in np.flatnonzero(kept & (share == 0) & (lower > 0)).tolist():
        raise ValueError(
            f"mixture.keep gives {sources[number]} no weight, and its least is {lower[number]:g}"
        )
    free = np.flatnonzero(~kept)
    groups = np.zeros((len(sources), 1 + free.size))
    groups[:, 0] = share
    groups[free, 1 + np.arange(free.size)] = 1.0
    weighed = share > 0
    low = float((lower[weighed] / share[weighed]).max())
    high = float((upper[weighed] / share[weighed]).min())
    if low > high:
        raise ValueError(
            "the bounds on weights don't allow the proportions of mixture.keep: drop a floor, a "
            "cap or a source from it"
        )
    return groups, np.append(low, lower[free]), np.append(min(high, 1.0), upper[free])
