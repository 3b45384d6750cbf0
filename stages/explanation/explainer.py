"""What a row shares with a task, latent by latent, and where in its text a latent is active.

Nothing of this is stored for all rows: the few rows that are asked about are read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.engines import FeatureReader, MaskedSequence
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import StageError
from stages.explanation.settings import ExplanationSettings
from stages.features.settings import FeaturesSettings
from stages.features.tokens import masked_sequence
from stages.features.weights import latent_weights
from stages.prototypes.artifact import Prototypes, read_prototypes
from stages.rows import Message
from stages.storage import Store


@dataclass(frozen=True)
class Place:
    """A token in its context, with the activation there."""

    before: str
    token: str
    after: str
    activation: float


@dataclass(frozen=True)
class SharedLatent:
    """A latent that a row and a task have in common.

    Attributes:
        latent: its number.
        share: of all that the two have in common, from 0 to 1.
        row: the row's pooled activation.
        prototype: the task's.
        places: where in the row it is strongest.
    """

    latent: int
    share: float
    row: float
    prototype: float
    places: list[Place]


@dataclass(frozen=True)
class LatentInRow:
    """A latent's strongest places in one row; `number` is the row's in the list that was given."""

    number: int
    peak: float
    places: list[Place]


def shared_activation(z: NDArray[np.float32], p: NDArray[np.float32]) -> NDArray[np.float64]:
    r"""What each latent contributes to what a row and a prototype share, float64 [latents].

    .. math:: c_j = \frac{\min(z_j, p_j)}{\sum_i \min(z_i, p_i)}

    The numerator of the generalised Jaccard similarity, cut into its terms; all zero where nothing
    is shared. Source of the similarity: MoNA (arXiv 2503.15573), Eq. 9.
    """
    shared = np.minimum(z, p).astype(np.float64)
    total = float(shared.sum())
    return shared / total if total > 0 else shared


class Explainer:
    """Reads rows again with the student and the dictionary."""

    def __init__(
        self,
        settings: ExplanationSettings,
        features: FeaturesSettings,
        layer: int,
        student: ModelSettings,
        dictionary: Store,
        prototypes: Store,
    ) -> None:
        """Keep what rows were read with, and what they were compared with."""
        self._settings = settings
        self._features = features
        self._layer = layer
        self._student = student
        self._dictionary = dictionary.url
        self.prototypes: Prototypes = read_prototypes(prototypes)
        self._weights = latent_weights(features, self.prototypes.frequencies)

    async def row(
        self, messages: Sequence[Message], task: str, reader: FeatureReader
    ) -> list[SharedLatent]:
        """The latents that contribute most to what a row shares with a task, strongest first.

        Raises:
            RowError: the row has no content token.
        """
        sequence = self._sequence(messages)
        code = await reader.pooled_codes(
            [sequence], self._layer, self._dictionary, self._features.pooling
        )
        z, p = code.toarray()[0], self.prototypes.codes[self.prototypes.tasks.index(task)]
        if self._weights is not None:
            z, p = z * self._weights, p * self._weights
        shares = shared_activation(z, p)
        best = np.argsort(-shares, kind="stable")[: self._settings.latents]
        best = best[shares[best] > 0]
        if not len(best):
            return []
        (activations,) = await reader.latent_activations(
            [sequence], self._layer, self._dictionary, best.tolist()
        )
        return [
            SharedLatent(
                int(latent),
                float(shares[latent]),
                float(z[latent]),
                float(p[latent]),
                self._places(sequence, activations[:, column]),
            )
            for column, latent in enumerate(best)
        ]

    async def latents(
        self, latents: Sequence[int], rows: Sequence[Sequence[Message]], reader: FeatureReader
    ) -> list[list[LatentInRow]]:
        """For each latent the rows in which it is active, by its largest activation there.

        Raises:
            StageError: the dictionary has no such latent.
            RowError: a row has no content token.
        """
        width = self.prototypes.codes.shape[1]
        for latent in latents:
            if latent >= width:
                raise StageError(f"there is no latent {latent}: the dictionary has {width}")
        sequences = [self._sequence(messages) for messages in rows]
        activations = await reader.latent_activations(
            sequences, self._layer, self._dictionary, list(latents)
        )
        return [
            sorted(
                (
                    LatentInRow(number, float(values.max()), self._places(sequence, values))
                    for number, (sequence, read) in enumerate(
                        zip(sequences, activations, strict=True)
                    )
                    for values in [read[:, column]]
                    if values.max() > 0
                ),
                key=lambda one: (-one.peak, one.number),
            )
            for column in range(len(latents))
        ]

    def _sequence(self, messages: Sequence[Message]) -> MaskedSequence:
        tokenizer, window = cached_tokenizer(self._student), self._student.max_length
        return masked_sequence(tokenizer, messages, self._features.part, window)

    def _places(self, sequence: MaskedSequence, activations: NDArray[np.float32]) -> list[Place]:
        """Where a latent is strongest among a row's kept tokens; only where it is active."""
        kept = np.flatnonzero(np.array(sequence.keep, dtype=bool))
        best = np.argsort(-activations, kind="stable")[: self._settings.places]
        return [
            Place(
                self._text(sequence, max(place - self._settings.window, 0), place),
                self._text(sequence, place, place + 1),
                self._text(sequence, place + 1, place + 1 + self._settings.window),
                float(activations[number]),
            )
            for number in best.tolist()
            if activations[number] > 0
            for place in [int(kept[number])]
        ]

    def _text(self, sequence: MaskedSequence, start: int, stop: int) -> str:
        tokenizer = cached_tokenizer(self._student)
        return str(tokenizer.decode(list(sequence.ids[start:stop]), skip_special_tokens=True))
