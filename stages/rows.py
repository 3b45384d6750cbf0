"""What a row is: its Arrow schema, its identity, and the views of it that stages use.

A row is one conversation whose last turn is the assistant's. Its *response* is that turn, its
*prompt* everything before, its *instruction* the last user turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NotRequired, TypedDict, cast

import orjson
import pyarrow as pa
import pyarrow.compute as pc

ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    """One turn. `tool_calls` is JSON text; `train` is the loss mask (None: assistant turns)."""

    role: str
    content: str
    reasoning: NotRequired[str | None]
    tool_calls: NotRequired[str | None]
    name: NotRequired[str | None]
    train: NotRequired[bool | None]


MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("reasoning", pa.string()),
            ("tool_calls", pa.string()),
            ("name", pa.string()),
            ("train", pa.bool_()),
        ]
    )
)

LABEL = pa.dictionary(pa.int32(), pa.string())

ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("source", LABEL),
        ("messages", MESSAGES),
        ("tools", pa.string()),
        ("answer", pa.string()),
        ("license", pa.string()),
        ("extra", pa.string()),
        ("file", pa.string()),
        ("record", pa.int64()),
    ]
)
"""Columns of an ingested row, in order (see docs/data-format.md)."""

TARGETS = ROWS.append(pa.field("task", LABEL))
"""A target row is a row with the name of its task; its last turn may be the user's."""

REJECTS = pa.schema(
    [
        ("source", pa.string()),
        ("file", pa.string()),
        ("record", pa.int64()),
        ("id", pa.string()),
        ("reason", pa.string()),
        ("kept", pa.string()),
        ("overlap", pa.string()),
        ("raw", pa.string()),
    ]
)
"""A record that is no row of the run, with the reason and its text (cut at 10,000 characters).

`id` is null where the record is no row at all; `kept` is the row that stays in a duplicate's place,
and so the name of its cluster (of an exact duplicate the row that it equals, which may be a near
duplicate in turn); `overlap` the words that it shares with a target or evaluation set.
"""

OK = "ok"
NOT_REQUESTED = "not_requested"


def status_field(stage: str) -> pa.Field:
    """The status column of a row stage: `ok`, `not_requested`, or `failed: REASON`."""
    return pa.field(f"{stage}_status", LABEL)


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: one text per value.

    Raises:
        ValueError: the value holds NaN or infinity.
    """
    return json.dumps(
        value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
    )


def row_id(messages: Sequence[Message], tools: str | None) -> str:
    """BLAKE2b-128 of the canonical JSON of messages and tools, nulls left out; 32 hex digits."""
    return _digest(_turns(messages), tools)


def group_id(messages: Sequence[Message], tools: str | None) -> str:
    """The same digest over the prompt alone: several responses to one prompt share it."""
    return _digest(_turns(prompt(messages)), tools)


def row_and_group_id(messages: Sequence[Message], tools: str | None) -> tuple[str, str]:
    """Both at once, in little more time than one."""
    turns = _turns(messages)
    return _digest(turns, tools), _digest(turns[: len(prompt(messages))], tools)


def prompt(messages: Sequence[Message]) -> Sequence[Message]:
    """Everything before the response (all turns where the last isn't the assistant's)."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def response(messages: Sequence[Message]) -> str | None:
    """The last turn's text where it is the assistant's, else None."""
    if not messages or messages[-1]["role"] != "assistant":
        return None
    return messages[-1]["content"]


def instruction(messages: Sequence[Message]) -> str | None:
    """The last user turn's text, or None where there is none."""
    return next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), None)


def with_turns(
    messages: Sequence[Message], *, instruction: str | None = None, response: str | None = None
) -> list[Message]:
    """The conversation with its last user turn and/or its response replaced."""
    turns = [cast(Message, dict(turn)) for turn in messages]
    if response is not None:
        turns[-1]["content"] = response
        turns[-1].pop("reasoning", None)
    if instruction is not None:
        last_user = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
        turns[last_user]["content"] = instruction
    return turns


def messages_of(table: pa.Table, column: str = "messages") -> list[list[Message] | None]:
    """A messages column as Python lists of turns."""
    return cast("list[list[Message] | None]", table[column].to_pylist())


def effective_messages(table: pa.Table) -> pa.ChunkedArray:
    """coalesce(messages_reflected, messages): the text that would be emitted."""
    if "messages_reflected" not in table.column_names:
        return table["messages"]
    rewritten = pc.is_valid(table["messages_reflected"])
    return pc.if_else(rewritten, table["messages_reflected"], table["messages"])


def key_hash(row: str, seed: int) -> int:
    """A 64-bit hash of a row id and a seed: the order in which limits and samples take rows."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _turns(messages: Sequence[Message]) -> list[bytes]:
    """Each turn's canonical JSON, nulls left out."""
    # Of text and booleans orjson writes what `canonical_json` does, in a fifth of the time.
    return [
        orjson.dumps(
            {key: value for key, value in turn.items() if value is not None},
            option=orjson.OPT_SORT_KEYS,
        )
        for turn in messages
    ]


def _digest(turns: Sequence[bytes], tools: str | None) -> str:
    text = b'{"messages":[' + b",".join(turns) + b"]"
    if tools is not None:
        text += b',"tools":' + orjson.dumps(tools)
    return hashlib.blake2b(text + b"}", digest_size=16).hexdigest()
