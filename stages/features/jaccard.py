"""Generalised Jaccard similarity of pooled sparse codes to task prototypes.

Source: MoNA (arXiv 2503.15573), equations 8 and 9.
"""

import torch
from torch import Tensor


def generalised_jaccard(z: Tensor, prototypes: Tensor) -> Tensor:
    """Return ``J = sum_j min(z_j, p_j) / sum_j max(z_j, p_j)`` for every pair.

    Since ``min + max = z + p``, it is computed as ``J = m / (S_z + S_p - m)`` with
    ``m = sum_j min(z_j, p_j)`` and ``S`` the sum of a vector. Sums run in float64. Two zero
    vectors share no latent: their similarity is defined as 0.

    J depends on the scale of each latent, so both sides must come from one autoencoder.

    Args:
        z: Sample codes ``[n]`` or ``[rows, n]``, non-negative.
        prototypes: Task codes ``[n]`` or ``[tasks, n]``, non-negative, on the same device.

    Returns:
        float64 in [0, 1], of shape ``[]``, ``[rows]``, ``[tasks]`` or ``[rows, tasks]``.

    Raises:
        ValueError: If the widths differ, a tensor has another rank, or a value is negative or
            NaN.

    Source: MoNA, equation 9.
    """
    for name, codes in (("z", z), ("prototypes", prototypes)):
        if codes.ndim not in (1, 2):
            raise ValueError(f"{name} must have 1 or 2 dimensions, got shape {tuple(codes.shape)}")
        if not bool((codes >= 0).all()):
            raise ValueError(f"{name} must be non-negative and free of NaN")
    if z.shape[-1] != prototypes.shape[-1]:
        raise ValueError(
            f"z and prototypes must have the same width, got {tuple(z.shape)} and "
            f"{tuple(prototypes.shape)}"
        )
    rows, tasks = z.reshape(-1, z.shape[-1]), prototypes.reshape(-1, z.shape[-1])
    shared = torch.empty(len(rows), len(tasks), dtype=torch.float64, device=z.device)
    # One task at a time: broadcasting all would hold rows x tasks x n values.
    for number, task in enumerate(tasks):
        shared[:, number] = torch.minimum(rows, task).sum(dim=-1, dtype=torch.float64)
    row_sum = rows.sum(dim=-1, dtype=torch.float64).unsqueeze(1)
    task_sum = tasks.sum(dim=-1, dtype=torch.float64)
    union = row_sum + task_sum - shared
    similarity = torch.where(union > 0, shared / union, 0.0)
    return similarity.reshape(z.shape[:-1] + prototypes.shape[:-1])
