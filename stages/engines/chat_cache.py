"""Replies of an endpoint, kept by content and shared between runs.

A reply is found by the hash of all that determines it: endpoint, model, messages, sampling, seed.
A failure is never kept: it is asked again by the next run. All requests of a call are handed to the
endpoint at once, which takes as many as it may, and replies are committed as they come, a chunk at
a time: a slow one holds up no other, and a kill loses those in flight and less than one chunk.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence

from stages.engines import Completion, Sampling
from stages.engines.chat import ChatFailure, ChatGenerator, ChatRequest
from stages.engines.completion_files import CompletionFiles
from stages.engines.spent import Spent
from stages.errors import EngineError
from stages.rows import canonical_json
from stages.storage import Store


class CachedChat:
    """A ChatGenerator that asks an endpoint only for what the cache doesn't hold.

    Attributes:
        spent: on this object's requests so far.
    """

    def __init__(self, chat: ChatGenerator, store: Store, identity: str, chunk: int) -> None:
        """Wrap an endpoint.

        Args:
            chat: the endpoint; it takes any number of calls at once.
            store: the cache.
            identity: of the endpoint and model; part of every key.
            chunk: replies that are committed together.
        """
        self._chat = chat
        self._files = CompletionFiles(store, identity)
        self._identity = identity
        self._chunk = chunk
        self.spent = Spent()

    async def chat(
        self, requests: Sequence[ChatRequest], sampling: Sampling
    ) -> list[Completion | ChatFailure]:
        """One reply a request, or why there is none, in input order.

        Raises:
            EngineError: the endpoint can't be used, or nothing answers there at all.
        """
        keys = [self._key(request, sampling) for request in requests]
        found = self._files.read(keys)
        missing = {key: one for key, one in zip(keys, requests, strict=True) if key not in found}
        asked = await self._asked(missing, sampling)
        down = [
            result
            for result in asked.values()
            if isinstance(result, ChatFailure) and result.code == "endpoint_down"
        ]
        if down and len(down) == len(asked):
            raise EngineError(
                f"the endpoint is down: {down[0].detail}, for each of {len(down)} requests; start "
                "it, or correct its base_url, and run again: what was answered before is kept"
            )
        return [found[key] if key in found else asked[key] for key in keys]

    async def _asked(
        self, missing: Mapping[str, ChatRequest], sampling: Sampling
    ) -> dict[str, Completion | ChatFailure]:
        """The endpoint's answers by key; replies are committed, whatever happens to others."""
        answers: dict[str, Completion | ChatFailure] = {}
        finished: dict[str, Completion] = {}

        async def ask(key: str, request: ChatRequest) -> None:
            (answer,) = await self._chat.chat([request], sampling)
            answers[key] = answer
            self._count(answer)
            if isinstance(answer, Completion):
                finished[key] = answer
            if len(finished) >= self._chunk:
                self._commit(finished)

        try:
            async with asyncio.TaskGroup() as group:
                for key, request in missing.items():
                    group.create_task(ask(key, request))
        except ExceptionGroup as failures:
            # The first failure cancels the rest; theirs say nothing more.
            raise failures.exceptions[0] from None
        finally:
            self._commit(finished)
        return answers

    def _commit(self, finished: dict[str, Completion]) -> None:
        if finished:
            self._files.write(finished)
            finished.clear()

    def _count(self, answer: Completion | ChatFailure) -> None:
        failed = isinstance(answer, ChatFailure)
        usage = None if isinstance(answer, ChatFailure) else answer.usage
        self.spent = self.spent.plus(Spent(1, int(failed), *(usage or (0, 0))))

    def _key(self, request: ChatRequest, sampling: Sampling) -> str:
        value = [
            self._identity,
            [[turn["role"], turn["content"]] for turn in request.messages],
            request.seed,
            sampling.max_new_tokens,
            sampling.temperature,
            sampling.top_p,
            sampling.schema,
        ]
        return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()
