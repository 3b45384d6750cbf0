"""TokenScorer on transformers: log-likelihoods of given ids, batched by token budget."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from stages.engines import FirstTokens, LogLikelihoods, ScoreRequest, TokenIds
from stages.engines.batching import token_budget_batches
from stages.engines.model_files import decoder_of, load_causal_lm, output_head_of, set_threads
from stages.engines.prefixes import SharedPrefix, shared_prefixes
from stages.engines.settings import ModelSettings
from stages.errors import EngineError

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

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
        self._model.requires_grad_(False)

    def score(self, requests: Sequence[ScoreRequest]) -> LogLikelihoods:
        """Sum and count of target log-probabilities (log-softmax in float32), in input order.

        Raises:
            EngineError: a request is longer than the model's window.
        """
        import torch

        self._fitting([len(prompt) + len(target) for prompt, target in requests])
        # The same response is often asked for twice: before and after a stage that leaves it alone.
        places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        which = [
            places.setdefault((tuple(prompt), tuple(target)), len(places))
            for prompt, target in requests
        ]
        distinct = [ScoreRequest(prompt, target) for prompt, target in places]
        scored = [i for i, (prompt, target) in enumerate(distinct) if len(target) > (not prompt)]
        sums = np.zeros(len(distinct), dtype=np.float64)
        counts = np.zeros(len(distinct), dtype=np.int64)
        with torch.inference_mode():
            for group in self._groups([distinct[i].prompt for i in scored]):
                states, skip = self._prefix_states(group.ids), len(group.ids)
                members = [scored[i] for i in group.members]
                rest = [len(distinct[i].prompt) + len(distinct[i].target) - skip for i in members]
                for batch in token_budget_batches(rest, self._settings.batch_tokens):
                    chosen = [members[i] for i in batch]
                    sums[chosen], counts[chosen] = self._score_batch(
                        [distinct[i] for i in chosen], skip, states
                    )
        return LogLikelihoods(sums[which], counts[which])

    def first_tokens(self, prompts: Sequence[TokenIds], chosen: TokenIds) -> FirstTokens:
        """Log-probabilities of chosen ids as the token after every prompt, in input order.

        Logits are computed at one position a prompt; the log-softmax is float64.

        Raises:
            EngineError: a prompt is empty, or longer than the model's window.
        """
        import torch

        lengths = self._fitting([len(prompt) for prompt in prompts])
        if 0 in lengths:
            raise EngineError("a prompt is empty; a first token needs at least one before it")
        log_probs = np.zeros((len(prompts), len(chosen)), dtype=np.float64)
        greedy = np.zeros(len(prompts), dtype=np.int64)
        head = output_head_of(self._model)
        for batch in token_budget_batches(lengths, self._settings.batch_tokens):
            with torch.inference_mode():
                hidden = self._hidden([prompts[i] for i in batch])
                last = hidden[range(len(batch)), [lengths[i] - 1 for i in batch]]
                logits = head(last).double()
                log_probs[batch] = logits.log_softmax(-1)[:, list(chosen)].cpu().numpy()
                greedy[batch] = logits.argmax(-1).cpu().numpy()
        return FirstTokens(log_probs, greedy)

    def gradient_norms(self, requests: Sequence[ScoreRequest]) -> NDArray[np.float64]:
        r"""How far one target pulls the input embeddings, float64 [n], in input order.

        .. math:: G = \bigl\lVert \nabla_E \textstyle\sum_i \log p(y_i \mid x, y_{<i})
            \bigr\rVert_2

        E is the matrix of input embeddings; where the model ties it to its output head, the head's
        part is in the gradient too. One backward pass a request. Source: GVM-RAFT
        (arXiv 2505.02391), Appendix B: one tensor stands for all parameters.

        Raises:
            EngineError: a request has no prompt or no target, or is longer than the window.
        """
        import torch
        from torch.nn.functional import cross_entropy

        self._fitting([len(prompt) + len(target) for prompt, target in requests])
        if any(not prompt or not target for prompt, target in requests):
            raise EngineError("a gradient needs a prompt and a target of at least one token each")
        norms = np.zeros(len(requests), dtype=np.float64)
        weight = cast("torch.nn.Embedding", self._model.get_input_embeddings()).weight
        head = output_head_of(self._model)
        with torch.enable_grad():
            weight.requires_grad_(True)
            for place, (prompt, target) in enumerate(requests):
                hidden = self._hidden([[*prompt, *target]])[0, len(prompt) - 1 : -1]
                ids = torch.tensor(list(target), device=hidden.device)
                loss = cross_entropy(head(hidden).float(), ids, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, weight)
                norms[place] = float(gradient.double().norm())
            weight.requires_grad_(False)
        return norms

    def close(self) -> None:
        """Release the model."""
        del self._model

    def _fitting(self, lengths: list[int]) -> list[int]:
        """The lengths, none of them over the window."""
        if lengths and max(lengths) > self._settings.max_length:
            raise EngineError(
                f"a request of {max(lengths)} tokens exceeds max_length={self._settings.max_length}"
            )
        return lengths

    def _groups(self, prompts: Sequence[TokenIds]) -> list[SharedPrefix]:
        """Groups by shared prefix, where the model's states can be shared."""
        kinds = set(getattr(self._model.config, "layer_types", None) or ())
        if kinds <= {"full_attention"}:
            return shared_prefixes(prompts)
        return [SharedPrefix((), list(range(len(prompts))))]

    def _prefix_states(self, ids: tuple[int, ...]) -> DynamicCache | None:
        """Keys and values of a prefix, [1, heads, prefix, d] a layer; None of an empty one."""
        if not ids:
            return None
        import torch
        from transformers import DynamicCache

        states = DynamicCache(config=self._model.config)
        decoder_of(self._model)(
            input_ids=torch.tensor([ids], device=self._model.device), past_key_values=states
        )
        return states

    def _hidden(
        self, sequences: Sequence[TokenIds], prefix: DynamicCache | None = None
    ) -> torch.Tensor:
        """Final states [sequences, longest, d] of sequences padded on the right.

        Args:
            sequences: ids after the prefix.
            prefix: keys and values of the prefix.
        """
        import torch

        rows, width = len(sequences), max(len(sequence) for sequence in sequences)
        ids = torch.zeros(rows, width, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        if prefix is not None:
            prefix = copy.deepcopy(prefix)
            prefix.batch_repeat_interleave(rows)
        # No mask: what comes after a token, padding included, has no part in its state.
        states: torch.Tensor = decoder_of(self._model)(
            input_ids=ids.to(self._model.device), past_key_values=prefix, use_cache=False
        ).last_hidden_state
        return states

    def _score_batch(
        self, requests: list[ScoreRequest], skip: int, prefix: DynamicCache | None
    ) -> tuple[list[float], list[int]]:
        import torch

        sequences = [[*prompt, *target][skip:] for prompt, target in requests]
        rows: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        for row, sequence in enumerate(sequences):
            first = max(len(requests[row].prompt), 1) - skip
            rows += [row] * (len(sequence) - first)
            positions += range(first - 1, len(sequence) - 1)
            targets += sequence[first:]
        hidden = self._hidden(sequences, prefix)
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
