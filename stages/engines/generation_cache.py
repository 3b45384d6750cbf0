"""Generations, kept by content and shared between runs.

A completion is found by the hash of all that determines it: model, numerics, prompt ids, sampling,
seed. One file holds one chunk, written whole; chunks that were in flight at a kill are asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import cast

import pyarrow as pa

from stages.engines import Completion, GenerationRequest, Sampling, TextGenerator
from stages.rows import canonical_json
from stages.storage import Store

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("log_prob", pa.float64()),
    ]
)


class CachedGenerator:
    """A TextGenerator that asks its engine only for what the cache doesn't hold, chunk by chunk.

    All chunks are asked for at once: how many are in flight is for the engine's handle to say.
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
        folder = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
        self._store = store.child(folder)
        self._identity = identity
        self._chunk = chunk
        self._known: dict[str, str] | None = None

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        """One completion a request, in input order; a chunk is committed as soon as it is done."""
        keys = [self._key(request, sampling) for request in requests]
        found = self._read(keys)
        missing = [place for place, key in enumerate(keys) if key not in found]

        async def make(chunk: Sequence[int]) -> None:
            completions = await self._generator.generate([requests[i] for i in chunk], sampling)
            made = dict(zip((keys[i] for i in chunk), completions, strict=True))
            self._write(made)
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

    def _read(self, keys: Sequence[str]) -> dict[str, Completion]:
        if self._known is None:
            self._known = {
                key: name
                for name in self._store.names()
                if name.endswith(".parquet")
                for key in self._store.read_table(name, ["key"])["key"].to_pylist()
            }
        wanted = {key for key in keys if key in self._known}
        found: dict[str, Completion] = {}
        for name in sorted({self._known[key] for key in wanted}):
            for record in self._store.read_table(name).to_pylist():
                if record["key"] in wanted:
                    found[record["key"]] = Completion(
                        tuple(record["token_ids"]),
                        record["text"],
                        record["finish_reason"],
                        record["log_prob"],
                    )
        return found

    def _write(self, made: dict[str, Completion]) -> None:
        table = pa.Table.from_pylist(
            [
                {
                    "key": key,
                    "token_ids": completion.token_ids,
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "log_prob": completion.log_prob,
                }
                for key, completion in made.items()
            ],
            schema=_SCHEMA,
        )
        name = hashlib.blake2b("".join(made).encode(), digest_size=16).hexdigest() + ".parquet"
        self._store.write_table(name, table)
        known = cast("dict[str, str]", self._known)
        known.update(dict.fromkeys(made, name))
