"""Codes of tokens, pooled to codes of rows without being stored.

A chunk of tokens is encoded, reduced into the rows' accumulators and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stages.dictionary.sae import SparseAutoencoder, SparseAutoencoderConfig

_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
"""Size of a chunk's dense codes; on a CPU they stay in its cache."""


class PooledCodes(NamedTuple):
    """Codes of rows, float32 [rows, latents]; None where one wasn't asked for.

    Attributes:
        mean: over the row's tokens.
        peak: largest over the row's tokens.
    """

    mean: Tensor | None
    peak: Tensor | None


class TokenEncoder:
    """Codes of tokens, without the copies that training needs."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        """See whether the autoencoder is a plain JumpReLU, whose codes take two passes."""
        self._sae = sae
        plain = SparseAutoencoderConfig(sae.config.d_in, sae.config.d_sae, "jumprelu")
        self._jumps = (
            sae.config == plain and sae.threshold is not None and bool((sae.threshold >= 0).all())
        )

    def to(self, device: torch.device) -> TokenEncoder:
        """Itself, with the weights on a device."""
        self._sae.to(device)
        return self

    @property
    def autoencoder(self) -> SparseAutoencoder:
        """What it encodes with."""
        return self._sae

    @property
    def latents(self) -> int:
        """Width of a code."""
        return self._sae.config.d_sae

    def __call__(self, states: Tensor) -> Tensor:
        """The autoencoder's codes of these tokens.

        Args:
            states: float32 [tokens, d].

        Returns:
            float32 [tokens, latents].
        """
        sae = self._sae
        if not self._jumps or sae.threshold is None:
            return sae.encode(states)
        # What exceeds a threshold of at least 0 has passed the ReLU.
        codes = torch.addmm(sae.b_enc, states - sae.b_dec, sae.W_enc)
        return codes.mul_(codes > sae.threshold)

    def chunks(self, states: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Codes of consecutive stretches of tokens, each with where it starts."""
        size = max(64, _CHUNK_BYTES[states.device.type] // (4 * self.latents))
        for start in range(0, len(states), size):
            yield start, self(states[start : start + size])


def pooled_codes(
    encoder: TokenEncoder, states: Tensor, lengths: list[int], *, mean: bool, peak: bool
) -> PooledCodes:
    r"""Mean and largest code of each row's tokens.

    .. math:: z = \frac{1}{n} \sum_{t=1}^{n} z_t, \qquad g = \max_t z_t

    Args:
        encoder: of tokens.
        states: of the tokens of all rows, row after row, [tokens, d].
        lengths: tokens of each row, at least 1 each.
        mean: whether the mean is wanted.
        peak: whether the largest is.

    Source: MoNA (arXiv 2503.15573), Eq. 7; FAC Synthesis (arXiv 2602.10388), Eq. 4.
    """
    shape = (len(lengths), encoder.latents)
    total = torch.zeros(shape, device=states.device) if mean else None
    largest = torch.zeros(shape, device=states.device) if peak else None
    ends = torch.tensor(lengths).cumsum(0).tolist()
    row = 0
    for start, codes in encoder.chunks(states):
        place = 0
        while place < len(codes):
            stop = min(ends[row] - start, len(codes))
            mine = codes[place:stop]
            if total is not None:
                total[row] += mine.sum(dim=0)
            if largest is not None:
                torch.maximum(largest[row], mine.amax(dim=0), out=largest[row])
            row += stop + start == ends[row]
            place = stop
    if total is not None:
        total /= torch.tensor(lengths, device=states.device).unsqueeze(1)
    return PooledCodes(total, largest)
