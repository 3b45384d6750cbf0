"""TokenScorer on transformers: log-likelihoods of given ids, batched by token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from stages.engines import FirstTokens, LogLikelihoods, ScoreRequest, TokenIds
from stages.engines.batching import token_budget_batches
from stages.engines.model_files import load_causal_lm, set_threads
from stages.engines.output_head import decoder_of, output_head_of
from stages.engines.packing import packed_states, packs_of, use_packed_attention
from stages.engines.prefixes import SharedPrefix, shared_prefixes
from stages.engines.settings import ModelSettings
from stages.errors import EngineError

if TYPE_CHECKING:
    import torch

    from stages.engines.lora_gradients import LoraGradients

_LOGIT_ROWS = 512
"""Positions whose logits are held at once: 512 x 49,152 x 4 bytes is 100 MB."""


class Forward(NamedTuple):
    """What one forward computed.

    Attributes:
        states: final states, [tokens, d].
        members: places of the sequences that it held.
        origins: of each, where the state of its token t lies: states[origin + t].
    """

    states: torch.Tensor
    members: list[int]
    origins: list[int]


class TransformersScorer:
    """Scores target ids; logits are computed only where a target token needs one."""

    def __init__(self, settings: ModelSettings) -> None:
        """Load the model.

        Raises:
            EngineError: it can't be loaded, or makes its logits in an unknown way.
        """
        set_threads(settings)
        self._settings = settings
        self._model = load_causal_lm(settings)
        self._model.requires_grad_(False)
        # The model's own forward is asked once, while it still attends as it was made to.
        output_head_of(self._model)
        self._packed = use_packed_attention(self._model)
        self._gradients: tuple[tuple[int, int, int], LoraGradients] | None = None

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
            sequences = [[*distinct[i].prompt, *distinct[i].target] for i in scored]
            groups = shared_prefixes([distinct[i].prompt for i in scored])
            for forward in self._forwards(sequences, groups):
                chosen = [scored[member] for member in forward.members]
                sums[chosen], counts[chosen] = self._sums(forward, [distinct[i] for i in chosen])
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
        with torch.inference_mode():
            for forward in self._forwards(prompts, shared_prefixes(prompts)):
                rows_here = forward.members
                ends = [
                    origin + lengths[member] - 1
                    for member, origin in zip(forward.members, forward.origins, strict=True)
                ]
                logits = head(forward.states[ends]).double()
                log_probs[rows_here] = logits.log_softmax(-1)[:, list(chosen)].cpu().numpy()
                greedy[rows_here] = logits.argmax(-1).cpu().numpy()
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
                (forward,) = self._forwards([[*prompt, *target]], [SharedPrefix((), [0])])
                hidden = forward.states[len(prompt) - 1 : -1]
                ids = torch.tensor(list(target), device=hidden.device)
                loss = cross_entropy(head(hidden).float(), ids, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, weight)
                norms[place] = float(gradient.double().norm())
            weight.requires_grad_(False)
        return norms

    def projected_gradients(
        self, requests: Sequence[ScoreRequest], rank: int, dimensions: int, seed: int
    ) -> NDArray[np.float32]:
        """Projected adapter gradient of every target's mean loss, in input order.

        One forward and one backward pass a request, whose activations are held.

        Args:
            requests: each with a prompt and a target of at least one token.
            rank: of the adapters.
            dimensions: of the projection.
            seed: of the adapters and the projection.

        Returns:
            float32 [n, dimensions]; see `LoraGradients`.

        Raises:
            EngineError: a request has no prompt or no target, or is longer than the window.
        """
        self._fitting([len(prompt) + len(target) for prompt, target in requests])
        if any(not prompt or not target for prompt, target in requests):
            raise EngineError("a gradient needs a prompt and a target of at least one token each")
        drawn = (rank, dimensions, seed)
        if self._gradients is None or self._gradients[0] != drawn:
            from stages.engines.lora_gradients import LoraGradients

            gradients = LoraGradients(self._model, rank, dimensions, seed, packed=self._packed)
            self._gradients = drawn, gradients
        found = np.zeros((len(requests), dimensions), dtype=np.float32)
        for place, request in enumerate(requests):
            found[place] = self._gradients[1](request).cpu().numpy()
        return found

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

    def _forwards(
        self, sequences: Sequence[TokenIds], groups: Sequence[SharedPrefix]
    ) -> Iterator[Forward]:
        """Final states of all sequences, in packs or, where the model can't take those, padded."""
        import torch

        decoder, budget = decoder_of(self._model), self._settings.batch_tokens
        if self._packed:
            for pack in packs_of(sequences, groups, budget):
                states = packed_states(decoder, pack, self._model.device)
                yield Forward(states, pack.members, pack.origins)
            return
        for batch in token_budget_batches([len(sequence) for sequence in sequences], budget):
            width = len(sequences[batch[0]])
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for row, member in enumerate(batch):
                ids[row, : len(sequences[member])] = torch.tensor(sequences[member])
            # No mask: what comes after a token, padding included, has no part in its state.
            states = decoder(
                input_ids=ids.to(self._model.device), use_cache=False
            ).last_hidden_state
            yield Forward(states.flatten(0, 1), batch, [row * width for row in range(len(batch))])

    def _sums(
        self, forward: Forward, requests: Sequence[ScoreRequest]
    ) -> tuple[list[float], list[int]]:
        """Summed target log-probabilities, and targets scored, of a forward's requests."""
        import torch

        rows: list[int] = []
        places: list[int] = []
        targets: list[int] = []
        for row, (request, origin) in enumerate(zip(requests, forward.origins, strict=True)):
            skipped = int(not request.prompt)
            first, count = len(request.prompt) + skipped, len(request.target) - skipped
            rows += [row] * count
            places += range(origin + first - 1, origin + first - 1 + count)
            targets += request.target[skipped:]
        log_probs = self._target_log_probs(forward.states[places], torch.tensor(targets))
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
