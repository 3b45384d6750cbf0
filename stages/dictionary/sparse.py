"""The few active latents of a batch as entries, and a reconstruction that touches only those.

Of ``batch x n`` latents only ``batch x k`` are active. Decoding, and every gradient, needs those
alone: what remains dense is one product, the encoder's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_SAMPLE = 1 << 16
"""Latents looked at to guess where the largest ones begin."""


class Entries(NamedTuple):
    """Active latents of a batch, in order of token, then latent.

    Attributes:
        tokens: int64 ``[m]``, ascending.
        latents: int64 ``[m]``.
        values: ``[m]``, positive.
    """

    tokens: Tensor
    latents: Tensor
    values: Tensor


class Parameters(NamedTuple):
    """What training moves.

    Attributes:
        encoder: ``[n, d]``; a row is the direction that a latent listens to.
        decoder: ``[n, d]``; a row is the direction that it writes, of unit norm.
        encoder_bias: ``[n]``.
        decoder_bias: ``[d]``.
    """

    encoder: Tensor
    decoder: Tensor
    encoder_bias: Tensor
    decoder_bias: Tensor


def top_k_entries(a: Tensor, k: int) -> Entries:
    r"""The ``k`` largest latents of each token, where they are positive.

    .. math:: z = \mathrm{TopK}(\mathrm{ReLU}(W_\mathrm{enc}(x - b_\mathrm{dec}) + b_\mathrm{enc}))

    Source: Gao et al. 2024 (arXiv 2406.04093), equation 3.

    Args:
        a: ``[batch, n]``, non-negative.
        k: Latents a token.
    """
    latents = a.topk(k, dim=-1, sorted=False).indices
    places = latents + torch.arange(a.shape[0], device=a.device)[:, None] * a.shape[1]
    return _entries(a, places.flatten())


def batch_top_k_entries(a: Tensor, k: int) -> Entries:
    r"""The ``k * batch`` largest latents of a whole batch, where they are positive.

    .. math:: z = \mathrm{BatchTopK}_{k B}(\mathrm{ReLU}(\dots))

    A token may so get more or fewer than ``k``. Its code depends on the other tokens: this is for
    training only, and a threshold takes its place afterwards.

    Source: Bussmann et al. 2024 (arXiv 2412.06410), equation 4.

    Args:
        a: ``[batch, n]``, non-negative.
        k: Mean number of latents a token.
    """
    flat, count = a.flatten(), k * a.shape[0]
    candidates = _candidates(flat, count)
    places = flat[candidates].topk(min(count, len(candidates)), sorted=False).indices
    return _entries(a, candidates[places])


def _candidates(flat: Tensor, count: int) -> Tensor:
    """Places that hold the `count` largest positive values among few others, or all of them.

    A sample says where to cut; where it was wrong and too few pass, everything positive does, so
    that the result is exact either way. On two cores this takes a sixth of the time.
    """
    sample = flat[:: max(1, len(flat) // _SAMPLE)]
    taken = min(len(sample), 1 + 3 * count * len(sample) // (2 * len(flat)))
    cut = sample.topk(taken, sorted=False).values.min()
    found = (flat > cut).nonzero().squeeze(-1)
    return found if len(found) >= count else (flat > 0).nonzero().squeeze(-1)


def _entries(a: Tensor, places: Tensor) -> Entries:
    places = places.sort().values
    values = a.flatten()[places]
    active = values > 0
    places, width = places[active], a.shape[1]
    return Entries(places // width, places % width, values[active])


def sparse_reconstruction(x: Tensor, weights: Parameters, entries: Entries) -> Tensor:
    r"""The reconstruction from active latents, differentiable in the parameters, ``[batch, d]``.

    .. math:: \hat x = z W_\mathrm{dec} + b_\mathrm{dec}

    With ``G`` the gradient of ``x_hat`` and ``D`` that of the active latents,

    .. math::
        D_{tj} = \langle G_t, w^\mathrm{dec}_j \rangle, \quad
        \partial W_\mathrm{dec} = z^\top G, \quad
        \partial W_\mathrm{enc} = D^\top (x - b_\mathrm{dec}), \\
        \partial b_\mathrm{enc} = D^\top 1, \quad
        \partial b_\mathrm{dec} = G^\top 1 - W_\mathrm{enc}^\top D^\top 1

    A selection (top-k, batch top-k) has no gradient of its own: what wasn't selected has none.

    Args:
        x: ``[batch, d]``; it gets no gradient.
        weights: What training moves.
        entries: Active latents of ``x`` under these parameters.
    """
    x_hat: Tensor = _Reconstruction.apply(x, *weights, entries)  # type: ignore[no-untyped-call]
    return x_hat


class _Reconstruction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        encoder: Tensor,
        decoder: Tensor,
        encoder_bias: Tensor,
        decoder_bias: Tensor,
        entries: Entries,
    ) -> Tensor:
        ctx.save_for_backward(x, encoder, decoder, decoder_bias, *entries)
        starts = _starts(entries.tokens, x.shape[0])
        return _bags(entries.latents, starts, decoder, entries.values) + decoder_bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, encoder, decoder, decoder_bias, tokens, latents, values = ctx.saved_tensors
        n = decoder.shape[0]
        d = (g[tokens] * decoder[latents]).sum(dim=-1)
        by_latent = latents.argsort(stable=True)
        starts = _starts(latents[by_latent], n)
        tokens, values, d = tokens[by_latent], values[by_latent], d[by_latent]
        encoder_bias = torch.zeros(n, dtype=d.dtype, device=d.device)
        encoder_bias.index_add_(0, latents[by_latent], d)
        return (
            None,
            _bags(tokens, starts, x - decoder_bias, d),
            _bags(tokens, starts, g, values),
            encoder_bias,
            g.sum(dim=0) - encoder_bias @ encoder,
            None,
        )


def _starts(owners: Tensor, count: int) -> Tensor:
    """Where each owner's entries start, ``[count]``; owners ascending."""
    return torch.searchsorted(owners, torch.arange(count, device=owners.device))


def _bags(indices: Tensor, starts: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """For each bag the weighted sum of the rows that it names, ``[bags, d]``."""
    return embedding_bag(indices, rows, starts, mode="sum", per_sample_weights=weights)
