"""Strata by length: bins of equal numbers of rows, each with its share of what is kept."""

from __future__ import annotations

import numpy as np

from stages.emission.quotas import largest_remainder
from stages.selection.ranking import IntArray


def length_strata(tokens: IntArray, bins: int) -> list[IntArray]:
    """Row numbers of each bin, short rows first; sizes differ by at most one.

    Args:
        tokens: of each row, int64 [n]; rows in the order in which ties fall.
        bins: at least 1.
    """
    order = np.argsort(tokens, kind="stable").astype(np.int64)
    return [part for part in np.array_split(order, bins) if len(part)]


def stratum_quotas(strata: list[IntArray], count: int) -> list[int]:
    """Rows to keep of each stratum: proportional to its size, in whole numbers that sum to count.

    Args:
        strata: as by `length_strata`.
        count: rows to keep in all, at most as many as there are.
    """
    names = [f"{number:09d}" for number in range(len(strata))]
    sizes = {name: float(len(rows)) for name, rows in zip(names, strata, strict=True)}
    quotas = largest_remainder(sizes, count)
    return [quotas[name] for name in names]
