"""Generalised Jaccard similarity of codes to many target rows, exactly."""

import torch
from torch import Tensor


class PairwiseJaccard:
    r"""Similarities of rows to every target row.

    .. math:: J(z, t) = \frac{m}{S_z + S_t - m}, \qquad m = \sum_j \min(z_j, t_j)

    since min + max = z + t, with S the sum of a code. The sum m runs over the latents that the row
    has and some target has: only those columns of the targets are kept, latent after latent, and a
    row gathers the ones it needs.

    Source: MoNA (arXiv 2503.15573), Eq. 9.
    """

    def __init__(self, targets: Tensor) -> None:
        """Lay the targets out.

        Args:
            targets: codes, float32 [targets, n], non-negative.
        """
        support = (targets > 0).any(dim=0)
        self._place = torch.where(support, support.cumsum(0) - 1, -1)
        self._columns = targets[:, support].T.contiguous()
        self._sums = targets.sum(dim=1, dtype=torch.float64)

    def __call__(self, z: Tensor) -> Tensor:
        """Similarities, float64 [rows, targets]; two zero codes have 0.

        Args:
            z: codes, float32 [rows, n], non-negative.
        """
        shared = torch.empty(len(z), self._columns.shape[1], dtype=torch.float64, device=z.device)
        for row, code in enumerate(z):
            active = ((code > 0) & (self._place >= 0)).nonzero().squeeze(1)
            columns = self._columns[self._place[active]]
            shared[row] = torch.minimum(columns, code[active].unsqueeze(1)).sum(dim=0)
        union = z.sum(dim=1, dtype=torch.float64).unsqueeze(1) + self._sums - shared
        return torch.where(union > 0, shared / union, 0.0)
