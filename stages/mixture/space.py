"""What a row costs: the space that vectors are compared in, and a task term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.mixture.cost import Metric, cost_matrix
from stages.mixture.simplex import FloatArray, IntArray


@dataclass(frozen=True)
class Projection:
    """The leading principal directions of some vectors.

    Attributes:
        mean: float64 [d].
        directions: orthonormal, float64 [r, d].
        variances: along each direction, float64 [r].
        share: share of the whole variance that the directions hold.
    """

    mean: FloatArray
    directions: FloatArray
    variances: FloatArray
    share: float

    def of(self, vectors: npt.ArrayLike) -> FloatArray:
        r"""Coordinates :math:`V (x - \bar x)`.

        Source: definition of principal components.

        Args:
            vectors: [n, d].

        Returns:
            float64 [n, r].
        """
        centred = np.asarray(vectors, dtype=np.float64) - self.mean
        return np.asarray(centred @ self.directions.T, dtype=np.float64)

    def table(self) -> pa.Table:
        """The projection as rows: the mean, then one direction each with its variance."""
        return pa.table(
            {
                "part": ["mean", *["direction"] * len(self.directions)],
                "variance": [None, *self.variances.tolist()],
                "vector": [self.mean.tolist(), *self.directions.tolist()],
            }
        )


def principal_projection(
    x: npt.ArrayLike, y: npt.ArrayLike, b: npt.ArrayLike, dimensions: int
) -> Projection:
    r"""Directions of largest variance, rows and targets counting as much as each other.

    Eigenvectors of :math:`\tfrac12 \mathrm{Cov}(x) + \tfrac12 \mathrm{Cov}_b(y)` about their common
    mean, each turned so that its largest entry is positive: equal inputs give equal directions.
    Source: principal component analysis (Hotelling 1933).

    Args:
        x: rows, [n, d].
        y: targets, [m, d].
        b: mass of targets, [m], sum 1.
        dimensions: r, at most d.

    Raises:
        ValueError: more dimensions are asked for than the vectors have.
    """
    points = np.concatenate([np.asarray(x, np.float64), np.asarray(y, np.float64)])
    if dimensions > points.shape[1]:
        raise ValueError(f"pca asks for {dimensions} of {points.shape[1]} dimensions")
    n = len(np.asarray(x))
    mass = np.concatenate([np.full(n, 0.5 / n), 0.5 * np.asarray(b, np.float64)])
    mean = mass @ points
    centred = points - mean
    variances, directions = np.linalg.eigh(centred.T @ (mass[:, None] * centred))
    order = np.argsort(-variances, kind="stable")[:dimensions]
    chosen = directions.T[order]
    places = np.abs(chosen).argmax(axis=1)[:, None]
    chosen = chosen * np.sign(np.take_along_axis(chosen, places, axis=1))
    whole = float(variances.sum()) or 1.0
    return Projection(mean, chosen, variances[order], float(variances[order].sum()) / whole)


def projection_of(table: pa.Table) -> Projection:
    """The projection that `Projection.table` wrote; its share isn't kept, and is NaN."""
    vectors = np.array(table["vector"].to_pylist(), dtype=np.float64)
    variances = np.array(table["variance"].to_pylist()[1:], dtype=np.float64)
    return Projection(vectors[0], vectors[1:], variances, float("nan"))


def task_penalty(
    sources: Sequence[str],
    tasks: Sequence[str],
    serves: Mapping[str, Sequence[str]],
    weight: float,
) -> FloatArray | None:
    r"""What is added to the cost: :math:`\lambda \cdot [\mathrm{task}_j \notin \mathrm{serves}_k]`.

    A source that `serves` doesn't name pays nothing. It is the label term of a cost between
    labelled rows (Alvarez-Melis and Fusi 2020, arXiv 2002.02923), with 0 or 1 between labels.

    Args:
        sources: K names.
        tasks: task of each target point, [m].
        serves: tasks of sources.
        weight: lambda, in units of the cost.

    Returns:
        float64 [K, m], or None where nothing is added.
    """
    if not weight or not serves:
        return None
    return np.array(
        [
            [weight * (name in serves and task not in serves[name]) for task in tasks]
            for name in sources
        ]
    )


@dataclass(frozen=True)
class Space:
    """How rows are compared with targets.

    Attributes:
        metric: cost between two vectors.
        projection: applied to all vectors first, or None.
        penalty: added to the cost of a source's rows, float64 [K, m], or None.
    """

    metric: Metric
    projection: Projection | None = None
    penalty: FloatArray | None = None

    def vectors(self, vectors: npt.ArrayLike) -> FloatArray:
        """Vectors as they are compared, float64 [n, r]."""
        if self.projection is not None:
            return self.projection.of(vectors)
        return np.asarray(vectors, dtype=np.float64)

    def cost(self, x: npt.ArrayLike, source: IntArray, y: npt.ArrayLike) -> FloatArray:
        """Cost between rows and targets, both as `vectors` gave them.

        Args:
            x: [n, r].
            source: number of each row's source, int64 [n].
            y: targets, [m, r].

        Returns:
            float64 [n, m].
        """
        cost = cost_matrix(x, y, self.metric)
        if self.penalty is not None:
            cost += self.penalty[source]
        return cost
