"""Generations, kept by content and shared between runs.

A completion is found by the hash of all that determines it: model, numerics, prompt ids, sampling,
seed. One file holds one chunk, written whole; chunks that were in flight at a kill are asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from stages.engines import Completion, GenerationRequest, Sampling, TextGenerator
from stages.engines.completion_files import CompletionFiles
from stages.engines.spent import Spent
from stages.rows import canonical_json
from stages.storage import Store


class CachedGenerator:
    """A TextGenerator that asks its engine only for what the cache doesn't hold, chunk by chunk.

    All chunks are asked for at once: how many are in flight is for the engine's handle to say.

    Attributes:
        spent: on this object's requests so far.
    """

    def __init__(self, generator: TextGenerator, store: Store, identity: str, chunk: int) -> None:
        """Wrap a generator.

        Args:
            generator: the engine.
            store: the cache.
            identity: of the model and its numerics; part of every key.
            chunk: prompts that are generated, and committed, together.
        """
        self._generator = generator
        self._files = CompletionFiles(store, identity)
        self._identity = identity
        self._chunk = chunk
        self.spent = Spent()

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        """One completion a request, in input order; a chunk is committed as soon as it is done."""
        keys = [self._key(request, sampling) for request in requests]
        found = self._files.read(keys)
        missing = [place for place, key in enumerate(keys) if key not in found]

        async def make(chunk: Sequence[int]) -> None:
            asked = [requests[i] for i in chunk]
            completions = await self._generator.generate(asked, sampling)
            read = sum(len(request.prompt) for request in asked)
            written = sum(len(one.token_ids) for one in completions)
            self.spent = self.spent.plus(Spent(len(asked), 0, read, written))
            made = dict(zip((keys[i] for i in chunk), completions, strict=True))
            self._files.write(made)
            found.update(made)

        try:
            async with asyncio.TaskGroup() as group:
                for start in range(0, len(missing), self._chunk):
                    group.create_task(make(missing[start : start + self._chunk]))
        except ExceptionGroup as failures:
            # The first failure cancels the rest; theirs say nothing more.
            raise failures.exceptions[0] from None
        return [found[key] for key in keys]

    def _key(self, request: GenerationRequest, sampling: Sampling) -> str:
        value = [
            self._identity,
            list(request.prompt),
            request.seed,
            sampling.max_new_tokens,
            sampling.temperature,
            sampling.top_p,
            *([] if sampling.schema is None else [sampling.schema]),
        ]
        return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()
