"""Engines in this process: how they are made, and how a stage awaits them."""

from __future__ import annotations

import asyncio
import ctypes
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


class LocalHandle:
    """An engine of this process behind awaitable methods; calls are taken one at a time."""

    def __init__(self, engine: Any) -> None:
        """Wrap an engine."""
        self._engine = engine
        self._turn = asyncio.Lock()

    def __getattr__(self, method: str) -> Any:
        """The engine's method, run in a thread."""

        async def call(*args: Any, **kwargs: Any) -> Any:
            async with self._turn:
                return await asyncio.to_thread(getattr(self._engine, method), *args, **kwargs)

        return call


@contextmanager
def opened(kind: str, settings: ModelSettings) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
    """An awaitable engine and its tokenizer, closed at the end."""
    engine = make_engine(kind, settings)
    try:
        yield LocalHandle(engine), load_tokenizer(settings)
    finally:
        engine.close()
