"""What a model is asked: a row's prompt, and what is asked for beside it."""

from __future__ import annotations

from collections.abc import Sequence

from stages.errors import RowError
from stages.rows import Message, instruction, prompt, with_turns


def question(messages: Sequence[Message], request: str | None) -> list[Message]:
    """The turns before the response, the request added to the last user turn after a blank line.

    Raises:
        RowError: there is no user turn.
    """
    turns = prompt(messages)
    asked = instruction(turns)
    if asked is None:
        raise RowError("no_instruction: the conversation has no user turn")
    return with_turns(turns, instruction=f"{asked}\n\n{request}" if request else asked)
