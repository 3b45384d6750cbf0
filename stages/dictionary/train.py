"""Training of sparse autoencoders by TopK or BatchTopK, one step at a time.

Source: TopK, AuxK and the initialisation from Gao et al. 2024 (arXiv 2406.04093); BatchTopK and
its inference threshold from Bussmann et al. 2024 (arXiv 2412.06410).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from stages.dictionary.evaluate import check_batch
from stages.dictionary.losses import (
    aux_k_loss,
    fraction_of_variance_unexplained,
    geometric_median,
    least_squares_scale,
    perpendicular_part,
)
from stages.dictionary.sae import SparseAutoencoder, SparseAutoencoderConfig
from stages.dictionary.sparse import (
    Entries,
    Parameters,
    batch_top_k_entries,
    sparse_reconstruction,
    top_k_entries,
)


@dataclass(frozen=True)
class TrainingConfig:
    """Everything but the data and the seed.

    Attributes:
        d_in: Width ``d`` of the activations.
        d_sae: Number ``n`` of latents.
        k: Active latents per token; their mean for BatchTopK.
        steps: Optimiser steps.
        training: ``topk`` gives a ``topk`` autoencoder; ``batchtopk`` gives a ``jumprelu`` one.
        encoder_start: The decoder's ``transpose``, or that ``fitted`` in scale to the first batch.
        learning_rate: Peak rate; None is ``2e-4 / sqrt(n / 2^14)``.
        warmup_steps: First steps, over which the rate rises. The threshold is estimated after them.
        decay_steps: Last steps, over which the rate falls towards zero.
        aux_coefficient: Weight of the AuxK loss; 0 turns it off.
        aux_k: Dead latents per token in the AuxK loss; None is ``max(d // 2, 1)``.
        dead_after_tokens: A latent that has not fired for so many tokens is dead.
        threshold_decay: Decay of the moving average that estimates the BatchTopK threshold; None
            is that of a window of a twentieth of the steps, at most 100.
        gradient_clip: Largest norm of the gradient.

    Raises:
        ValueError: If a value is out of range.
    """

    d_in: int
    d_sae: int
    k: int
    steps: int
    training: Literal["topk", "batchtopk"] = "batchtopk"
    encoder_start: Literal["transpose", "fitted"] = "transpose"
    learning_rate: float | None = None
    warmup_steps: int = 0
    decay_steps: int = 0
    aux_coefficient: float = 1 / 32
    aux_k: int | None = None
    dead_after_tokens: int = 10_000_000
    threshold_decay: float | None = None
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values with which training is undefined."""
        if self.training not in ("topk", "batchtopk"):
            raise ValueError(f"training must be 'topk' or 'batchtopk', got {self.training!r}")
        if self.encoder_start not in ("transpose", "fitted"):
            raise ValueError(
                f"encoder_start must be 'transpose' or 'fitted', got {self.encoder_start!r}"
            )
        # TopK's configuration holds the rules for the sizes and for k.
        SparseAutoencoderConfig(self.d_in, self.d_sae, "topk", self.k)
        if self.aux_k is not None and self.aux_k < 1:
            raise ValueError(f"aux_k must be positive, got {self.aux_k}")
        if self.dead_after_tokens < 1:
            raise ValueError(f"dead_after_tokens must be positive, got {self.dead_after_tokens}")
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise ValueError("warmup_steps and decay_steps must be at least 0")
        if self.steps <= self.warmup_steps:
            raise ValueError(f"steps = {self.steps} must exceed warmup_steps = {self.warmup_steps}")
        if self.threshold_decay is not None and not 0 <= self.threshold_decay < 1:
            raise ValueError(f"threshold_decay must be in [0, 1), got {self.threshold_decay}")

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 / math.sqrt(self.d_sae / 2**14)

    @property
    def averaging_decay(self) -> float:
        """The decay of the threshold's moving average."""
        if self.threshold_decay is not None:
            return self.threshold_decay
        # A wider window would average over activations of too different weights.
        return 1 - 1 / min(max(self.steps // 20, 1), 100)

    def learning_rate_at(self, step: int) -> float:
        r"""The learning rate of a step, counted from 1.

        .. math:: \eta_s = \eta \min\bigl(1,\ s / s_\mathrm{warm},\
            (S - s + 1) / s_\mathrm{decay}\bigr)
        """
        rise = min(1.0, step / max(self.warmup_steps, 1))
        fall = min(1.0, (self.steps - step + 1) / max(self.decay_steps, 1))
        return self.peak_learning_rate * min(rise, fall)


class TrainingPoint(NamedTuple):
    """Measures of one step's batch.

    Attributes:
        step: Steps done, from 1.
        fvu: Fraction of variance unexplained.
        l0: Mean number of active latents per token.
        dead_share: Share of latents that had not fired for ``dead_after_tokens`` tokens.
    """

    step: int
    fvu: float
    l0: float
    dead_share: float


class Trainer:
    """An autoencoder in training: its parameters, Adam's moments, and what it counts.

    Its state can be taken and given back, and training then goes on to the same weights.
    """

    def __init__(
        self, config: TrainingConfig, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        """Draw the decoder's directions; the encoder starts as their transpose.

        Args:
            config: The recipe.
            seed: Of the directions.
            device: Where to train, in float32.
        """
        self.config = config
        # Drawn on the CPU: a seed then means the same directions on every device.
        drawn = torch.randn(
            config.d_sae, config.d_in, generator=torch.Generator().manual_seed(seed)
        )
        directions = torch.nn.functional.normalize(drawn, dim=-1).to(device)
        self._parameters = Parameters(
            directions.clone(),
            directions,
            torch.zeros(config.d_sae, device=device),
            torch.zeros(config.d_in, device=device),
        )
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        # Adam's usual epsilon of 1e-8 is not small against the gradients of a normalised loss.
        self._adam = torch.optim.Adam(self._parameters, eps=6.25e-10, fused=True)
        self._tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self._threshold = _MovingAverage(config.averaging_decay)
        self._step = 0

    @property
    def steps_done(self) -> int:
        """How many steps were made."""
        return self._step

    def step(self, batch: Tensor) -> TrainingPoint:
        """Make one optimiser step.

        The loss is ``FVU(x, x_hat) + aux_coefficient * L_aux``. The first batch's geometric median
        becomes the decoder bias; a fitted encoder is scaled so that it is reconstructed best.

        Args:
            batch: Activations ``[batch, d]`` of any floating-point dtype.

        Returns:
            Measures before the step.

        Raises:
            ValueError: If the batch is empty or has another width.
            FloatingPointError: If the loss stops being finite.

        Source: Gao et al. 2024, section 2 and appendix A; Bussmann et al. 2024, section 3.
        """
        config, weights = self.config, self._parameters
        check_batch(batch, config.d_in)
        x = batch.detach().to(weights.decoder.device, torch.float32)
        if self._step == 0:
            self._start(x)
        self._step += 1
        entries = self._entries(x)
        x_hat = sparse_reconstruction(x, weights, entries)
        fvu = fraction_of_variance_unexplained(x, x_hat)
        dead = self._tokens_since_fired >= config.dead_after_tokens
        loss = fvu
        if config.aux_coefficient > 0 and dead.any():
            loss = fvu + config.aux_coefficient * self._aux_loss(x, x - x_hat, dead)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss.detach())} at step {self._step}")
        self._update(loss)
        self._count(entries, x.shape[0])
        l0 = len(entries.values) / x.shape[0]
        return TrainingPoint(self._step, float(fvu.detach()), l0, float(dead.float().mean()))

    def autoencoder(self) -> SparseAutoencoder:
        """The autoencoder as it is used: BatchTopK's with its estimated threshold, as JumpReLU.

        Raises:
            ValueError: If no latent fired after the warm-up, so that there is no threshold.
        """
        config, weights = self.config, self._parameters
        topk = config.training == "topk"
        form = (
            SparseAutoencoderConfig(config.d_in, config.d_sae, "topk", config.k)
            if topk
            else SparseAutoencoderConfig(config.d_in, config.d_sae, "jumprelu")
        )
        sae = SparseAutoencoder(form).to(weights.decoder.device)
        with torch.no_grad():
            sae.W_enc.copy_(weights.encoder.T)
            sae.W_dec.copy_(weights.decoder)
            sae.b_enc.copy_(weights.encoder_bias)
            sae.b_dec.copy_(weights.decoder_bias)
            if sae.threshold is not None:
                sae.threshold.fill_(self._threshold.value())
        return sae

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """All that training goes on from: tensors, and numbers that JSON keeps exactly."""
        tensors = {"tokens_since_fired": self._tokens_since_fired}
        for name, weight in self._parameters._asdict().items():
            tensors[name] = weight.detach()
            for moment, value in self._adam.state[weight].items():
                tensors[f"adam.{moment}.{name}"] = value
        numbers = {
            "step": self._step,
            "threshold_sum": self._threshold.sum,
            "threshold_weight": self._threshold.weight,
        }
        return tensors, numbers

    @classmethod
    def from_state(
        cls,
        config: TrainingConfig,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, float],
        device: torch.device | str = "cpu",
    ) -> Self:
        """A trainer that goes on where another stood.

        Args:
            config: The other's.
            tensors: The other's `state`.
            numbers: The other's `state`.
            device: Where to train.
        """
        trainer = cls(config, 0, device)
        trainer._tokens_since_fired.copy_(tensors["tokens_since_fired"])
        for name, weight in trainer._parameters._asdict().items():
            with torch.no_grad():
                weight.copy_(tensors[name])
            trainer._adam.state[weight] = {
                moment: tensors[f"adam.{moment}.{name}"].to(weight.device, copy=True)
                for moment in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{moment}.{name}" in tensors
            }
        trainer._step = int(numbers["step"])
        trainer._threshold.sum = numbers["threshold_sum"]
        trainer._threshold.weight = numbers["threshold_weight"]
        return trainer

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        weights = self._parameters
        weights.decoder_bias.copy_(geometric_median(x))
        if self.config.encoder_start == "fitted":
            # Latents that lie near a token lie near each other too, and in sum they overshoot.
            # A scale changes none of the choices of a top-k while the encoder's bias is zero.
            bias = weights.decoder_bias
            x_hat = sparse_reconstruction(x, weights, self._entries(x))
            weights.encoder.mul_(least_squares_scale(x - bias, x_hat - bias))

    @torch.no_grad()
    def _entries(self, x: Tensor) -> Entries:
        encoder, _, encoder_bias, decoder_bias = self._parameters
        a = torch.addmm(encoder_bias, x - decoder_bias, encoder.T).relu_()
        select = top_k_entries if self.config.training == "topk" else batch_top_k_entries
        return select(a, self.config.k)

    def _aux_loss(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        encoder, decoder, encoder_bias, decoder_bias = self._parameters
        a = torch.relu((x - decoder_bias) @ encoder[dead].T + encoder_bias[dead])
        return aux_k_loss(
            residual, a, decoder[dead], self.config.aux_k or max(self.config.d_in // 2, 1)
        )

    def _update(self, loss: Tensor) -> None:
        for group in self._adam.param_groups:
            group["lr"] = self.config.learning_rate_at(self._step)
        self._adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        decoder = self._parameters.decoder
        with torch.no_grad():
            assert decoder.grad is not None
            decoder.grad.copy_(perpendicular_part(decoder.grad, decoder))
        torch.nn.utils.clip_grad_norm_(self._parameters, self.config.gradient_clip)
        self._adam.step()
        with torch.no_grad():
            decoder.copy_(torch.nn.functional.normalize(decoder, dim=-1))

    def _count(self, entries: Entries, tokens: int) -> None:
        self._tokens_since_fired += tokens
        self._tokens_since_fired[entries.latents] = 0
        # The activations of the warm-up are those of another model; they would bias the average.
        warm = self._step > self.config.warmup_steps
        if self.config.training == "batchtopk" and warm and len(entries.values):
            self._threshold.add(float(entries.values.min()))


def train(
    trainer: Trainer,
    batches: Iterable[Tensor],
    after_step: Callable[[TrainingPoint], None] = lambda point: None,
) -> SparseAutoencoder:
    """Train to the last step of the trainer's recipe.

    The same seed and batches give the same weights on the CPU with the same number of threads.

    Args:
        trainer: New, or given its state back.
        batches: One for each step that is left, ``[batch, d]``.
        after_step: Told the measures of every step.

    Returns:
        The autoencoder, in float32 with unit-norm decoder rows.

    Raises:
        ValueError: If the batches run out or have the wrong shape, or no latent fires after the
            warm-up of BatchTopK.
        FloatingPointError: If the loss stops being finite.
    """
    rest = iter(batches)
    while trainer.steps_done < trainer.config.steps:
        batch = next(rest, None)
        if batch is None:
            raise ValueError(f"the activations ran out after {trainer.steps_done} batches")
        after_step(trainer.step(batch))
    return trainer.autoencoder()


class _MovingAverage:
    """Exponential moving average without the bias of its start."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.sum = 0.0
        self.weight = 0.0

    def add(self, value: float) -> None:
        self.sum = self._decay * self.sum + (1 - self._decay) * value
        self.weight = self._decay * self.weight + (1 - self._decay)

    def value(self) -> float:
        if self.weight == 0:
            raise ValueError("no latent fired after the warm-up: the threshold is undefined")
        return self.sum / self.weight
