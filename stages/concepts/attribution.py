"""Attribution of the next token's loss to latents, and the strongest of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stages.concepts.settings import ConceptsSettings
from stages.dictionary.sae import SparseAutoencoder
from stages.engines import RowConcepts

MISSING = -1
"""The id in a slot that holds no concept."""

_CHUNK_BYTES = 64 << 20
"""Size of a chunk's dense attributions."""


def attributions(
    sae: SparseAutoencoder, states: Tensor, gradient: Tensor, settings: ConceptsSettings
) -> Tensor:
    r"""How much each latent bears on each token's next one, to first order.

    .. math:: a_t = c_t \odot \nabla_{\hat c_t} \bigl[ -\log f(x_{t+1} \mid D(\hat c_t), h_{<t})
        \bigr] = c_t \odot W_{dec} (\sigma_t g_t)

    with g the gradient at the reconstruction D, in the units of the states, and sigma what a
    normalising autoencoder's decoder multiplies by. c is the code, or with `latents: all` the
    activations before sparsification, as published; a negative one counts as 0. With `gradient_of:
    likelihood` the sign is the other.

    Args:
        sae: the autoencoder.
        states: float32 [tokens, d].
        gradient: g, float32 [tokens, d].
        settings: which latents, and which sign.

    Returns:
        float32 [tokens, latents].

    Source: CoCoMix (arXiv 2502.08524), Eq. 1.
    """
    codes = sae.encode(states) if settings.latents == "active" else sae.activations(states)
    slope = (gradient * sae.normalised(states).scale) @ sae.W_dec.T
    return codes * (slope if settings.gradient_of == "loss" else -slope)


def strongest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest positive values of each line; slots without one hold MISSING and 0.

    Args:
        values: float32 [lines, latents].
        count: slots of a line.

    Returns:
        Latents, int32 [lines, count], strongest first, and their values, float32.
    """
    found = values.topk(min(count, values.shape[-1]), dim=-1)
    there = found.values > 0
    ids = torch.full((*values.shape[:-1], count), MISSING, dtype=torch.int32)
    scores = torch.zeros(*values.shape[:-1], count)
    ids[..., : there.shape[-1]] = torch.where(there, found.indices, MISSING).int().cpu()
    scores[..., : there.shape[-1]] = torch.where(there, found.values, 0.0).float().cpu()
    return ids, scores


def row_concepts(
    sae: SparseAutoencoder,
    states: Tensor,
    gradient: Tensor,
    places: Sequence[int],
    tokens: int,
    settings: ConceptsSettings,
) -> RowConcepts:
    """The concepts of a row's tokens, and of the row by their mean over the tokens that have any.

    Args:
        sae: the autoencoder.
        states: of the tokens that get concepts, float32 [labelled, d].
        gradient: at their reconstructions, float32 [labelled, d].
        places: where in the row they stand.
        tokens: of the row.
        settings: how many concepts, and of what.
    """
    ids = torch.full((tokens, settings.per_token), MISSING, dtype=torch.int32)
    scores = torch.zeros(tokens, settings.per_token)
    total = torch.zeros(sae.config.d_sae, dtype=torch.float64, device=states.device)
    for part in _chunks(len(states), sae.config.d_sae):
        values = attributions(sae, states[part], gradient[part], settings)
        mine = torch.tensor(places[part])
        ids[mine], scores[mine] = strongest(values, settings.per_token)
        total += values.sum(dim=0, dtype=torch.float64)
    mean = (total / max(len(states), 1)).float().unsqueeze(0)
    row_ids, row_scores = strongest(mean, settings.per_row)
    held = row_ids[0] != MISSING
    return RowConcepts(
        ids.numpy(), scores.numpy(), row_ids[0][held].numpy(), row_scores[0][held].numpy()
    )


def reconstructions(sae: SparseAutoencoder, states: Tensor) -> Tensor:
    """What the autoencoder makes of each token's states, float32 [tokens, d]."""
    parts = [sae(states[part]) for part in _chunks(len(states), sae.config.d_sae)]
    return torch.cat(parts) if parts else states


def _chunks(tokens: int, latents: int) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES // (4 * latents))
    return (slice(start, start + size) for start in range(0, tokens, size))
