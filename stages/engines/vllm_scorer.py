"""TokenScorer on vLLM: first tokens, and log-likelihoods from prompt log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.engines import FirstTokens, LogLikelihoods, ScoreRequest, TokenIds
from stages.engines.settings import ModelSettings
from stages.engines.vllm_process import loading
from stages.errors import EngineError


class VllmScorer:
    """Scores with vLLM's offline engine; its log-softmax is float32.

    Prefixes aren't cached: with that cache prompt log-probabilities depend on the order of calls.
    """

    def __init__(
        self, settings: ModelSettings, *, tensor_parallel: int = 1, gpu_memory: float = 0.9
    ) -> None:
        """Start the child and load the model there.

        Args:
            settings: the model; `threads` counts on a CPU.
            tensor_parallel: GPUs that share the model.
            gpu_memory: share of each GPU's memory that the engine may take.

        Raises:
            ConfigError: the model can't be found.
            EngineError: vLLM isn't installed, or can't load it.
        """
        self._settings = settings
        options = {
            "tensor_parallel_size": tensor_parallel,
            "gpu_memory_utilization": gpu_memory,
            "enable_prefix_caching": False,
            # vLLM always draws a token, which needs a place after the longest prompt.
            "max_model_len": settings.max_length + 1,
        }
        with loading(settings, options) as self._engine:
            pass

    def score(self, requests: Sequence[ScoreRequest]) -> LogLikelihoods:
        """Sum and count of target log-probabilities, in input order.

        Raises:
            EngineError: a request is longer than the model's window; or the engine failed, and is
                closed now.
        """
        starts = [max(len(prompt), 1) for prompt, _ in requests]
        sequences = [[*map(int, prompt), *map(int, target)] for prompt, target in requests]
        counts = np.array(
            [max(len(ids) - start, 0) for ids, start in zip(sequences, starts, strict=True)],
            dtype=np.int64,
        )
        self._check(sequences)
        asked = [place for place, count in enumerate(counts) if count]
        task = _Score([sequences[i] for i in asked], [starts[i] for i in asked])
        sums = np.zeros(len(requests), dtype=np.float64)
        sums[asked] = self._engine.ask(task) if asked else []
        return LogLikelihoods(sums, counts)

    def first_tokens(self, prompts: Sequence[TokenIds], chosen: TokenIds) -> FirstTokens:
        """Log-probabilities of chosen ids as the token after every prompt, in input order.

        Raises:
            EngineError: a prompt is empty or longer than the model's window; or the engine failed,
                and is closed now.
        """
        sequences = [[int(token) for token in prompt] for prompt in prompts]
        self._check(sequences)
        if any(not ids for ids in sequences):
            raise EngineError("a prompt is empty; a first token needs at least one before it")
        if not sequences:
            return FirstTokens(np.zeros((0, len(chosen))), np.zeros(0, dtype=np.int64))
        log_probs, greedy = self._engine.ask(_First(sequences, [int(token) for token in chosen]))
        return FirstTokens(np.array(log_probs), np.array(greedy, dtype=np.int64))

    def gradient_norms(self, requests: Sequence[ScoreRequest]) -> NDArray[np.float64]:
        """Nothing: vLLM computes no gradients.

        Raises:
            EngineError: always.
        """
        raise EngineError(
            f"model {self._settings.model}: vLLM computes no gradients; declare the model a second "
            "time with engine: transformers"
        )

    def close(self) -> None:
        """End the child and all that it started; a second call does nothing."""
        self._engine.end()

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        longest = max((len(ids) for ids in sequences), default=0)
        if longest > self._settings.max_length:
            raise EngineError(
                f"a request of {longest} tokens exceeds max_length={self._settings.max_length}"
            )


class _Score(NamedTuple):
    """Summed log-probabilities of every sequence's tokens from its start on."""

    sequences: list[list[int]]
    starts: list[int]

    def requests(self) -> list[tuple[list[int], Any]]:
        """Prompts alone, with the log-probabilities of their own tokens."""
        from vllm import SamplingParams

        # 0: of the token that stands there alone.
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        return [(ids, parameters) for ids in self.sequences]

    def answer(self, outputs: list[Any]) -> list[float]:
        """One sum a sequence, nats."""
        return [
            sum(float(output.prompt_logprobs[i][ids[i]].logprob) for i in range(start, len(ids)))
            for output, ids, start in zip(outputs, self.sequences, self.starts, strict=True)
        ]


class _First(NamedTuple):
    """Log-probabilities of chosen ids as the first new token, and the most probable id."""

    prompts: list[list[int]]
    chosen: list[int]

    def requests(self) -> list[tuple[list[int], Any]]:
        """One greedy token a prompt, with the log-probabilities of the chosen ids."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, logprob_token_ids=self.chosen, detokenize=False
        )
        return [(ids, parameters) for ids in self.prompts]

    def answer(self, outputs: list[Any]) -> tuple[list[list[float]], list[int]]:
        """[prompts, chosen] nats, and [prompts] ids."""
        drawn = [output.outputs[0] for output in outputs]
        return (
            [[float(one.logprobs[0][token].logprob) for token in self.chosen] for one in drawn],
            [int(one.token_ids[0]) for one in drawn],
        )
