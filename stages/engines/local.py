"""Engines in this process: how they are made, and how a stage awaits them."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stages.engines.model_files import load_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CALLS_IN_FLIGHT = 128
"""Calls that an engine which takes them together has at once; a generator's call is a chunk.

A chunk waits for its longest reply, so most of the prompts in flight are done: it takes a few times
as many as the engine batches to keep it busy. These are four shards of 512 rows in chunks of 16.
"""

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def make_engine(kind: str, settings: ModelSettings, tensor_parallel: int = 1) -> Any:
    """The engine of a kind, with its model loaded; `tensor_parallel` GPUs share a vLLM model.

    Raises:
        ConfigError: no engine of that kind runs on the library that the settings name.
        EngineError: the model can't be loaded.
    """
    # Idle OpenMP threads spin by default; two engines that share cores then stall each other (141 s
    # against 4.8 s for one batch on two busy cores). It has to be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_memory()
    if kind == "generator" and settings.endpoint is not None:
        from stages.engines.endpoint import EndpointChat

        return EndpointChat(settings.model, settings.endpoint)
    if settings.endpoint is not None:
        raise ConfigError(
            f"model {settings.model}: an endpoint only writes text; a {kind} needs the model's "
            "files and engine: transformers"
        )
    if kind == "generator" and settings.engine == "vllm":
        from stages.engines.vllm_generator import VllmGenerator

        return VllmGenerator(settings, tensor_parallel=tensor_parallel)
    if kind == "scorer" and settings.engine == "vllm":
        from stages.engines.vllm_scorer import VllmScorer

        return VllmScorer(settings, tensor_parallel=tensor_parallel)
    if settings.engine != "transformers":
        raise ConfigError(
            f"model {settings.model}: engine {settings.engine} generates and scores; a {kind} "
            "needs engine: transformers (declare the model twice under two names)"
        )
    if kind == "generator":
        from stages.engines.generator import TransformersGenerator

        return TransformersGenerator(settings)
    if kind == "scorer":
        from stages.engines.scorer import TransformersScorer

        return TransformersScorer(settings)
    if kind == "splicer":
        from stages.engines.splicer import TransformersSplicer

        return TransformersSplicer(settings)
    if kind == "reader":
        from stages.engines.reader import TransformersReader

        return TransformersReader(settings)
    from stages.engines.embedder import SentenceEmbedder

    return SentenceEmbedder(settings)


def _keep_memory() -> None:
    """Have glibc keep freed blocks instead of giving each large tensor's pages back to the kernel.

    Otherwise a third of the time of scoring in bfloat16 goes to page faults (measured on two cores:
    650 against 1,154 tokens/s). Elsewhere than on glibc nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def takes_calls_together(kind: str, settings: ModelSettings) -> bool:
    """Whether an engine takes calls while it computes others: its methods are coroutines."""
    return kind == "generator" and settings.engine == "vllm"


class LocalHandle:
    """An engine of this process behind awaitable methods.

    Calls of a plain method are taken one at a time, in a thread; those of a coroutine together.
    """

    def __init__(self, engine: Any, calls_in_flight: int = CALLS_IN_FLIGHT) -> None:
        """Wrap an engine; a coroutine has at most `calls_in_flight` calls under way."""
        self._engine = engine
        self._turn = asyncio.Lock()
        self._room = asyncio.Semaphore(calls_in_flight)

    def __getattr__(self, method: str) -> Any:
        """The engine's method, awaitable."""

        async def call(*args: Any, **kwargs: Any) -> Any:
            found = getattr(self._engine, method)
            if inspect.iscoroutinefunction(found):
                async with self._room:
                    return await found(*args, **kwargs)
            async with self._turn:
                return await asyncio.to_thread(found, *args, **kwargs)

        return call


def handle_of(engine: Any, settings: ModelSettings, calls_in_flight: int = CALLS_IN_FLIGHT) -> Any:
    """How a stage awaits an engine: an endpoint by itself, and any number of calls at once."""
    return LocalHandle(engine, calls_in_flight) if settings.endpoint is None else engine


@contextmanager
def opened(kind: str, settings: ModelSettings) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
    """An awaitable engine and its tokenizer, closed at the end."""
    engine = make_engine(kind, settings)
    try:
        yield LocalHandle(engine), load_tokenizer(settings)
    finally:
        engine.close()
