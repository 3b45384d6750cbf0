"""How good an autoencoder is on activations, and on rows, that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.dictionary.sae import SparseAutoencoder


@dataclass(frozen=True)
class Reconstruction:
    """How well and how sparsely an autoencoder reconstructs held-out activations.

    Attributes:
        fvu: Fraction of variance unexplained, ``sum |x - x_hat|^2 / sum |x - mean|^2``.
        l0: Mean number of active latents per token.
        dead_share: Share of latents that no token activated.
    """

    fvu: float
    l0: float
    dead_share: float


@dataclass(frozen=True)
class SplicedLosses:
    """What a model loses, in nats a token, when one block's output is replaced.

    Attributes:
        clean: Cross-entropy of the model as it is.
        spliced: With the autoencoder's reconstruction in place of the output.
        ablated: With zeros in place of it.
    """

    clean: float
    spliced: float
    ablated: float

    @property
    def recovered(self) -> float:
        r"""The share of the output's worth that the reconstruction keeps; 1 is all of it.

        .. math:: \frac{\mathrm{CE}_\mathrm{ablated} - \mathrm{CE}_\mathrm{spliced}}
            {\mathrm{CE}_\mathrm{ablated} - \mathrm{CE}_\mathrm{clean}}

        Source: Bricken et al. 2023, "Towards Monosemanticity"; the "loss recovered" of
        Rajamanoharan et al. 2024 (arXiv 2404.16014), section 4.
        """
        return (self.ablated - self.spliced) / (self.ablated - self.clean)


@torch.no_grad()
def evaluate_reconstruction(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> Reconstruction:
    """Measure an autoencoder over a stream of batches.

    ``FVU = sum |x - x_hat|^2 / sum |x - mean|^2`` with the mean over the whole stream: a ratio of
    sums, never the mean of the ratios of batches. Sums run in float64, and the total variance is
    merged batch by batch, so a large mean does not cancel it.

    Args:
        sae: The autoencoder.
        batches: Tensors ``[batch, d]`` of any floating-point dtype.

    Returns:
        The measures over all tokens.

    Raises:
        ValueError: If a batch has the wrong shape, or the stream is empty or constant.

    Source: Chan, Golub and LeVeque 1983, equation 2.1 (pairwise merge of variances).
    """
    weight = sae.W_dec
    count = 0
    mean = torch.zeros(sae.config.d_in, dtype=torch.float64, device=weight.device)
    total = torch.zeros_like(mean)
    error = torch.zeros((), dtype=torch.float64, device=weight.device)
    firings = torch.zeros(sae.config.d_sae, dtype=torch.int64, device=weight.device)
    for batch in batches:
        check_batch(batch, sae.config.d_in)
        x = batch.to(weight.device, weight.dtype)
        z = sae.encode(x)
        x64 = x.double()
        error += (x64 - sae.decode(z, x).double()).square().sum()
        firings += (z > 0).sum(dim=0)
        size = x.shape[0]
        delta = x64.mean(dim=0) - mean
        total += (x64 - x64.mean(dim=0)).square().sum(dim=0)
        total += delta.square() * (count * size / (count + size))
        mean += delta * (size / (count + size))
        count += size
    variance = float(total.sum())
    if variance == 0:
        raise ValueError(f"the variance of {count} activations is zero: FVU is undefined")
    return Reconstruction(
        fvu=float(error) / variance,
        l0=float(firings.sum()) / count,
        dead_share=float((firings == 0).double().mean()),
    )


def check_batch(batch: Tensor, d_in: int) -> None:
    """Refuse what is no batch of activations.

    Raises:
        ValueError: If it is empty or has another width.
    """
    if batch.ndim != 2 or batch.shape[0] == 0 or batch.shape[1] != d_in:
        raise ValueError(f"expected a non-empty batch [batch, {d_in}], got {tuple(batch.shape)}")
