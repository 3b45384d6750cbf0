"""TextGenerator on transformers: batched generation, each row seeded by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from stages.engines import Completion, GenerationRequest, Sampling
from stages.engines.batching import token_budget_batches
from stages.engines.model_files import load_causal_lm, load_tokenizer, set_threads
from stages.engines.settings import ModelSettings
from stages.errors import EngineError

if TYPE_CHECKING:
    import torch


_CANDIDATES = 1024
_CACHED_TOKENS = 32_768
"""Tokens whose keys and values are held at once, padding included."""
STEP_OVERHEAD = 4_096
"""Padded tokens whose keys and values cost as much a step as reading the weights once more."""


class TransformersGenerator:
    """Generates in left-padded batches of similar prompts."""

    def __init__(self, settings: ModelSettings) -> None:
        """Load the model and its tokenizer.

        Raises:
            EngineError: they can't be loaded.
        """
        set_threads(settings)
        self._settings = settings
        self._tokenizer = load_tokenizer(settings)
        self._model = load_causal_lm(settings)

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        """One completion a request, in input order.

        Raises:
            EngineError: prompt and new tokens together exceed the model's window; or a schema is
                given.
        """
        if not requests:
            return []
        if sampling.schema is not None:
            raise EngineError(
                f"model {self._settings.model}: transformers can't keep to a JSON schema; set "
                "engine: vllm, or ask for another form of reply"
            )
        longest_prompt(requests, sampling, self._settings.max_length)
        lengths = [len(request.prompt) + sampling.max_new_tokens for request in requests]
        completions: dict[int, Completion] = {}
        for batch in token_budget_batches(lengths, _CACHED_TOKENS, STEP_OVERHEAD):
            made = self._batch([requests[i] for i in batch], sampling)
            completions |= dict(zip(batch, made, strict=True))
        return [completions[i] for i in range(len(requests))]

    def _batch(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion]:
        import torch
        from transformers import LogitsProcessorList

        width = max(len(request.prompt) for request in requests)
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.full((len(requests), width), pad, dtype=torch.long)
        mask = torch.zeros(len(requests), width, dtype=torch.long)
        for row, request in enumerate(requests):
            start = width - len(request.prompt)
            ids[row, start:] = torch.tensor(request.prompt, dtype=torch.long)
            mask[row, start:] = 1
        chooser = SeededChoice([request.seed for request in requests], sampling)
        device = self._model.device
        with torch.inference_mode():
            generate = cast(Callable[..., torch.Tensor], self._model.generate)
            out = generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([chooser]),
                pad_token_id=pad,
                eos_token_id=self._end_ids(),
            )
        return [
            self._completion(new, chooser.log_probs[row])
            for row, new in enumerate(out[:, width:].tolist())
        ]

    def close(self) -> None:
        """Release the model."""
        del self._model

    def _end_ids(self) -> list[int]:
        return end_token_ids(self._tokenizer, self._model.generation_config.eos_token_id)

    def _completion(self, new: list[int], log_probs: list[float]) -> Completion:
        end = next((i for i, token in enumerate(new) if token in self._end_ids()), None)
        kept = new if end is None else new[:end]
        return Completion(
            token_ids=tuple(kept),
            text=cast(str, self._tokenizer.decode(kept, skip_special_tokens=True)),
            finish_reason="length" if end is None else "stop",
            log_prob=float(sum(log_probs[: len(kept) + (end is not None)])),
            end_id=None if end is None else new[end],
        )


class SeededChoice:
    """A logits processor that leaves each row one finite logit: the token chosen with its own seed.

    The token is drawn by inverting the cumulative distribution at one uniform number a step, from a
    generator that belongs to the row, so that a row's text depends on nothing else in the batch.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        """Start one generator a row."""
        self._sampling = sampling
        self._generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        self.log_probs: list[list[float]] = [[] for _ in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] with all but the chosen token at minus infinity."""
        import torch

        log_probs = scores.float().log_softmax(dim=-1)
        if self._sampling.temperature == 0:
            chosen = log_probs.argmax(dim=-1)
        else:
            tempered = (scores.float() / self._sampling.temperature).softmax(dim=-1)
            drawn = [
                nucleus_choice(row, self._sampling.top_p, generator.random())
                for row, generator in zip(
                    tempered.double().cpu().numpy(), self._generators, strict=True
                )
            ]
            chosen = torch.tensor(drawn, device=scores.device)
        picked = log_probs.gather(1, chosen[:, None])[:, 0].tolist()
        for row, value in zip(self.log_probs, picked, strict=True):
            row.append(value)
        only = torch.full_like(scores, float("-inf"))
        return only.scatter(1, chosen[:, None], 0.0)


def longest_prompt(
    requests: Sequence[GenerationRequest], sampling: Sampling, max_length: int
) -> int:
    """Tokens of the longest prompt.

    Raises:
        EngineError: with the new tokens it exceeds the model's window.
    """
    width = max(len(request.prompt) for request in requests)
    if width + sampling.max_new_tokens > max_length:
        raise EngineError(
            f"a prompt of {width} tokens and {sampling.max_new_tokens} new ones exceed "
            f"max_length={max_length}"
        )
    return width


def nucleus_choice(probabilities: NDArray[np.float64], top_p: float, uniform: float) -> int:
    """The token at cumulative probability `uniform` within the smallest set of mass >= `top_p`.

    Args:
        probabilities: [vocabulary], summing to 1.
        top_p: mass of the nucleus, 0 < top_p <= 1.
        uniform: a number in [0, 1).

    Source: Holtzman et al. 2020 (nucleus sampling); inversion of the distribution function.
    """
    if top_p < 1:
        inside = _nucleus(probabilities, top_p)
        kept = np.zeros_like(probabilities)
        kept[inside] = probabilities[inside]
        probabilities = kept
    cumulative = np.cumsum(probabilities)
    choice = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(choice, len(probabilities) - 1)


def _nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Tokens of the smallest set of mass >= `top_p`, most probable first, ties by index."""
    # Sorting a whole vocabulary for every row and step costs more than a small model's forward.
    candidates = np.arange(len(probabilities))
    if len(probabilities) > _CANDIDATES:
        likely = np.sort(np.argpartition(-probabilities, _CANDIDATES)[:_CANDIDATES])
        if probabilities[likely].sum() >= top_p:
            candidates = likely
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    before = np.cumsum(probabilities[order]) - probabilities[order]
    return order[before < top_p]


def end_token_ids(tokenizer: object, configured: int | list[int] | None) -> list[int]:
    """Ids that end a turn: the tokenizer's EOS and those that the model's configuration names."""
    named = [configured] if isinstance(configured, int) else list(configured or [])
    own = getattr(tokenizer, "eos_token_id", None)
    return sorted({*named, *([own] if own is not None else [])})
