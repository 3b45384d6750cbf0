"""Sparse autoencoders: a wide, sparse, non-negative code for a model's activations.

Shapes: ``d`` is the activation width (``d_in``), ``n`` the number of latents (``d_sae``).

Source: TopK from Gao et al. 2024 (arXiv 2406.04093); BatchTopK from Bussmann et al. 2024
(arXiv 2412.06410); JumpReLU from Rajamanoharan et al. 2024 (arXiv 2407.14435).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Architecture = Literal["topk", "jumprelu"]


@dataclass(frozen=True)
class SparseAutoencoderConfig:
    """Shape and activation function of a sparse autoencoder.

    Attributes:
        d_in: Width ``d`` of the activations.
        d_sae: Number ``n`` of latents.
        architecture: ``topk`` keeps the ``k`` largest latents of each token; ``jumprelu`` keeps
            the latents above a threshold of their own, independently of the other latents.
        k: Active latents per token, for ``topk`` only.

    Raises:
        ValueError: If a size is not positive, the architecture is unknown, or ``k`` is missing,
            out of range, or given for ``jumprelu``.
    """

    d_in: int
    d_sae: int
    architecture: Architecture = "topk"
    k: int | None = None

    def __post_init__(self) -> None:
        """Refuse a configuration that describes no autoencoder."""
        if self.d_in < 1 or self.d_sae < 1:
            raise ValueError(f"d_in and d_sae must be positive, got {self.d_in} and {self.d_sae}")
        if self.architecture not in ("topk", "jumprelu"):
            raise ValueError(
                f"architecture must be 'topk' or 'jumprelu', got {self.architecture!r}"
            )
        if self.architecture == "topk" and (self.k is None or not 1 <= self.k <= self.d_sae):
            raise ValueError(f"topk needs 1 <= k <= d_sae = {self.d_sae}, got k = {self.k}")
        if self.architecture == "jumprelu" and self.k is not None:
            raise ValueError(f"jumprelu has a threshold and no k, got k = {self.k}")


class SparseCodes(NamedTuple):
    """The active latents of each token.

    Attributes:
        indices: int64 ``[..., m]``, latent numbers, distinct within a token.
        values: ``[..., m]`` non-negative; a zero is padding, whatever its index.
    """

    indices: Tensor
    values: Tensor


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder with a decoder bias that is subtracted before encoding.

    ``a = ReLU((x - b_dec) W_enc + b_enc)``, ``z = sparsify(a)``, ``x_hat = z W_dec + b_dec``.

    Weights start at zero: training or a checkpoint fills them.

    Attributes:
        W_enc: Encoder, ``[d, n]``.
        W_dec: Decoder, ``[n, d]``; a row is the direction of a latent.
        b_enc: Encoder bias, ``[n]``.
        b_dec: Decoder bias, ``[d]``.
        threshold: ``[n]`` for ``jumprelu``, else None.

    Source: Gao et al. 2024, section 2.3; Rajamanoharan et al. 2024, section 3.
    """

    threshold: Tensor | None

    def __init__(
        self, config: SparseAutoencoderConfig, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Allocate the weights.

        Args:
            config: Shape and activation function.
            dtype: Floating-point type of the weights.
        """
        super().__init__()
        self.config = config
        d, n = config.d_in, config.d_sae
        self.W_enc = nn.Parameter(torch.zeros(d, n, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(n, d, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(n, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype))
        jumps = config.architecture == "jumprelu"
        self.register_buffer("threshold", torch.zeros(n, dtype=dtype) if jumps else None)

    def activations(self, x: Tensor) -> Tensor:
        """Return the dense latents ``ReLU((x - b_dec) W_enc + b_enc)``, before sparsification.

        Args:
            x: ``[..., d]`` in the dtype of the weights.

        Returns:
            ``[..., n]``, non-negative.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``d_in``.
        """
        if x.shape[-1] != self.config.d_in:
            raise ValueError(
                f"expected activations [..., {self.config.d_in}], got {tuple(x.shape)}"
            )
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def encode(self, x: Tensor) -> Tensor:
        """Return the sparse code ``z`` of each token.

        Args:
            x: ``[..., d]`` in the dtype of the weights.

        Returns:
            ``[..., n]``, non-negative, dense storage.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``d_in``.
        """
        a = self.activations(x)
        if self.threshold is not None:
            return a * (a > self.threshold)
        assert self.config.k is not None
        return top_k(a, self.config.k)

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Return the sparse code of each token as indices and values.

        Args:
            x: ``[..., d]`` in the dtype of the weights.

        Returns:
            ``m`` entries a token: ``k`` for ``topk``, the largest count in ``x`` for ``jumprelu``.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``d_in``.
        """
        if self.config.k is not None:
            values, indices = self.activations(x).topk(self.config.k, dim=-1)
        else:
            z = self.encode(x)
            width = int((z > 0).sum(dim=-1).max()) if z.numel() else 0
            values, indices = z.topk(width, dim=-1)
        return SparseCodes(indices, values)

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction ``z W_dec + b_dec``.

        Args:
            z: ``[..., n]``.

        Returns:
            ``[..., d]``.

        Raises:
            ValueError: If the last dimension of ``z`` is not ``d_sae``.
        """
        if z.shape[-1] != self.config.d_sae:
            raise ValueError(f"expected codes [..., {self.config.d_sae}], got {tuple(z.shape)}")
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Return ``decode(encode(x))``, ``[..., d]``."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Move the decoder norms into the codes, in place: ``z_j <- z_j |W_dec[j]|``.

        Codes are then in units of the activations and comparable between latents, which the
        generalised Jaccard similarity needs. For ``jumprelu`` the reconstruction is unchanged;
        for ``topk`` the selection becomes the one by ``a_j |W_dec[j]|``.
        """
        norm = _row_norm(self.W_dec).squeeze(-1)
        self.W_enc.mul_(norm)
        self.b_enc.mul_(norm)
        self.W_dec.div_(norm.unsqueeze(-1))
        if self.threshold is not None:
            self.threshold.mul_(norm)


def top_k(a: Tensor, k: int) -> Tensor:
    """Keep the ``k`` largest latents of each token and zero the others.

    Args:
        a: ``[..., n]`` non-negative. The ReLU comes first so that a token with fewer than ``k``
            positive latents gets a shorter code, never a negative one.
        k: Latents kept a token.

    Returns:
        ``[..., n]``, differentiable in the latents kept.

    Source: Gao et al. 2024, equation 3.
    """
    values, indices = a.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(a).scatter(-1, indices, values)


def _row_norm(weight: Tensor) -> Tensor:
    # A zero row has no direction; the floor leaves it at zero instead of turning it into NaN.
    norm: Tensor = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return norm.clamp_min(torch.finfo(weight.dtype).tiny)
