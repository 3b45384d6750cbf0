"""Pooling of token vectors into sample vectors.

``row_of_token`` says which sample a token belongs to; -1 marks a token that is not content
(padding, beginning of sequence, chat template) and is left out.

Sums run in float32 at least. On CUDA their order may vary between runs unless
``torch.use_deterministic_algorithms`` is on.

Source: mean pooling from MoNA (arXiv 2503.15573), equation 7; max pooling from FAC Synthesis
(arXiv 2602.10388).
"""

import torch
from torch import Tensor


def mean_pool_codes(
    codes_indices: Tensor,
    codes_values: Tensor,
    row_of_token: Tensor,
    n_rows: int,
    d_sae: int,
    lengths: Tensor,
) -> Tensor:
    """Return the mean sparse code of each sample, ``z = (1 / length) sum_t z_t``.

    Each value is divided by the length of its sample before it is added, so the results for
    disjoint chunks of tokens add up to the result for all of them.

    Args:
        codes_indices: int64 ``[tokens, m]``, latents of a token.
        codes_values: ``[tokens, m]``, their values; zeros are padding.
        row_of_token: int64 ``[tokens]``, sample of a token or -1.
        n_rows: Number of samples.
        d_sae: Number ``n`` of latents.
        lengths: ``[n_rows]`` integers, content tokens of a sample over all chunks.

    Returns:
        ``[n_rows, n]`` in float32 or wider; zeros for a sample without tokens.

    Raises:
        ValueError: If shapes disagree, an index is out of range, or a sample with tokens has a
            length below 1.

    Source: MoNA, equation 7.
    """
    indices, values, rows = _content(codes_indices, codes_values, row_of_token, n_rows, d_sae)
    _check_lengths(lengths, rows, n_rows)
    weighted = values / lengths[rows].unsqueeze(1)
    pooled = torch.zeros(n_rows * d_sae, dtype=values.dtype, device=values.device)
    pooled.index_add_(0, _flat_position(indices, rows, d_sae), weighted.flatten())
    return pooled.view(n_rows, d_sae)


def max_pool_codes(
    codes_indices: Tensor,
    codes_values: Tensor,
    row_of_token: Tensor,
    n_rows: int,
    d_sae: int,
) -> Tensor:
    """Return the largest value of each latent over the tokens of each sample.

    The results for disjoint chunks of tokens combine by ``torch.maximum``.

    Args:
        codes_indices: int64 ``[tokens, m]``, latents of a token.
        codes_values: ``[tokens, m]``, their values, non-negative; zeros are padding.
        row_of_token: int64 ``[tokens]``, sample of a token or -1.
        n_rows: Number of samples.
        d_sae: Number ``n`` of latents.

    Returns:
        ``[n_rows, n]`` in float32 or wider; zeros for a sample without tokens.

    Raises:
        ValueError: If shapes disagree or an index is out of range.

    Source: FAC Synthesis (arXiv 2602.10388), equation 4.
    """
    indices, values, rows = _content(codes_indices, codes_values, row_of_token, n_rows, d_sae)
    pooled = torch.zeros(n_rows * d_sae, dtype=values.dtype, device=values.device)
    pooled.scatter_reduce_(0, _flat_position(indices, rows, d_sae), values.flatten(), "amax")
    return pooled.view(n_rows, d_sae)


def mean_pool_dense(vectors: Tensor, row_of_token: Tensor, n_rows: int, lengths: Tensor) -> Tensor:
    """Return the mean dense vector of each sample, for hidden states or codes in dense storage.

    As in ``mean_pool_codes``, the results for disjoint chunks of tokens add up.

    Args:
        vectors: ``[tokens, n]``.
        row_of_token: int64 ``[tokens]``, sample of a token or -1.
        n_rows: Number of samples.
        lengths: ``[n_rows]`` integers, content tokens of a sample over all chunks.

    Returns:
        ``[n_rows, n]`` in float32 or wider; zeros for a sample without tokens.

    Raises:
        ValueError: If shapes disagree, a row is out of range, or a sample with tokens has a
            length below 1.

    Source: MoNA, equation 7.
    """
    if vectors.ndim != 2 or row_of_token.shape != vectors.shape[:1]:
        raise ValueError(
            f"vectors must be [tokens, n] and row_of_token [tokens], got {tuple(vectors.shape)} "
            f"and {tuple(row_of_token.shape)}"
        )
    _check_range("row_of_token", row_of_token, -1, n_rows)
    content = row_of_token >= 0
    rows, wide = row_of_token[content], _widen(vectors[content])
    _check_lengths(lengths, rows, n_rows)
    pooled = torch.zeros(n_rows, vectors.shape[1], dtype=wide.dtype, device=wide.device)
    return pooled.index_add_(0, rows, wide / lengths[rows].unsqueeze(1))


def _content(
    indices: Tensor, values: Tensor, row_of_token: Tensor, n_rows: int, d_sae: int
) -> tuple[Tensor, Tensor, Tensor]:
    if (
        indices.ndim != 2
        or indices.shape != values.shape
        or row_of_token.shape != indices.shape[:1]
    ):
        raise ValueError(
            "codes must be [tokens, m] and row_of_token [tokens], got indices "
            f"{tuple(indices.shape)}, values {tuple(values.shape)}, row_of_token "
            f"{tuple(row_of_token.shape)}"
        )
    _check_range("row_of_token", row_of_token, -1, n_rows)
    content = row_of_token >= 0
    indices = indices[content]
    # An index too large would land, unseen, in the next sample of the flat accumulator.
    _check_range("codes_indices", indices, 0, d_sae)
    return indices, _widen(values[content]), row_of_token[content]


def _check_range(name: str, numbers: Tensor, low: int, high: int) -> None:
    if bool(((numbers < low) | (numbers >= high)).any()):
        raise ValueError(f"{name} must be in [{low}, {high})")


def _check_lengths(lengths: Tensor, rows: Tensor, n_rows: int) -> None:
    if lengths.shape != (n_rows,):
        raise ValueError(f"lengths must have shape ({n_rows},), got {tuple(lengths.shape)}")
    if bool((lengths[rows] < 1).any()):
        raise ValueError("a sample with tokens must have a length of at least 1")


def _flat_position(indices: Tensor, rows: Tensor, width: int) -> Tensor:
    return (rows.unsqueeze(1) * width + indices).flatten()


def _widen(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
