"""What a sparse autoencoder is trained on: its equations, each with its source."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.dictionary.sae import top_k


def fraction_of_variance_unexplained(x: Tensor, x_hat: Tensor) -> Tensor:
    r"""How much of a batch's variance a reconstruction misses; a scalar.

    .. math:: \mathrm{FVU}(x, \hat x) =
        \frac{\sum_t \lVert x_t - \hat x_t \rVert^2}{\sum_t \lVert x_t - \bar x \rVert^2}

    Source: the normalised error of Gao et al. 2024 (arXiv 2406.04093), section 2.1.

    Args:
        x: ``[batch, d]``.
        x_hat: ``[batch, d]``.
    """
    variance = (x - x.mean(dim=0)).square().sum()
    return (x - x_hat).square().sum() / variance.clamp_min(torch.finfo(x.dtype).tiny)


def least_squares_scale(x: Tensor, x_hat: Tensor) -> Tensor:
    r"""The number by which a reconstruction comes nearest to its target; a scalar.

    .. math:: s = \arg\min_s \sum_t \lVert x_t - s\, \hat x_t \rVert^2
        = \frac{\sum_t \langle x_t, \hat x_t \rangle}{\sum_t \lVert \hat x_t \rVert^2}

    Args:
        x: ``[batch, d]``.
        x_hat: ``[batch, d]``, not all zero.
    """
    return (x * x_hat).sum() / x_hat.square().sum()


def aux_k_loss(residual: Tensor, dead_latents: Tensor, dead_rows: Tensor, aux_k: int) -> Tensor:
    r"""How badly the dead latents reconstruct what the live ones left; a scalar.

    .. math:: L_\mathrm{aux} = \mathrm{FVU}(e, \hat e), \qquad
        \hat e = \mathrm{TopK}_\mathrm{aux}(a_\mathrm{dead})\, W_\mathrm{dec, dead}

    The residual is a fixed target, so that live latents answer to the main loss alone. It has the
    decoder bias subtracted already: adding it to the reconstruction would teach the dead latents to
    cancel it.

    Source: Gao et al. 2024, appendix A.2.

    Args:
        residual: ``e = x - x_hat``, ``[batch, d]``.
        dead_latents: activations of the dead latents, ``[batch, dead]``, non-negative.
        dead_rows: their decoder rows, ``[dead, d]``.
        aux_k: Dead latents kept a token; all of them where there are fewer.
    """
    z = top_k(dead_latents, min(aux_k, dead_latents.shape[1]))
    return fraction_of_variance_unexplained(residual.detach(), z @ dead_rows)


def perpendicular_part(gradient: Tensor, rows: Tensor) -> Tensor:
    r"""The part of each row's gradient that doesn't lie along the row, ``[n, d]``.

    .. math:: g_j - \langle g_j, w_j \rangle\, w_j

    The other part would be undone when rows are scaled to unit norm, and yet fill Adam's moments.

    Source: Bricken et al. 2023, "Towards Monosemanticity", appendix on the training setup.

    Args:
        gradient: ``[n, d]``.
        rows: ``[n, d]`` of unit norm.
    """
    return gradient - (gradient * rows).sum(dim=-1, keepdim=True) * rows


def geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    r"""The point with the least sum of distances to the points, by Weiszfeld's iteration, ``[d]``.

    .. math:: y \leftarrow
        \frac{\sum_i x_i / \lVert x_i - y \rVert}{\sum_i 1 / \lVert x_i - y \rVert}

    from the mean. Unlike the mean it hardly feels the few tokens of huge norm that language models
    have.

    Source: Weiszfeld 1937; its use for the decoder bias from Gao et al. 2024, appendix A.1.

    Args:
        points: ``[points, d]``.
        iterations: Most iterations.
        tolerance: Stop when a move is this small against the mean distance to the points.
    """
    x = points.double()
    y = x.mean(dim=0)
    for _ in range(iterations):
        distance = (x - y).norm(dim=-1)
        scale = distance.mean()
        # An estimate that meets a point would divide by zero.
        distance = distance.clamp_min(1e-12 * float(scale) + torch.finfo(x.dtype).tiny)
        # Relative to the nearest point, since the weights of equal points would overflow.
        weight = distance.min() / distance
        update = weight @ x / weight.sum()
        moved = (update - y).norm()
        y = update
        if moved <= tolerance * scale:
            break
    return y.to(points.dtype)
