"""Engines without a model, for tests of what runs around them. Deterministic, and they count.

They stand at the model's boundary: the same methods as the real engines, numbers from hashes of the
ids that they are given.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from stages.engines import (
    Completion,
    Embedded,
    GenerationRequest,
    LogLikelihoods,
    MaskedSequence,
    Sampling,
    ScoreRequest,
)
from stages.engines.local import make_engine
from stages.engines.reader import TransformersReader
from stages.engines.settings import ModelSettings

WIDTH = 8


def unit(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class FakeScorer:
    def __init__(self, asked: Counter[str]) -> None:
        self.asked = asked

    def score(self, requests: Sequence[ScoreRequest]) -> LogLikelihoods:
        self.asked["scorer"] += len(requests)
        sums, counts = [], []
        for prompt, target in requests:
            scored = len(target) - (not prompt)
            # Prompts help, some more than others: rewrites win and lose.
            help_ = 0.5 + 0.4 * unit("help", tuple(prompt), tuple(target)) if len(prompt) > 1 else 0
            loss = 2 + unit("loss", tuple(target)) - help_
            sums.append(-loss * scored)
            counts.append(scored)
        return LogLikelihoods(np.array(sums, float), np.array(counts, np.int64))

    def close(self) -> None: ...


class FakeGenerator:
    def __init__(self, asked: Counter[str]) -> None:
        self.asked = asked

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Any]:
        self.asked["generator"] += len(requests)
        texts = [f"A text of its own: {unit(tuple(r.prompt), r.seed):.9f}." for r in requests]
        return [Completion((5, 6, 7), text, "stop", -1.0, end_id=2) for text in texts]

    def close(self) -> None: ...


class FakeReader(TransformersReader):
    """The real reader's encoding, pooling and similarity over made-up activations."""

    def __init__(self, asked: Counter[str]) -> None:
        self.asked = asked
        self._encoders = {}
        self._references = {}

    @property
    def _width(self) -> int:
        return WIDTH

    def _kept_states(
        self, sequences: Sequence[MaskedSequence], layer: int
    ) -> Iterator[tuple[list[int], torch.Tensor, Any]]:
        self.asked["reader"] += len(sequences)
        for row, sequence in enumerate(sequences):
            kept = [i for i, keep in zip(sequence.ids, sequence.keep, strict=True) if keep]
            states = torch.stack(
                [
                    torch.from_numpy(np.random.default_rng(token).normal(size=WIDTH)).float()
                    for token in kept
                ]
            )
            yield [row], states, np.zeros(len(kept), np.int64)

    def close(self) -> None: ...


class FakeEmbedder:
    def __init__(self, asked: Counter[str]) -> None:
        self.asked = asked

    def embed(self, texts: Sequence[str]) -> Embedded:
        self.asked["embedder"] += len(texts)
        vectors = np.array(
            [np.random.default_rng(int(unit(text) * 2**32)).normal(size=WIDTH) for text in texts]
        ).reshape(len(texts), WIDTH)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Embedded(vectors.astype(np.float32), np.ones(len(texts), np.int64))

    def close(self) -> None: ...


KINDS = {
    "scorer": FakeScorer,
    "generator": FakeGenerator,
    "reader": FakeReader,
    "embedder": FakeEmbedder,
}


class CountedEngines:
    """Makes fake engines, and counts the rows that each kind was asked for."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.opened: list[str] = []

    def __call__(self, kind: str, settings: ModelSettings) -> Any:
        self.opened.append(kind)
        if settings.endpoint is not None:
            # There the boundary is the wire: the test's server is the fake.
            return make_engine(kind, settings)
        return KINDS[kind](self.asked)
