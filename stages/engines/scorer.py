"""TokenScorer on transformers: log-likelihoods of given ids, batched by token budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.engines import LogLikelihoods, ScoreRequest
from stages.engines.batching import token_budget_batches
from stages.engines.model_files import decoder_of, load_causal_lm, output_head_of, set_threads
from stages.engines.settings import ModelSettings
from stages.errors import EngineError

if TYPE_CHECKING:
    import torch

_LOGIT_ROWS = 512
"""Positions whose logits are held at once: 512 x 49,152 x 4 bytes is 100 MB."""


class TransformersScorer:
    """Scores target ids; logits are computed only where a target token needs one."""

    def __init__(self, settings: ModelSettings) -> None:
        """Load the model.

        Raises:
            EngineError: it can't be loaded.
        """
        set_threads(settings)
        self._settings = settings
        self._model = load_causal_lm(settings)

    def score(self, requests: Sequence[ScoreRequest]) -> LogLikelihoods:
        """Sum and count of target log-probabilities (log-softmax in float32), in input order.

        Raises:
            EngineError: a request is longer than the model's window.
        """
        import torch

        lengths = [len(prompt) + len(target) for prompt, target in requests]
        if requests and max(lengths) > self._settings.max_length:
            raise EngineError(
                f"a request of {max(lengths)} tokens exceeds max_length={self._settings.max_length}"
            )
        sums = np.zeros(len(requests), dtype=np.float64)
        counts = np.zeros(len(requests), dtype=np.int64)
        for batch in token_budget_batches(lengths, self._settings.batch_tokens):
            with torch.inference_mode():
                batch_sums, batch_counts = self._score_batch([requests[i] for i in batch])
            sums[batch], counts[batch] = batch_sums, batch_counts
        return LogLikelihoods(sums, counts)

    def close(self) -> None:
        """Release the model."""
        del self._model

    def _score_batch(self, requests: list[ScoreRequest]) -> tuple[list[float], list[int]]:
        import torch

        width = max(len(prompt) + len(target) for prompt, target in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros(len(requests), width, dtype=torch.long)
        rows: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        for row, (prompt, target) in enumerate(requests):
            sequence = [*prompt, *target]
            ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            mask[row, : len(sequence)] = 1
            first = max(len(prompt), 1)
            rows += [row] * (len(sequence) - first)
            positions += range(first - 1, len(sequence) - 1)
            targets += sequence[first:]
        device = self._model.device
        hidden = decoder_of(self._model)(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state
        log_probs = self._target_log_probs(hidden[rows, positions], torch.tensor(targets))
        sums = torch.zeros(len(requests), dtype=torch.float64)
        sums.index_add_(0, torch.tensor(rows, dtype=torch.long), log_probs)
        counts = np.bincount(np.asarray(rows, dtype=np.int64), minlength=len(requests))
        return sums.tolist(), counts.tolist()

    def _target_log_probs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probability of each target after its hidden state; hidden [n, d] -> float64 [n]."""
        import torch
        from torch.nn.functional import cross_entropy

        head = output_head_of(self._model)
        pieces = []
        pairs = zip(
            torch.split(hidden, _LOGIT_ROWS), torch.split(targets, _LOGIT_ROWS), strict=True
        )
        for states, ids in pairs:
            losses = cross_entropy(head(states).float(), ids.to(states.device), reduction="none")
            pieces.append(-losses.double().cpu())
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)
