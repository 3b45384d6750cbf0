"""The forms in which a conversation is written; a data set holds exactly one of them.

Sub-fields of a turn that are null in every row are left out, so that chat templates don't see them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.emission.settings import Form
from stages.errors import StageError
from stages.rows import MESSAGES, Message

_HISTORY = pa.list_(pa.list_(pa.string()))


@dataclass(frozen=True)
class Layout:
    """The columns that hold a conversation: the same in every shard.

    Attributes:
        form: messages, prompt_completion or alpaca.
        turn: fields of a turn.
        optional: Alpaca columns that some row fills, of `system` and `history`.
    """

    form: Form
    turn: tuple[str, ...]
    optional: tuple[str, ...] = field(default=())

    @property
    def fields(self) -> list[tuple[str, pa.DataType]]:
        """Names and types of the columns."""
        turns = narrow_type(self.turn)
        if self.form == "messages":
            return [("messages", turns)]
        if self.form == "prompt_completion":
            return [("prompt", turns), ("completion", turns)]
        kinds = {"system": pa.string(), "history": _HISTORY}
        plain = [(name, pa.string()) for name in ("instruction", "input", "output")]
        return plain + [(name, kinds[name]) for name in self.optional]

    def write(self, messages: pa.Array) -> list[pa.Array]:
        """The columns for these conversations, in the order of `fields`."""
        if self.form == "messages":
            return [messages.cast(narrow_type(self.turn))]
        if self.form == "prompt_completion":
            return list(_split(messages.cast(narrow_type(self.turn))))
        rows = [_alpaca(turns) or {} for turns in messages.to_pylist()]
        return [pa.array([row.get(name) for row in rows], kind) for name, kind in self.fields]


def narrow_type(turn: Sequence[str]) -> pa.DataType:
    """The type of a conversation whose turns have these fields."""
    return pa.list_(pa.struct([MESSAGES.value_type.field(name) for name in turn]))


def used_fields(chunks: Iterable[pa.ChunkedArray | pa.Array]) -> tuple[str, ...]:
    """Fields of a turn that some turn fills; always role and content."""
    used = {"role", "content"}
    for chunk in chunks:
        turns = pc.list_flatten(chunk)
        for name in MESSAGES.value_type.names:
            if name not in used and len(turns):
                values = pc.struct_field(turns, name)
                if values.null_count < len(values):
                    used.add(name)
    return tuple(name for name in MESSAGES.value_type.names if name in used)


def plan_layout(form: Form, chunks: Sequence[pa.Table]) -> Layout:
    """The layout that holds all these rows.

    Args:
        form: as in the settings.
        chunks: emitted rows, with columns `id`, `effective` and perhaps `tools`.

    Raises:
        StageError: rows don't fit Alpaca's columns, which hold alternating text turns only.
    """
    turn = used_fields(chunk["effective"] for chunk in chunks)
    if form != "alpaca":
        return Layout(form, turn)
    used: set[str] = set()
    misfits: list[str] = []
    for chunk in chunks:
        tools = chunk["tools"].to_pylist() if "tools" in chunk.column_names else []
        for i, turns in enumerate(chunk["effective"].to_pylist()):
            row = _alpaca(turns)
            if row is None or (tools and tools[i] is not None):
                misfits.append(chunk["id"][i].as_py())
            else:
                used |= {name for name in ("system", "history") if row[name] is not None}
    if misfits:
        raise StageError(
            f"emission: {len(misfits):,} rows (as {misfits[0]}) have tools, reasoning, loss masks "
            "or turns that don't alternate, which Alpaca columns can't hold; use "
            "`format: messages`, or drop these rows in selection",
            stage="emission",
        )
    return Layout(form, turn, tuple(name for name in ("system", "history") if name in used))


def _alpaca(turns: list[Message]) -> dict[str, Any] | None:
    """One row in Alpaca columns, or None where something would be lost."""
    for turn in turns:
        plain = (turn.get(name) is None for name in ("reasoning", "tool_calls", "name", "train"))
        if not all(plain):
            return None
    system = turns[0]["content"] if turns[0]["role"] == "system" else None
    talk = turns if system is None else turns[1:]
    if len(talk) < 2 or [turn["role"] for turn in talk] != ["user", "assistant"] * (len(talk) // 2):
        return None
    texts = [turn["content"] for turn in talk]
    pairs = [texts[i : i + 2] for i in range(0, len(texts) - 2, 2)]
    return {
        "instruction": texts[-2],
        "input": "",
        "output": texts[-1],
        "system": system,
        "history": pairs or None,
    }


def _split(messages: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Conversations cut before their last turn."""
    lengths = pc.list_value_length(messages).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(lengths)
    turns = messages.flatten()
    before = np.ones(len(turns), dtype=bool)
    before[ends - 1] = False
    offsets = np.concatenate([[0], np.cumsum(lengths - 1)])
    prompts = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), turns.filter(before))
    last = turns.take(pa.array(ends - 1))
    counts = pa.array(np.arange(len(messages) + 1), pa.int32())
    return prompts.cast(messages.type), pa.ListArray.from_arrays(counts, last).cast(messages.type)
