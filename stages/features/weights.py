"""Weights of latents: masks, and inverse frequencies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.errors import StageError
from stages.features.settings import FeaturesSettings
from stages.prototypes.artifact import Frequencies


def latent_weights(
    settings: FeaturesSettings, frequencies: Frequencies | None
) -> NDArray[np.float32] | None:
    """What codes are multiplied by, latent by latent, float32 [latents]; None: nothing.

    Raises:
        StageError: no latent is left, or the artifact holds no frequencies.
    """
    if not settings.needs_frequencies:
        return None
    if frequencies is None:
        raise StageError(
            "the prototypes hold no frequencies of latents; run again from prototypes",
            stage="features",
        )
    weights = np.ones_like(frequencies.row_share)
    if settings.mask_dead:
        weights *= frequencies.token_share > 0
    if settings.max_frequency is not None:
        weights *= frequencies.token_share <= settings.max_frequency
    if settings.idf:
        weights *= inverse_frequencies(frequencies)
    if not weights.any():
        raise StageError(
            "mask_dead, max_frequency and idf leave no latent that is active; leave one of "
            "them out, or raise features.max_frequency",
            stage="features",
        )
    return weights


def inverse_frequencies(frequencies: Frequencies) -> NDArray[np.float32]:
    r"""How rare each latent is among rows; 0 where every row has it.

    .. math:: w_j = \ln \frac{1 + N}{1 + N_j}

    N are the rows of the sample and N_j those with some token that activates latent j.
    """
    having = frequencies.row_share.astype(np.float64) * frequencies.rows
    weights: NDArray[np.float32] = np.log((1 + frequencies.rows) / (1 + having)).astype(np.float32)
    return np.maximum(weights, 0)
