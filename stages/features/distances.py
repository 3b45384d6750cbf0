"""Similarities of codes besides generalised Jaccard: cosine, and minus the Euclidean distance."""

import torch
from torch import Tensor


def cosine_similarity(z: Tensor, references: Tensor) -> Tensor:
    r"""Cosine of every pair; 0 where a vector is zero.

    .. math:: \cos(z, p) = \frac{\langle z, p \rangle}{\lVert z \rVert\, \lVert p \rVert}

    Args:
        z: float32 [rows, n].
        references: float32 [references, n], on the same device.

    Returns:
        float64 [rows, references].
    """
    return (_unit(z) @ _unit(references).T).double()


def negative_distance(z: Tensor, references: Tensor) -> Tensor:
    r"""Minus the Euclidean distance of every pair, so that the nearest is the largest.

    .. math:: s(z, p) = -\lVert z - p \rVert_2

    Args:
        z: float32 [rows, n].
        references: float32 [references, n], on the same device.

    Returns:
        float64 [rows, references].
    """
    # Not by the inner product, which cancels where the two are near each other.
    exact = "donot_use_mm_for_euclid_dist"
    negative: Tensor = -torch.cdist(z, references, compute_mode=exact).double()
    return negative


def _unit(vectors: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    unit: Tensor = vectors / norm.clamp_min(torch.finfo(vectors.dtype).tiny)
    return unit
