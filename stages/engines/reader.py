"""FeatureReader on transformers: the residual stream after one block, and what is read from it.

Layers are counted from 0: layer L is the output of block L, which Hugging Face calls
`hidden_states[L + 1]`. Blocks after L are dropped, so the forward pass ends there. Sparse codes,
pooling and similarities are computed beside the activations; only small columns leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.engines import MaskedSequence
from stages.engines.batching import token_budget_batches
from stages.engines.model_files import blocks_of, decoder_of, load_causal_lm, set_threads
from stages.engines.settings import ModelSettings
from stages.errors import EngineError
from stages.storage import Store

if TYPE_CHECKING:
    import torch

    from stages.dictionary.sae import SparseAutoencoder


class TransformersReader:
    """Reads activations after block `layer`; the model is cut there at its first use."""

    def __init__(self, settings: ModelSettings) -> None:
        """Load the model.

        Raises:
            EngineError: it can't be loaded.
        """
        set_threads(settings)
        self._settings = settings
        self._model = load_causal_lm(settings)
        self._layer: int | None = None
        self._dictionaries: dict[str, tuple[SparseAutoencoder, torch.Tensor]] = {}

    def activations(self, sequences: Sequence[MaskedSequence], layer: int) -> NDArray[np.float32]:
        """Residual stream of every kept token, float32 [tokens, d], rows in input order."""
        states: list[NDArray[np.float32]] = [np.zeros((0, self._width), dtype=np.float32)] * len(
            sequences
        )
        for rows, hidden, row_of_token in self._kept_states(sequences, layer):
            values = hidden.float().cpu().numpy()
            for place, row in enumerate(rows):
                states[row] = values[row_of_token == place]
        return np.concatenate(states) if states else np.zeros((0, self._width), np.float32)

    def similarities(
        self, sequences: Sequence[MaskedSequence], layer: int, dictionary: str
    ) -> NDArray[np.float64]:
        """Generalised Jaccard similarity to each of the dictionary's prototypes, [rows, tasks]."""
        from stages.features.jaccard import generalised_jaccard

        sae, prototypes = self._dictionary(dictionary)
        scores = np.zeros((len(sequences), len(prototypes)), dtype=np.float64)
        for rows, codes in self._mean_codes(sequences, layer, sae):
            scores[rows] = generalised_jaccard(codes.cpu(), prototypes).numpy()
        return scores

    def close(self) -> None:
        """Release the model."""
        del self._model

    @property
    def _width(self) -> int:
        return int(self._model.config.hidden_size)

    def _mean_codes(
        self, sequences: Sequence[MaskedSequence], layer: int, sae: SparseAutoencoder
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        import torch

        for rows, hidden, row_of_token in self._kept_states(sequences, layer):
            with torch.inference_mode():
                codes = sae.encode(hidden.float())
                pooled = torch.zeros(len(rows), codes.shape[1])
                owner = torch.as_tensor(row_of_token)
                pooled.index_add_(0, owner, codes.cpu())
                lengths = torch.bincount(owner, minlength=len(rows)).clamp(min=1)
                yield rows, pooled / lengths[:, None]

    def _kept_states(
        self, sequences: Sequence[MaskedSequence], layer: int
    ) -> Iterator[tuple[list[int], torch.Tensor, NDArray[np.int64]]]:
        """Batches: row numbers, states of kept tokens [tokens, d], each token's place in rows."""
        import torch

        self._cut(layer)
        lengths = [len(sequence.ids) for sequence in sequences]
        if lengths and max(lengths) > self._settings.max_length:
            raise EngineError(
                f"a sequence of {max(lengths)} tokens exceeds "
                f"max_length={self._settings.max_length}"
            )
        for batch in token_budget_batches(lengths, self._settings.batch_tokens):
            width = lengths[batch[0]]
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            keep = torch.zeros(len(batch), width, dtype=torch.bool)
            for place, row in enumerate(batch):
                n = lengths[row]
                ids[place, :n] = torch.as_tensor(list(sequences[row].ids))
                keep[place, :n] = torch.as_tensor(list(sequences[row].keep))
                mask[place, :n] = 1
            with torch.inference_mode():
                hidden = self._hidden(ids, mask)
            place_of_token = keep.nonzero()[:, 0].numpy()
            yield batch, hidden[keep.to(hidden.device)], place_of_token

    def _hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Output of the last remaining block, before the final norm, [rows, tokens, d]."""
        caught: list[torch.Tensor | tuple[torch.Tensor, ...]] = []
        decoder = decoder_of(self._model)
        handle = blocks_of(decoder)[-1].register_forward_hook(
            lambda _module, _args, output: caught.append(output)
        )
        try:
            device = self._model.device
            decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        finally:
            handle.remove()
        output = caught[0]
        return output[0] if isinstance(output, tuple) else output

    def _cut(self, layer: int) -> None:
        if self._layer == layer:
            return
        layers = blocks_of(decoder_of(self._model))
        if layers is None:
            raise EngineError(
                f"model {self._settings.model}: its decoder has no list of blocks named 'layers' "
                "or 'h', so its residual stream can't be read"
            )
        if self._layer is not None or layer >= len(layers):
            raise EngineError(
                f"model {self._settings.model}: layer {layer} was asked for, "
                f"and it has {len(layers)} blocks (counted from 0)"
            )
        # In place: the list stays where the decoder has it, under whichever name.
        del layers[layer + 1 :]
        self._layer = layer

    def _dictionary(self, url: str) -> tuple[SparseAutoencoder, torch.Tensor]:
        """The autoencoder and prototypes [tasks, latents] in a dictionary's folder, read once."""
        if url not in self._dictionaries:
            from stages.dictionary.artifact import read_dictionary

            self._dictionaries[url] = read_dictionary(Store(url))
        return self._dictionaries[url]
