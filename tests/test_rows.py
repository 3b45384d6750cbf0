"""Identity of rows: the digest of their canonical JSON, however it is computed."""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from stages.rows import canonical_json, group_id, row_and_group_id, row_id

texts = st.text(max_size=20)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts},
    optional={
        "reasoning": st.none() | texts,
        "tool_calls": st.none() | texts,
        "name": st.none() | texts,
        "train": st.none() | st.booleans(),
    },
)


def digest(messages: list[Any], tools: str | None) -> str:
    turns = [{key: one for key, one in turn.items() if one is not None} for turn in messages]
    value = {"messages": turns} | ({} if tools is None else {"tools": tools})
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


@settings(max_examples=300)
@given(st.lists(turn, max_size=4), st.none() | texts)
def test_ids_are_digests_of_canonical_json(messages: list[Any], tools: str | None) -> None:
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    prompt = messages[:-1] if answered else messages
    assert row_id(messages, tools) == digest(messages, tools)
    assert group_id(messages, tools) == digest(prompt, tools)
    assert row_and_group_id(messages, tools) == (digest(messages, tools), digest(prompt, tools))
