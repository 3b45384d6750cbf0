"""The files of a cache of completions: written whole, found by key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from stages.engines import Completion, Usage
from stages.storage import Store

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("log_prob", pa.float64()),
        ("prompt_tokens", pa.int64()),
        ("generated_tokens", pa.int64()),
        ("end_id", pa.int32()),
    ]
)


class CompletionFiles:
    """Completions of one model, by the keys of their requests."""

    def __init__(self, store: Store, identity: str) -> None:
        """Name the folder.

        Args:
            store: the cache.
            identity: of the model and all else that every key depends on.
        """
        self._store = store.child(hashlib.blake2b(identity.encode(), digest_size=12).hexdigest())
        self._known: dict[str, str] | None = None

    def read(self, keys: Sequence[str]) -> dict[str, Completion]:
        """The completions that are there, by key."""
        files = self._files()
        wanted = {key for key in keys if key in files}
        found: dict[str, Completion] = {}
        for name in sorted({files[key] for key in wanted}):
            for record in self._store.read_table(name).to_pylist():
                if record["key"] in wanted:
                    found[record["key"]] = _completion(record)
        return found

    def write(self, made: Mapping[str, Completion]) -> None:
        """Keep completions together in one file."""
        table = pa.Table.from_pylist(
            [{"key": key, **_values(completion)} for key, completion in made.items()],
            schema=_SCHEMA,
        )
        name = hashlib.blake2b("".join(made).encode(), digest_size=16).hexdigest() + ".parquet"
        self._store.write_table(name, table)
        self._files().update(dict.fromkeys(made, name))

    def _files(self) -> dict[str, str]:
        """The file that each key is in, as far as it was there when first asked."""
        if self._known is None:
            self._known = {
                key: name
                for name in self._store.names()
                if name.endswith(".parquet")
                for key in self._store.read_table(name, ["key"])["key"].to_pylist()
            }
        return self._known


def _values(completion: Completion) -> dict[str, Any]:
    usage = completion.usage
    return {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "log_prob": completion.log_prob,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "generated_tokens": usage.generated_tokens if usage else None,
        "end_id": completion.end_id,
    }


def _completion(record: Mapping[str, Any]) -> Completion:
    # Files of earlier versions have no counts of tokens, or no end.
    prompt, generated = record.get("prompt_tokens"), record.get("generated_tokens")
    usage = None if prompt is None or generated is None else Usage(prompt, generated)
    return Completion(
        tuple(record["token_ids"]),
        record["text"],
        record["finish_reason"],
        record["log_prob"],
        usage,
        record.get("end_id"),
    )
