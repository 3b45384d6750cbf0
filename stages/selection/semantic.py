"""Rows that mean nearly the same, by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

_BLOCK = 4096
"""Kept rows that are compared with at once."""


def vectors_of(column: pa.ChunkedArray) -> FloatArray:
    """A column of equally long lists without nulls as float32 [rows, d]."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors: FloatArray = values.reshape(len(column), -1) if len(column) else values.reshape(0, 1)
    return vectors


class Mate(NamedTuple):
    """The kept row that a row is nearest to, and the cosine of the two."""

    id: str
    cosine: float


class SemanticDuplicates:
    r"""Rows kept so far, against which later ones are compared: each with each, exactly.

    A row is a duplicate where for some kept row before it

    .. math:: \cos(x, y) = x \cdot y \ge t, \quad |x| = |y| = 1.

    As SemDeDup (arXiv 2303.09540), but without its clusters of embeddings, which miss pairs across
    clusters, and with kept rows instead of all: no chain drops a row that is unlike all kept ones.
    Takes n k d multiplications for n rows of which k are kept, and holds 4 d bytes of each kept.
    """

    def __init__(self, threshold: float) -> None:
        """Keep the cosine from which on a row is a duplicate."""
        self._threshold = threshold
        self._ids: list[str] = []
        self._blocks: list[FloatArray] = []
        self._filled = _BLOCK

    def add(self, ids: Sequence[str], vectors: FloatArray) -> None:
        """Count rows as kept, whatever they are near to.

        Args:
            ids: of the rows.
            vectors: L2-normalised, float32 [rows, d].
        """
        for row, vector in zip(ids, vectors, strict=True):
            if self._filled == _BLOCK:
                self._blocks.append(np.empty((_BLOCK, len(vector)), np.float32))
                self._filled = 0
            self._blocks[-1][self._filled] = vector
            self._filled += 1
            self._ids.append(row)

    def mates(self, ids: Sequence[str], vectors: FloatArray) -> list[Mate | None]:
        """For each row the kept row that it duplicates; None where it has none and is now kept.

        Args:
            ids: of the rows, in their order.
            vectors: L2-normalised, float32 [rows, d].
        """
        if not ids:
            return []
        found = [
            Mate(self._ids[place], cosine) if cosine >= self._threshold else None
            for place, cosine in self._nearest(vectors)
        ]
        among = vectors @ vectors.T
        kept: list[int] = []
        for place, mate in enumerate(found):
            if mate is not None:
                continue
            if kept and (best := float(among[place, kept].max())) >= self._threshold:
                nearest = kept[int(among[place, kept].argmax())]
                found[place] = Mate(ids[nearest], best)
            else:
                kept.append(place)
        self.add([ids[place] for place in kept], vectors[kept])
        return found

    def _nearest(self, vectors: FloatArray) -> list[tuple[int, float]]:
        """Place and cosine of the kept row nearest to each row; -1 where none is kept."""
        places = np.zeros(len(vectors), np.int64)
        cosines = np.full(len(vectors), -1.0, np.float32)
        for number, block in enumerate(self._blocks):
            last = number == len(self._blocks) - 1
            products = vectors @ block[: self._filled if last else _BLOCK].T
            best = products.argmax(axis=1)
            values = products[np.arange(len(vectors)), best]
            nearer = values > cosines
            places[nearer] = best[nearer] + number * _BLOCK
            cosines[nearer] = values[nearer]
        return list(zip(places.tolist(), cosines.tolist(), strict=True))
