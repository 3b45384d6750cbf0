"""TextGenerator on vLLM. Token ids go in and out; text is decoded here, as anywhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.engines import Completion, GenerationRequest, Sampling
from stages.engines.generator import end_token_ids, longest_prompt
from stages.engines.model_files import load_tokenizer, model_folder
from stages.engines.settings import ModelSettings
from stages.engines.vllm_process import loading
from stages.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VllmGenerator:
    """Generates with vLLM's engine, which takes calls while it computes others.

    A request is drawn with its own seed, by vLLM's sampler: other text than TransformersGenerator's
    at the same seed. vLLM's kernels may round differently in another batch, so that a row's text is
    its own only up to that (and to a cached prefix).
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
            EngineError: vLLM isn't installed, or it or the tokenizer can't be loaded.
        """
        self._settings = settings
        options = {
            "tensor_parallel_size": tensor_parallel,
            "gpu_memory_utilization": gpu_memory,
            # Small models else write spaces without end between the parts of a reply.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        with loading(settings, options) as self._engine:
            self._tokenizer = load_tokenizer(settings)
            self._end_ids = _configured_end_ids(settings, self._tokenizer)

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        """One completion a request, in input order.

        Raises:
            EngineError: a prompt is empty, or with the new tokens exceeds the model's window; vLLM
                can't keep to the schema; or the engine failed, and is closed now.
        """
        if not requests:
            return []
        longest_prompt(requests, sampling, self._settings.max_length)
        if any(len(request.prompt) == 0 for request in requests):
            raise EngineError("a prompt is empty; vLLM generates after at least one token")
        task = _Generate(
            prompts=[[int(token) for token in request.prompt] for request in requests],
            seeds=[request.seed for request in requests],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            end_ids=self._end_ids,
            schema=sampling.schema,
        )
        # To hand a call over takes as long as the engine's step that is under way.
        answer = await asyncio.to_thread(self._engine.submit, task)
        drawn: list[_Drawn] = await asyncio.wrap_future(answer)
        return [self._completion(one) for one in drawn]

    def close(self) -> None:
        """End the child and all that it started; a second call does nothing."""
        self._engine.end()

    def _completion(self, drawn: _Drawn) -> Completion:
        end = next((i for i, token in enumerate(drawn.ids) if token in self._end_ids), None)
        kept = drawn.ids if end is None else drawn.ids[:end]
        return Completion(
            token_ids=tuple(kept),
            text=str(self._tokenizer.decode(kept, skip_special_tokens=True)),
            finish_reason="length" if end is None else "stop",
            log_prob=drawn.log_prob,
            end_id=None if end is None else drawn.ids[end],
        )


class _Drawn(NamedTuple):
    """New ids, the end marker included, and the sum of their log-probabilities."""

    ids: list[int]
    log_prob: float


class _Generate(NamedTuple):
    """Completions of prompts, each with its seed."""

    prompts: list[list[int]]
    seeds: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    end_ids: list[int]
    schema: str | None

    def requests(self) -> list[tuple[list[int], Any]]:
        """Every prompt with its seed."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        parameters = [
            SamplingParams(
                max_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=_signed(seed),
                # 0: of the drawn token alone, before temperature and top_p.
                logprobs=0,
                stop_token_ids=self.end_ids,
                detokenize=False,
                structured_outputs=(
                    None if self.schema is None else StructuredOutputsParams(json=self.schema)
                ),
            )
            for seed in self.seeds
        ]
        return list(zip(self.prompts, parameters, strict=True))

    def answer(self, outputs: list[Any]) -> list[_Drawn]:
        """New ids of every prompt, in order."""
        made = [output.outputs[0] for output in outputs]
        for one in made:
            if one.finish_reason not in ("stop", "length"):
                raise EngineError(f"vLLM ended a completion with {one.finish_reason!r}")
        return [_Drawn(list(one.token_ids), float(one.cumulative_logprob)) for one in made]


def _configured_end_ids(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end markers that TransformersGenerator finds on the loaded model."""
    from transformers import AutoConfig, GenerationConfig

    folder = model_folder(settings.model)
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
        generation = GenerationConfig.from_model_config(config)
    return end_token_ids(tokenizer, generation.eos_token_id)


def _signed(seed: int) -> int:
    """A 64-bit seed folded into 63: vLLM's are signed, and torch's CPU generator reads 32 bits."""
    return (seed ^ (seed >> 32)) & (2**63 - 1)
