"""Embedder on sentence-transformers, with long texts embedded in chunks instead of cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stages.engines import Embedded
from stages.engines.model_files import model_folder, set_threads
from stages.engines.settings import ModelSettings
from stages.errors import EngineError

_ROWS = 32


class SentenceEmbedder:
    """Sentence vectors of texts of any length."""

    def __init__(self, settings: ModelSettings) -> None:
        """Load the encoder.

        Raises:
            EngineError: it can't be loaded.
        """
        import torch
        from sentence_transformers import SentenceTransformer

        set_threads(settings)
        folder = model_folder(settings.model)
        try:
            self._encoder = SentenceTransformer(
                str(folder),
                device="cuda" if torch.cuda.is_available() else "cpu",
                trust_remote_code=settings.trust_remote_code,
                model_kwargs={"dtype": getattr(torch, settings.dtype)},
            )
        except (OSError, ValueError) as error:
            raise EngineError(f"encoder {settings.model}: cannot load it: {error}") from error
        self._encoder.eval()

    def embed(self, texts: Sequence[str]) -> Embedded:
        """L2-normalised vectors; a text over the window is the weighted mean of its chunks."""
        pieces: list[str] = []
        owners: list[int] = []
        weights: list[float] = []
        for row, text in enumerate(texts):
            for piece, tokens in self._chunks(text):
                pieces.append(piece)
                owners.append(row)
                weights.append(tokens)
        vectors = self._encode(pieces)
        width = vectors.shape[1]
        sums = np.zeros((len(texts), width), dtype=np.float64)
        np.add.at(sums, owners, vectors * np.asarray(weights)[:, None])
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        if len(texts) and not np.all(norms > 0):
            raise EngineError("the encoder gave a zero vector, which has no direction")
        chunks = np.bincount(np.asarray(owners, dtype=np.int64), minlength=len(texts))
        return Embedded((sums / norms).astype(np.float32), chunks)

    def close(self) -> None:
        """Release the encoder."""
        del self._encoder

    def _encode(self, pieces: Sequence[str]) -> NDArray[np.float64]:
        if not pieces:
            return np.zeros((0, int(self._encoder.get_embedding_dimension() or 0)))
        vectors = self._encoder.encode(
            list(pieces),
            batch_size=_ROWS,
            convert_to_numpy=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, dtype=np.float64)

    def _chunks(self, text: str) -> list[tuple[str, int]]:
        """Pieces of a text that fit the encoder's window, with their tokens."""
        window = int(self._encoder.max_seq_length or 512) - 2
        spans = self._encoder.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False
        )["offset_mapping"]
        if len(spans) <= window:
            return [(text, max(len(spans), 1))]
        pieces = [spans[i : i + window] for i in range(0, len(spans), window)]
        return [(text[piece[0][0] : piece[-1][1]], len(piece)) for piece in pieces]
