"""The c-transforms of rows on a GPU, in float64: the part of a pass that takes its time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from stages.errors import StageError
from stages.mixture.cost import Metric
from stages.mixture.simplex import FloatArray

if TYPE_CHECKING:
    import torch

Device = Literal["cpu", "cuda"]

TILE_ROWS = 16_384
"""Rows at a time: with 4,096 target points their costs are 0.5 GB."""


def lowest_on(
    device: Device,
    x: FloatArray,
    y: FloatArray,
    potentials: FloatArray,
    metric: Metric,
    penalty: FloatArray | None,
) -> FloatArray:
    r"""The c-transforms :math:`f_{ij} = \min_l (c(x_i, y_l) + \pi_{il} - g_{jl})` by torch.

    Distances are taken from differences, so that a row is at distance 0 from itself, as
    `cost_matrix` has it.
    Source: Kantorovich duality (Villani 2009, Optimal Transport, Definition 5.2).

    Args:
        device: cuda, or cpu to compare with.
        x: rows, float64 [n, d], each with a cost.
        y: target points, float64 [m, d].
        potentials: g, float64 [J, m].
        metric: the cost c.
        penalty: added to the costs of each row, float64 [n, m], or None.

    Returns:
        float64 [n, J].

    Raises:
        StageError: this process sees no GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise StageError(
            "execution.pass_gpus asks for a GPU, and this process sees none; set it to 0, or run "
            "where there is one",
            stage="mixture",
        )
    points, duals = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (y, potentials))
    lowest = np.empty((len(x), len(potentials)))
    for start in range(0, len(x), TILE_ROWS):
        rows = slice(start, start + TILE_ROWS)
        costs = _costs(torch.from_numpy(np.ascontiguousarray(x[rows])).to(device), points, metric)
        if penalty is not None:
            costs += torch.from_numpy(np.ascontiguousarray(penalty[rows])).to(device)
        found = [(costs - g).amin(dim=1) for g in duals]
        if found:
            lowest[rows] = torch.stack(found, dim=1).cpu().numpy()
    return lowest


def _costs(x: torch.Tensor, y: torch.Tensor, metric: Metric) -> torch.Tensor:
    import torch

    if metric == "cosine":
        # The largest entry first, so that no square of a tiny or huge entry is lost.
        x, y = (rows / rows.abs().amax(dim=1, keepdim=True) for rows in (x, y))
        x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (x, y))
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    match metric:
        case "euclidean":
            return distances
        case "squared_euclidean":
            return distances.square()
        case "cosine":
            return distances.square() / 2
