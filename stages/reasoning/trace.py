"""Where a response's chain of thought is."""

from __future__ import annotations

from stages.rows import Message

_OPEN, _CLOSE = "<think>", "</think>"


def chain_of_thought(turn: Message) -> str:
    """The reasoning behind an assistant turn, without surrounding white space.

    It is the turn's `reasoning` where that has text; else what its content holds before the first
    `</think>` (the opening tag may be missing, since many chat templates write it in the prompt);
    else the whole content, which may be reasoning that was cut before the tag closed.
    """
    kept_apart = (turn.get("reasoning") or "").strip()
    if kept_apart:
        return kept_apart
    thought, _, _ = turn["content"].partition(_CLOSE)
    return thought.strip().removeprefix(_OPEN).strip()
