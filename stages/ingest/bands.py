"""Bands of MinHash signatures: how many, and of how many hashes."""

from __future__ import annotations


def candidate_probability(similarity: float, bands: int, width: int) -> float:
    r"""Probability that two rows of a Jaccard similarity agree in all hashes of some band.

    .. math:: 1 - (1 - J^w)^b

    Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.2.
    """
    return 1 - (1 - similarity**width) ** bands


def bands_of(threshold: float, permutations: int, recall: float) -> tuple[int, int]:
    """The widest bands that find a pair at the threshold with the wanted probability.

    Wide bands have few candidates that aren't near duplicates. Every candidate is verified, so
    these cost time and nothing else.

    Returns:
        Number of bands, and hashes in each.

    Raises:
        ValueError: even bands of one hash don't find so many.
    """
    for width in range(permutations, 0, -1):
        bands = permutations // width
        if candidate_probability(threshold, bands, width) >= recall:
            return bands, width
    raise ValueError(
        f"{permutations} permutations can't find pairs of similarity {threshold:g} with "
        f"probability {recall:g}; raise permutations, or lower recall"
    )
