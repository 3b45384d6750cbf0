"""Training and evaluation of sparse autoencoders.

Source: TopK, AuxK and the initialisation from Gao et al. 2024 (arXiv 2406.04093); BatchTopK and
its inference threshold from Bussmann et al. 2024 (arXiv 2412.06410).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.dictionary.sae import (
    SparseAutoencoder,
    SparseAutoencoderConfig,
    batch_top_k,
    top_k,
)


@dataclass(frozen=True)
class TrainingConfig:
    """Everything but the data, the number of steps and the seed.

    Attributes:
        d_in: Width ``d`` of the activations.
        d_sae: Number ``n`` of latents.
        k: Active latents per token; their mean for BatchTopK.
        training: ``topk`` gives a ``topk`` autoencoder; ``batchtopk`` gives a ``jumprelu`` one.
        learning_rate: Peak rate; None is ``2e-4 / sqrt(n / 2^14)``.
        warmup_steps: Steps of linear warm-up. The threshold is estimated after them.
        aux_coefficient: Weight of the AuxK loss; 0 turns it off.
        aux_k: Dead latents per token in the AuxK loss; None is ``max(d // 2, 1)``.
        dead_after_tokens: A latent that has not fired for so many tokens is dead.
        threshold_decay: Decay of the moving average that estimates the BatchTopK threshold.
        gradient_clip: Largest norm of the gradient.
        log_every: Steps between points of the training curve; the last step is always one.

    Raises:
        ValueError: If a value is out of range.
    """

    d_in: int
    d_sae: int
    k: int
    training: Literal["topk", "batchtopk"] = "batchtopk"
    learning_rate: float | None = None
    warmup_steps: int = 1000
    aux_coefficient: float = 1 / 32
    aux_k: int | None = None
    dead_after_tokens: int = 10_000_000
    threshold_decay: float = 0.999
    gradient_clip: float = 1.0
    log_every: int = 100

    def __post_init__(self) -> None:
        """Refuse values with which training is undefined."""
        if self.training not in ("topk", "batchtopk"):
            raise ValueError(f"training must be 'topk' or 'batchtopk', got {self.training!r}")
        # TopK's configuration holds the rules for the sizes and for k.
        SparseAutoencoderConfig(self.d_in, self.d_sae, "topk", self.k)
        if self.aux_k is not None and self.aux_k < 1:
            raise ValueError(f"aux_k must be positive, got {self.aux_k}")
        if self.warmup_steps < 0 or self.dead_after_tokens < 1 or self.log_every < 1:
            raise ValueError(
                "warmup_steps must be at least 0, dead_after_tokens and log_every at least 1"
            )
        if not 0 <= self.threshold_decay < 1:
            raise ValueError(f"threshold_decay must be in [0, 1), got {self.threshold_decay}")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 / math.sqrt(self.d_sae / 2**14)


@dataclass(frozen=True)
class TrainingCurve:
    """Measures of single training batches, one entry per logged step.

    Attributes:
        step: Steps done, from 1.
        fvu: Fraction of variance unexplained of that batch.
        l0: Mean number of active latents per token.
        dead_share: Share of latents that had not fired for ``dead_after_tokens`` tokens.
    """

    step: tuple[int, ...]
    fvu: tuple[float, ...]
    l0: tuple[float, ...]
    dead_share: tuple[float, ...]


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


def train_sparse_autoencoder(
    activations: Iterator[Tensor], config: TrainingConfig, steps: int, seed: int
) -> tuple[SparseAutoencoder, TrainingCurve]:
    """Train a sparse autoencoder by TopK or BatchTopK.

    The loss is ``FVU(x, x_hat) + aux_coefficient * FVU(e, e_hat)``, where ``e = x - x_hat`` is
    held fixed and ``e_hat`` is its reconstruction from the ``aux_k`` largest dead latents
    (AuxK). BatchTopK's threshold is the bias-corrected moving average, after warm-up, of the
    smallest positive activation kept in a batch.

    The same seed and batches give the same weights on the CPU with the same number of threads.

    Args:
        activations: Shuffled batches ``[batch, d]`` of any floating-point dtype, one for each
            step; training runs in float32 on the device of the first.
        config: The recipe.
        steps: Optimiser steps.
        seed: Seed of the initial decoder directions.

    Returns:
        The autoencoder, in float32 with unit-norm decoder rows, and its training curve.

    Raises:
        ValueError: If ``steps`` does not exceed the warm-up, the batches run out or have the
            wrong shape, or no latent fires after the warm-up of BatchTopK.
        FloatingPointError: If the loss stops being finite.

    Source: Gao et al. 2024, section 2 and appendix A; Bussmann et al. 2024, section 3.
    """
    if steps <= config.warmup_steps:
        raise ValueError(f"steps = {steps} must exceed warmup_steps = {config.warmup_steps}")
    batch = _next_batch(activations, config, 0)
    sae = _initialise(config, batch, seed)
    # Adam's usual epsilon of 1e-8 is not small against the gradients of a normalised loss.
    optimiser = torch.optim.Adam(sae.parameters(), lr=config.peak_learning_rate, eps=6.25e-10)
    sparsify = top_k if config.training == "topk" else batch_top_k
    tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=batch.device)
    threshold = _MovingAverage(config.threshold_decay)
    curve: list[tuple[int, float, float, float]] = []

    for step in range(steps):
        if step > 0:
            batch = _next_batch(activations, config, step).to(sae.W_dec.device)
        a = sae.activations(batch)
        z = sparsify(a, config.k)
        x_hat = sae.decode(z)
        fvu = _fvu(batch, x_hat)
        loss = fvu
        dead = tokens_since_fired >= config.dead_after_tokens
        if config.aux_coefficient > 0 and dead.any():
            aux_k = config.aux_k or max(config.d_in // 2, 1)
            loss = fvu + config.aux_coefficient * _aux_loss(sae, a, dead, batch - x_hat, aux_k)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss.detach())} at step {step + 1}")

        warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
        for group in optimiser.param_groups:
            group["lr"] = config.peak_learning_rate * warmup
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        _project_decoder_gradient(sae)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), config.gradient_clip)
        optimiser.step()
        sae.normalise_decoder()

        fired = z.detach() > 0
        tokens_since_fired += batch.shape[0]
        tokens_since_fired[fired.any(dim=0)] = 0
        # The activations of the warm-up are those of another model; they would bias the average.
        if config.training == "batchtopk" and step >= config.warmup_steps and fired.any():
            threshold.add(float(z.detach()[fired].min()))
        if (step + 1) % config.log_every == 0 or step + 1 == steps:
            l0 = float(fired.sum()) / batch.shape[0]
            curve.append((step + 1, float(fvu.detach()), l0, float(dead.float().mean())))

    if config.training == "batchtopk":
        sae = _with_threshold(sae, threshold.value())
    step_, fvu_, l0_, dead_ = zip(*curve, strict=True)
    return sae, TrainingCurve(step_, fvu_, l0_, dead_)


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
        _check_batch(batch, sae.config.d_in)
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


@torch.no_grad()
def geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Return the point with the least sum of distances to the points, by Weiszfeld's iteration.

    ``y <- (sum_i x_i / |x_i - y|) / (sum_i 1 / |x_i - y|)``, from the mean. Unlike the mean it
    hardly feels the few tokens of huge norm that language models have.

    Args:
        points: ``[points, d]``.
        iterations: Most iterations.
        tolerance: Stop when a move is this small against the mean distance to the points.

    Returns:
        ``[d]`` in the dtype of ``points``.

    Source: Weiszfeld 1937; its use for ``b_dec`` from Gao et al. 2024, appendix A.1.
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


class _MovingAverage:
    """Exponential moving average without the bias of its start."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> None:
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)

    def value(self) -> float:
        if self._weight == 0:
            raise ValueError("no latent fired after the warm-up: the threshold is undefined")
        return self._sum / self._weight


def _initialise(config: TrainingConfig, batch: Tensor, seed: int) -> SparseAutoencoder:
    # Drawn on the CPU: a seed then means the same directions on every device.
    directions = torch.randn(
        config.d_sae, config.d_in, generator=torch.Generator().manual_seed(seed)
    )
    sae = SparseAutoencoder(SparseAutoencoderConfig(config.d_in, config.d_sae, "topk", config.k))
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.normalise_decoder()
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(geometric_median(batch))
    return sae.to(batch.device)


def _next_batch(activations: Iterator[Tensor], config: TrainingConfig, step: int) -> Tensor:
    batch = next(activations, None)
    if batch is None:
        raise ValueError(f"the activations ran out after {step} batches")
    _check_batch(batch, config.d_in)
    return batch.detach().float()


def _check_batch(batch: Tensor, d_in: int) -> None:
    if batch.ndim != 2 or batch.shape[0] == 0 or batch.shape[1] != d_in:
        raise ValueError(f"expected a non-empty batch [batch, {d_in}], got {tuple(batch.shape)}")


def _fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    variance = (x - x.mean(dim=0)).square().sum()
    return (x - x_hat).square().sum() / variance.clamp_min(torch.finfo(x.dtype).tiny)


def _aux_loss(
    sae: SparseAutoencoder, a: Tensor, dead: Tensor, residual: Tensor, aux_k: int
) -> Tensor:
    z = top_k(a[:, dead], min(aux_k, int(dead.sum())))
    # The residual has b_dec subtracted already: adding it again would teach the dead latents
    # to cancel it. The residual is a fixed target: live latents answer to the main loss alone.
    return _fvu(residual.detach(), z @ sae.W_dec[dead])


@torch.no_grad()
def _project_decoder_gradient(sae: SparseAutoencoder) -> None:
    # The part along a row would be undone by the normalisation and yet fill Adam's moments.
    gradient = sae.W_dec.grad
    if gradient is not None:
        gradient -= (gradient * sae.W_dec).sum(dim=-1, keepdim=True) * sae.W_dec


@torch.no_grad()
def _with_threshold(sae: SparseAutoencoder, threshold: float) -> SparseAutoencoder:
    d_in, d_sae = sae.config.d_in, sae.config.d_sae
    jumping = SparseAutoencoder(SparseAutoencoderConfig(d_in, d_sae, "jumprelu"))
    jumping.load_state_dict(sae.state_dict() | {"threshold": torch.full_like(sae.b_enc, threshold)})
    return jumping.to(sae.W_dec.device)
