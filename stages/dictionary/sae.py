"""Sparse autoencoders: a wide, sparse, non-negative code for a model's activations.

Shapes: ``d`` is the activation width (``d_in``), ``n`` the number of latents (``d_sae``).

Source: TopK from Gao et al. 2024 (arXiv 2406.04093); BatchTopK from Bussmann et al. 2024
(arXiv 2412.06410); JumpReLU from Rajamanoharan et al. 2024 (arXiv 2407.14435); gated from
Rajamanoharan et al. 2024 (arXiv 2404.16014).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Architecture = Literal["standard", "topk", "jumprelu", "gated"]
Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]

ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
NORMALISATIONS: tuple[str, ...] = get_args(Normalisation)
LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class SparseAutoencoderConfig:
    """Shape and activation function of a sparse autoencoder.

    Attributes:
        d_in: Width ``d`` of the activations.
        d_sae: Number ``n`` of latents.
        architecture: ``standard`` keeps every positive latent; ``topk`` the ``k`` largest of each
            token; ``jumprelu`` those above a threshold of their own, independently of the other
            latents; ``gated`` those whose gate is open, with magnitudes of their own.
        k: Active latents per token, for ``topk`` only.
        normalisation: What is done to a token's activations before they are encoded, and undone
            after decoding; the names are SAELens'.

    Raises:
        ValueError: If a size is not positive, the architecture or normalisation is unknown, or
            ``k`` is missing, out of range, or given for another architecture than ``topk``.
    """

    d_in: int
    d_sae: int
    architecture: Architecture = "topk"
    k: int | None = None
    normalisation: Normalisation = "none"

    def __post_init__(self) -> None:
        """Refuse a configuration that describes no autoencoder."""
        if self.d_in < 1 or self.d_sae < 1:
            raise ValueError(f"d_in and d_sae must be positive, got {self.d_in} and {self.d_sae}")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}"
            )
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(
                f"normalisation must be one of {', '.join(NORMALISATIONS)}, "
                f"got {self.normalisation!r}"
            )
        if self.architecture == "topk" and (self.k is None or not 1 <= self.k <= self.d_sae):
            raise ValueError(f"topk needs 1 <= k <= d_sae = {self.d_sae}, got k = {self.k}")
        if self.architecture != "topk" and self.k is not None:
            raise ValueError(f"{self.architecture} has no k, got k = {self.k}")


class SparseCodes(NamedTuple):
    """The active latents of each token.

    Attributes:
        indices: int64 ``[..., m]``, latent numbers, distinct within a token.
        values: ``[..., m]`` non-negative; a zero is padding, whatever its index.
    """

    indices: Tensor
    values: Tensor


class Normalised(NamedTuple):
    """Activations ``x`` brought to a common scale, and what undoes it.

    Attributes:
        values: ``[..., d]``.
        shift: ``[..., 1]``.
        scale: ``[..., 1]``; a reconstruction ``y`` of the values stands for ``y scale + shift``.
    """

    values: Tensor
    shift: Tensor
    scale: Tensor


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder with a decoder bias that is subtracted before encoding.

    With ``u = (x - b_dec) W_enc``: ``a = ReLU(u + b_enc)``, ``z = sparsify(a)`` and
    ``x_hat = z W_dec + b_dec``. Where the configuration normalises, ``x`` is normalised first and
    ``x_hat`` brought back last.

    Weights start at zero: training or a checkpoint fills them.

    Attributes:
        W_enc: Encoder, ``[d, n]``.
        W_dec: Decoder, ``[n, d]``; a row is the direction of a latent.
        b_enc: Encoder bias, ``[n]``; for ``gated`` that of the gates.
        b_dec: Decoder bias, ``[d]``.
        threshold: ``[n]`` for ``jumprelu``, else None.
        r_mag: Logarithm of the magnitudes' scale against the gates', ``[n]`` for ``gated``, else
            None.
        b_mag: Bias of the magnitudes, ``[n]`` for ``gated``, else None.

    Source: Gao et al. 2024, section 2.3; Rajamanoharan et al. 2024, section 3.
    """

    threshold: Tensor | None
    r_mag: nn.Parameter | None
    b_mag: nn.Parameter | None

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
        gated, jumps = config.architecture == "gated", config.architecture == "jumprelu"
        for name in ("r_mag", "b_mag"):
            self.register_parameter(
                name, nn.Parameter(torch.zeros_like(self.b_enc)) if gated else None
            )
        self.register_buffer("threshold", torch.zeros(n, dtype=dtype) if jumps else None)

    def normalised(self, x: Tensor) -> Normalised:
        """Return the activations as the encoder takes them.

        Args:
            x: ``[..., d]``.
        """
        if self.config.normalisation == "layer_norm":
            return layer_normalised(x)
        if self.config.normalisation == "constant_norm_rescale":
            return norm_rescaled(x)
        one = x.new_ones(())
        return Normalised(x, torch.zeros_like(one), one)

    def activations(self, x: Tensor) -> Tensor:
        """Return the dense latents before sparsification, ``ReLU((x - b_dec) W_enc + b_enc)``.

        Args:
            x: ``[..., d]`` in the dtype of the weights.

        Returns:
            ``[..., n]``, non-negative; for ``gated`` the magnitudes behind open gates, which are
            sparse already.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``d_in``.
        """
        if x.shape[-1] != self.config.d_in:
            raise ValueError(
                f"expected activations [..., {self.config.d_in}], got {tuple(x.shape)}"
            )
        u = (self.normalised(x).values - self.b_dec) @ self.W_enc
        if self.r_mag is not None and self.b_mag is not None:
            return gated_magnitudes(u, self.b_enc, self.r_mag, self.b_mag)
        return torch.relu(u + self.b_enc)

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
            return jump_relu(a, self.threshold)
        return a if self.config.k is None else top_k(a, self.config.k)

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Return the sparse code of each token as indices and values.

        Args:
            x: ``[..., d]`` in the dtype of the weights.

        Returns:
            ``m`` entries a token: ``k`` for ``topk``, else the largest count in ``x``.

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

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the reconstruction ``z W_dec + b_dec``, in the units of the activations.

        Args:
            z: ``[..., n]``.
            x: The activations ``[..., d]`` that ``z`` encodes; needed where the configuration
                normalises, since what was taken from each token is given back to it.

        Returns:
            ``[..., d]``.

        Raises:
            ValueError: If the last dimension of ``z`` is not ``d_sae``, or ``x`` is needed and
                missing.
        """
        if z.shape[-1] != self.config.d_sae:
            raise ValueError(f"expected codes [..., {self.config.d_sae}], got {tuple(z.shape)}")
        y = z @ self.W_dec + self.b_dec
        if self.config.normalisation == "none":
            return y
        if x is None:
            raise ValueError(f"decoding after {self.config.normalisation} needs the activations")
        _, shift, scale = self.normalised(x)
        return y * scale + shift

    def forward(self, x: Tensor) -> Tensor:
        """Return ``decode(encode(x))``, ``[..., d]``."""
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Move the decoder norms into the codes, in place: ``z_j <- z_j |W_dec[j]|``.

        Codes are then in units of the activations and comparable between latents, which the
        generalised Jaccard similarity needs. The reconstruction is unchanged, except for
        ``topk``, whose selection becomes the one by ``a_j |W_dec[j]|``.
        """
        norm = _row_norm(self.W_dec).squeeze(-1)
        self.W_enc.mul_(norm)
        self.W_dec.div_(norm.unsqueeze(-1))
        # r_mag is a ratio of scales within a latent, and stays.
        for offset in (self.b_enc, self.b_mag, self.threshold):
            if offset is not None:
                offset.mul_(norm)

    @torch.no_grad()
    def fold_decoder_bias(self) -> None:
        """Make one that encodes ``x W_enc`` encode ``(x - b_dec) W_enc``, in place.

        ``b_enc <- b_enc + b_dec W_enc`` leaves the codes as they were. The magnitudes of a
        ``gated`` one are scaled by ``exp(r_mag)``, and so is what their bias gains.
        """
        gain = self.b_dec @ self.W_enc
        self.b_enc.add_(gain)
        if self.r_mag is not None and self.b_mag is not None:
            self.b_mag.add_(gain * self.r_mag.exp())

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Make one that encodes ``scale x`` encode ``x``, in place; the codes keep their values.

        ``W_enc <- scale W_enc``, ``W_dec <- W_dec / scale`` and ``b_dec <- b_dec / scale``.

        Args:
            scale: What activations were multiplied by in training, often
                ``sqrt(d) / mean |x|`` over a data set.
        """
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)


def filled_sae(config: SparseAutoencoderConfig, weights: Mapping[str, Tensor]) -> SparseAutoencoder:
    """Return an autoencoder around the given weights, without a copy of them.

    Args:
        config: Shape and activation function.
        weights: Every weight by name, in its shape; on the meta device they have shapes alone.

    Raises:
        RuntimeError: If a weight is missing, unexpected or of the wrong shape.
    """
    with torch.device("meta"):
        sae = SparseAutoencoder(config)
    sae.load_state_dict(weights, assign=True)
    return sae


def layer_normalised(x: Tensor) -> Normalised:
    r"""Return each token's activations without their mean, over their standard deviation.

    .. math:: \tilde x = \frac{x - \mu}{\sigma + \epsilon}, \qquad
        \sigma^2 = \frac{1}{d - 1} \sum_i (x_i - \mu)^2

    Args:
        x: ``[..., d]`` with ``d > 1``.

    Returns:
        The values, shift ``mu`` and scale ``sigma`` (without ``epsilon``).

    Source: OpenAI's sparse_autoencoder and SAELens, whose ``epsilon`` of 1e-5 and unbiased
    standard deviation these are; ``torch.nn.LayerNorm`` differs in both.
    """
    mean = x.mean(dim=-1, keepdim=True)
    deviation = x.std(dim=-1, keepdim=True)
    return Normalised((x - mean) / (deviation + LAYER_NORM_EPSILON), mean, deviation)


def norm_rescaled(x: Tensor) -> Normalised:
    r"""Return each token's activations at the norm :math:`\sqrt d`.

    .. math:: \tilde x = \sqrt d \; x / \lVert x \rVert

    Args:
        x: ``[..., d]``.

    Source: SAELens 6.54, ``constant_norm_rescale``.
    """
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    return Normalised(x / scale, torch.zeros_like(scale), scale)


def jump_relu(a: Tensor, threshold: Tensor) -> Tensor:
    r"""Keep the latents above their thresholds and zero the others.

    .. math:: z_j = a_j \, [a_j > \theta_j]

    A latent at its threshold is not kept.

    Args:
        a: ``[..., n]`` non-negative.
        threshold: ``[n]``; one below zero keeps every positive latent.

    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), section 3.
    """
    return a * (a > threshold)


def gated_magnitudes(u: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    r"""Return the magnitudes of the latents whose gates are open, zero for the others.

    .. math:: z_j = [u_j + b^{gate}_j > 0] \;
        \mathrm{ReLU}(e^{r_j} u_j + b^{mag}_j)

    Args:
        u: ``[..., n]``, the encoder's linear part.
        b_gate: ``[n]``.
        r_mag: ``[n]``.
        b_mag: ``[n]``.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), section 3.2.
    """
    return (u + b_gate > 0) * torch.relu(r_mag.exp() * u + b_mag)


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
