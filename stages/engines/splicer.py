"""A scorer whose residual stream after one block can be replaced: what a reconstruction costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.engines import LogLikelihoods, MaskedSequence
from stages.engines.model_files import blocks_of
from stages.engines.output_head import decoder_of
from stages.engines.prefixes import SharedPrefix
from stages.engines.scorer import TransformersScorer

if TYPE_CHECKING:
    import torch


class TransformersSplicer(TransformersScorer):
    """Scores the kept tokens of sequences, with other states in place of a block's output."""

    def spliced(
        self, sequences: Sequence[MaskedSequence], layer: int, replace: Any = None
    ) -> LogLikelihoods:
        """Log-likelihood of every kept token but a sequence's first, in input order.

        Args:
            sequences: rows; their kept tokens are those that count, and whose states are replaced.
            layer: block whose output is replaced, from 0.
            replace: float32 states ``[tokens, d]`` to others; None leaves the model as it is.

        Raises:
            EngineError: a sequence is longer than the model's window.
        """
        import torch

        self._fitting([len(sequence.ids) for sequence in sequences])
        sums = np.zeros(len(sequences), dtype=np.float64)
        counts = np.zeros(len(sequences), dtype=np.int64)
        for place, sequence in enumerate(sequences):
            keep = torch.tensor([list(sequence.keep)], dtype=torch.bool)
            replaced = nullcontext() if replace is None else self._replaced(layer, keep, replace)
            with torch.inference_mode(), replaced:
                (forward,) = self._forwards([sequence.ids], [SharedPrefix((), [0])])
                (positions,) = keep[0, 1:].nonzero(as_tuple=True)
                targets = torch.tensor(list(sequence.ids))[1:][positions]
                log_probs = self._target_log_probs(forward.states[positions], targets)
            sums[place], counts[place] = float(log_probs.sum()), len(positions)
        return LogLikelihoods(sums, counts)

    @contextmanager
    def _replaced(self, layer: int, keep: torch.Tensor, replace: Any) -> Iterator[None]:
        """While open, kept states after a block are replaced; keep [1, tokens]."""

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            places = keep.to(states.device)
            states = states.clone()
            states[places] = replace(states[places].float()).to(states.dtype)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handle = blocks_of(decoder_of(self._model))[layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
