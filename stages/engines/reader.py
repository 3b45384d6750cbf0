"""FeatureReader on transformers: the residual stream after one block, and what is read from it.

Layers are counted from 0: layer L is the output of block L, which Hugging Face calls
`hidden_states[L + 1]`. The forward pass ends there. Sparse codes, pooling and similarities are
computed beside the activations, a batch at a time; only small columns leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stages.engines import LatentCounts, MaskedSequence, RowConcepts, RowFeatures
from stages.engines.batching import token_budget_batches
from stages.engines.model_files import blocks_of, load_causal_lm, set_threads
from stages.engines.output_head import decoder_of
from stages.engines.settings import ModelSettings
from stages.errors import EngineError
from stages.storage import Store

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_array

    from stages.concepts.settings import ConceptsSettings
    from stages.features.encoding import TokenEncoder
    from stages.features.references import References
    from stages.features.settings import FeaturesSettings, Pooling


class TransformersReader:
    """Reads activations after any block; the forward pass ends at the block that is asked for."""

    def __init__(self, settings: ModelSettings) -> None:
        """Load the model.

        Raises:
            EngineError: it can't be loaded.
        """
        set_threads(settings)
        self._settings = settings
        self._model = load_causal_lm(settings)
        self._blocks: Any = None
        self._encoders: dict[str, TokenEncoder] = {}
        self._references: dict[tuple[str, FeaturesSettings], References] = {}

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

    def mean_states(
        self, sequences: Sequence[MaskedSequence], layer: int | None
    ) -> NDArray[np.float32]:
        """Mean residual stream of every row's kept tokens, float32 [rows, d], in input order.

        Args:
            sequences: of the rows.
            layer: block whose output is read; None: the last.
        """
        means = np.zeros((len(sequences), self._width), dtype=np.float32)
        for rows, hidden, row_of_token in self._kept_states(sequences, layer):
            sums = np.zeros((len(rows), self._width), dtype=np.float64)
            np.add.at(sums, row_of_token, hidden.float().cpu().numpy())
            counts = np.bincount(row_of_token, minlength=len(rows))
            means[rows] = sums / counts[:, None]
        return means

    def features(
        self,
        sequences: Sequence[MaskedSequence],
        layer: int,
        dictionary: str,
        prototypes: str,
        settings: FeaturesSettings,
    ) -> RowFeatures:
        """Similarities to the targets, and active latents, in input order.

        Args:
            sequences: of the rows.
            layer: block whose output is read.
            dictionary: URL of the dictionary's folder.
            prototypes: URL of the prototypes' folder.
            settings: pooling, metric, weights, and what is asked for.
        """
        from stages.features.encoding import pooled_codes

        by_task: list[Any] = [None] * len(sequences)
        by_target: list[Any] = [None] * len(sequences)
        active: list[Any] = [None] * len(sequences)
        above = settings.active_above
        wants_peak = settings.pooling == "max" or above is not None
        for rows, encoder, hidden, lengths in self._encoded(sequences, layer, dictionary):
            references = self._compared_with(prototypes, settings, hidden.device)
            pooled = pooled_codes(
                encoder, hidden, lengths, mean=settings.pooling == "mean", peak=wants_peak
            )
            codes = pooled.mean if settings.pooling == "mean" else pooled.peak
            assert codes is not None
            found = references.similarities(codes)
            peaks = (
                None
                if above is None or pooled.peak is None
                else references.active(pooled.peak, above)
            )
            for place, row in enumerate(rows):
                by_task[row] = found.by_task[place].numpy()
                if found.by_target is not None:
                    by_target[row] = found.by_target[place].float().numpy()
                if peaks is not None:
                    active[row] = peaks[place].numpy()
        return RowFeatures(
            np.stack(by_task) if by_task else np.zeros((0, 0)),
            np.stack(by_target) if settings.by_target and by_target else None,
            None if above is None else active,
        )

    def pooled_codes(
        self, sequences: Sequence[MaskedSequence], layer: int, dictionary: str, pooling: Pooling
    ) -> csr_array:
        """Pooled code of every row, float32 [rows, latents], in input order."""
        from scipy.sparse import csr_array

        from stages.features.encoding import pooled_codes

        kept: list[Any] = [None] * len(sequences)
        mean = pooling == "mean"
        for rows, encoder, hidden, lengths in self._encoded(sequences, layer, dictionary):
            pooled = pooled_codes(encoder, hidden, lengths, mean=mean, peak=not mean)
            codes = pooled.mean if mean else pooled.peak
            assert codes is not None
            for place, row in enumerate(rows):
                code = codes[place].cpu().numpy()
                latents = np.flatnonzero(code)
                kept[row] = latents, code[latents]
        starts = np.cumsum([0, *(len(latents) for latents, _ in kept)])
        latents = np.concatenate([np.zeros(0, np.int64), *(latents for latents, _ in kept)])
        values = np.concatenate([np.zeros(0, np.float32), *(values for _, values in kept)])
        width = self._encoder(dictionary).latents
        return csr_array((values, latents, starts), shape=(len(kept), width))

    def latent_counts(
        self, sequences: Sequence[MaskedSequence], layer: int, dictionary: str
    ) -> LatentCounts:
        """How many of these rows, and of their tokens, activate each latent."""
        latents = self._encoder(dictionary).latents
        in_rows, in_tokens = np.zeros(latents, np.int64), np.zeros(latents, np.int64)
        for rows, encoder, hidden, lengths in self._encoded(sequences, layer, dictionary):
            owner = np.repeat(np.arange(len(rows)), lengths)
            held = np.zeros((len(rows), latents), dtype=bool)
            for start, codes in encoder.chunks(hidden):
                active = (codes > 0).cpu().numpy()
                in_tokens += active.sum(axis=0)
                mine = owner[start : start + len(active)]
                for row in np.unique(mine):
                    held[row] |= active[mine == row].any(axis=0)
            in_rows += held.sum(axis=0)
        return LatentCounts(in_rows, in_tokens)

    def latent_activations(
        self,
        sequences: Sequence[MaskedSequence],
        layer: int,
        dictionary: str,
        latents: Sequence[int],
    ) -> list[NDArray[np.float32]]:
        """Activations of some latents at every kept token, float32 [tokens, latents] a row."""
        import torch

        found: list[Any] = [None] * len(sequences)
        for rows, encoder, hidden, lengths in self._encoded(sequences, layer, dictionary):
            wanted = torch.tensor(list(latents), device=hidden.device)
            values = torch.cat([codes[:, wanted] for _, codes in encoder.chunks(hidden)])
            parts = np.split(values.cpu().numpy(), np.cumsum(lengths)[:-1])
            for row, mine in zip(rows, parts, strict=True):
                found[row] = mine
        return found

    def concepts(
        self,
        sequences: Sequence[MaskedSequence],
        layer: int,
        dictionary: str,
        settings: ConceptsSettings,
    ) -> list[RowConcepts]:
        """Latents that bear on each kept token's next one, in input order.

        The last token has no next one, and gets no concept. Rows are read one at a time.

        Args:
            sequences: of the rows.
            layer: block whose output is encoded.
            dictionary: URL of the dictionary's folder.
            settings: how many concepts, and of what.
        """
        import torch

        from stages.concepts.attribution import reconstructions, row_concepts
        from stages.engines.own_path import own_gradients

        # The pass goes on to the end; the first call sees that there is such a block.
        self._end_at(layer)
        self._end_at(None)
        self._check_lengths([len(sequence.ids) for sequence in sequences])
        sae = self._encoder(dictionary, self._model.device).autoencoder
        found = []
        for sequence in sequences:
            places = [place for place, kept in enumerate(sequence.keep[:-1]) if kept]
            own = own_gradients(
                self._model, sequence.ids, places, layer, lambda x: reconstructions(sae, x)
            )
            with torch.inference_mode():
                found.append(
                    row_concepts(sae, own.states, own.gradient, places, len(sequence.ids), settings)
                )
        return found

    def close(self) -> None:
        """Release the model."""
        del self._model

    @property
    def _width(self) -> int:
        return int(self._model.config.hidden_size)

    def _encoded(
        self, sequences: Sequence[MaskedSequence], layer: int, dictionary: str
    ) -> Iterator[tuple[list[int], TokenEncoder, torch.Tensor, list[int]]]:
        """Batches: row numbers, the encoder, states of kept tokens row after row, rows' lengths."""
        import torch

        for rows, hidden, row_of_token in self._kept_states(sequences, layer):
            lengths = np.bincount(row_of_token, minlength=len(rows)).tolist()
            with torch.inference_mode():
                yield rows, self._encoder(dictionary, hidden.device), hidden.float(), lengths

    def _kept_states(
        self, sequences: Sequence[MaskedSequence], layer: int | None
    ) -> Iterator[tuple[list[int], torch.Tensor, NDArray[np.int64]]]:
        """Batches: row numbers, states of kept tokens [tokens, d], each token's place in rows.

        Tokens come row after row.
        """
        import torch

        self._end_at(layer)
        lengths = [len(sequence.ids) for sequence in sequences]
        self._check_lengths(lengths)
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

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        if lengths and max(lengths) > self._settings.max_length:
            raise EngineError(
                f"a sequence of {max(lengths)} tokens exceeds "
                f"max_length={self._settings.max_length}"
            )

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

    def _end_at(self, layer: int | None) -> None:
        """Have the forward pass end after a block; None: the last."""
        decoder = decoder_of(self._model)
        if self._blocks is None:
            self._blocks = blocks_of(decoder)
        if self._blocks is None:
            raise EngineError(
                f"model {self._settings.model}: its decoder has no list of blocks named 'layers' "
                "or 'h', so its residual stream can't be read"
            )
        if layer is not None and layer >= len(self._blocks):
            raise EngineError(
                f"model {self._settings.model}: layer {layer} was asked for, "
                f"and it has {len(self._blocks)} blocks (counted from 0)"
            )
        # Under the name that the decoder has for its blocks.
        name = "layers" if hasattr(decoder, "layers") else "h"
        setattr(decoder, name, self._blocks[: None if layer is None else layer + 1])

    def _encoder(self, url: str, device: torch.device | None = None) -> TokenEncoder:
        """The encoder of the autoencoder in a dictionary's folder, read once."""
        import torch

        # It is kept, and weights that inference mode made could take part in no gradient later.
        with torch.inference_mode(mode=False):
            if url not in self._encoders:
                from stages.dictionary.artifact import read_autoencoder
                from stages.features.encoding import TokenEncoder

                self._encoders[url] = TokenEncoder(read_autoencoder(Store(url)))
            encoder = self._encoders[url]
            return encoder if device is None else encoder.to(device)

    def _compared_with(
        self, url: str, settings: FeaturesSettings, device: torch.device
    ) -> References:
        """What rows are compared with, laid out once."""
        if (url, settings) not in self._references:
            from stages.features.references import References
            from stages.prototypes.artifact import read_prototypes

            prototypes = read_prototypes(Store(url))
            self._references[url, settings] = References(prototypes, settings, device)
        return self._references[url, settings]
