"""The transport value of mixtures of embedded rows, and its slopes by the weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.mixture.cost import Metric, cost_matrix
from stages.mixture.simplex import FloatArray, row_weights
from stages.mixture.transport import Transport, mean_potential_per_source, transport


class MixtureTransport:
    r"""The function :math:`T(p) = \mathrm{OT}(\sum_k p_k \mu_k, \nu)` of the weights.

    Every value is solved exactly and anew, from the potentials of the last one.
    """

    def __init__(
        self,
        vectors: FloatArray,
        source: NDArray[np.int64],
        targets: FloatArray,
        mass: FloatArray,
        metric: Metric,
    ) -> None:
        """Compute the costs.

        Args:
            vectors: rows of all sources, [n, d].
            source: of each row, [n], every source of 0..K-1 among them.
            targets: [m, d].
            mass: of the targets, [m].
            metric: the cost.

        Raises:
            ValueError: a row has no cost.
        """
        self._cost = cost_matrix(vectors, targets, metric)
        self._source = source
        self._mass = mass
        self._last: Transport | None = None

    @property
    def sources(self) -> int:
        """K."""
        return int(self._source.max()) + 1

    def value(self, p: FloatArray) -> float:
        """T(p)."""
        return self._solved(p).value

    def values(self, mixtures: FloatArray) -> FloatArray:
        """T of every mixture [n, K]; float64 [n]."""
        return np.array([self.value(p) for p in mixtures])

    def value_and_slopes(self, p: FloatArray) -> tuple[float, FloatArray]:
        r"""T(p) and a subgradient h.

        .. math:: h_k = \frac{1}{n_k} \sum_{i \in S_k} \min_j (c_{ij} - g_j)

        Only differences of h bear on anything: weights sum to 1.

        Source: Danskin's theorem on the semi-dual; g are optimal potentials of the targets.
        """
        solved = self._solved(p)
        means = mean_potential_per_source(solved.source_potential, self._source, self.sources)
        return solved.value, means

    def _solved(self, p: FloatArray) -> Transport:
        mass = row_weights(p, self._source)
        self._last = transport(self._cost, mass, self._mass, self._last)
        return self._last
