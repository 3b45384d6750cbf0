"""What the teacher is asked. The wording is this project's own.

The row's texts go in as message content, which is encoded with special tokens disabled, so a row
can't forge a turn. Everything is in user turns: several chat templates refuse a system turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from stages.reflection.settings import Reply
from stages.rows import Message, instruction, response

PROMPTS_VERSION = 1
"""Raise it with the stage's version when a wording changes."""

Purpose = Literal["instruction", "answer", "response"]
"""Phase 1; phase 1's second call where the reply is `whole`; phase 2."""

INSTRUCTION_TAG, RESPONSE_TAG = "new_instruction", "new_response"
"""Names of the reply's parts: tags, or keys of the JSON object."""

_EXCHANGE = """\
Below is an exchange from a set of examples that an assistant learns from.
{earlier}
<instruction>
{instruction}
</instruction>

<response>
{response}
</response>

"""

_HARDER = """\
Judge the instruction in a few sentences: what does it leave vague, which knowledge and which \
steps of reasoning does it ask for, and is it too easy to teach much? Say how the response \
suffers from that.

Next, write one instruction on the same subject that states exactly what is wanted and takes more \
knowledge or reasoning to answer. Whoever reads it sees neither the old one nor its response\
{continues}. Then answer it yourself, correctly and in full.
"""

_BETTER = """\
Judge the response in a few sentences: is it correct, does it do all that the instruction asks, is \
anything missing, beside the point or hard to follow?

Next, write the response that should have been given to the same instruction, correct and \
complete, and no longer than it needs to be.
"""

_TAGGED = "\nEnd with this and nothing after it, each tag alone on its line and used once:\n\n"
_JSON = (
    "\nReply with one JSON object and nothing else. Its keys, in this order: "
    '"critique" (your judgement), {keys}.\n'
)

# A small model answers a text that it is asked to rewrite; after a few examples it rewrites it.
_WHOLE_INSTRUCTION = (
    "Task: {instruction}\n\nWrite a more demanding version of this task. Don't solve it."
)
_WHOLE_EARLIER = "Conversation so far:\n\n{turns}\n\n"
_EXAMPLES = (
    ("What is a river?", "Explain how a river forms, and name two things that change its course."),
    (
        "Write a thank-you note to a colleague.",
        "Write a thank-you note to a colleague who took over two of your shifts, in at most four "
        "sentences and without sounding formal.",
    ),
    (
        "A pen costs 3 euros. How much do 4 pens cost?",
        "A pen costs 3 euros and a notebook twice as much. How much do 4 pens and 2 notebooks cost "
        "together?",
    ),
)
_WHOLE_ANSWER = (
    "{instruction}\n\nGive a short answer, of at most three sentences or a few lines of code."
)
_WHOLE_RESPONSE = (
    "Improve your answer: make it correct, complete and clear. Keep it short and write only the "
    "improved answer."
)

_MEANINGS = {INSTRUCTION_TAG: "the instruction you wrote", RESPONSE_TAG: "your answer to it"}
_RESPONSE_MEANINGS = {RESPONSE_TAG: "the response you wrote"}
STAND_INS = (*_MEANINGS.values(), *_RESPONSE_MEANINGS.values())
"""What stands between the tags where the form of the reply is shown: copied, it is no answer."""


def instruction_prompt(messages: Sequence[Message], reply: Reply) -> list[Message]:
    """Phase 1: ask for a harder instruction and, but for `whole`, its response."""
    if reply == "whole":
        shown = [
            turn
            for task, harder in _EXAMPLES
            for turn in (_user(_WHOLE_INSTRUCTION.format(instruction=task)), _assistant(harder))
        ]
        asked = _WHOLE_INSTRUCTION.format(instruction=instruction(messages))
        turns = _transcript(messages)
        return [*shown, _user((_WHOLE_EARLIER.format(turns=turns) if turns else "") + asked)]
    continues = ", but sees the earlier turns" if _context(messages) else ""
    task = _HARDER.format(continues=continues)
    return [_user(_exchange(messages) + task + _form(reply, _MEANINGS))]


def answer_prompt(messages: Sequence[Message]) -> list[Message]:
    """Phase 1 with `whole` replies, second call: the new instruction itself, to be answered.

    It asks for brevity, since a small model otherwise goes on to the limit and is cut.
    """
    asked = _WHOLE_ANSWER.format(instruction=instruction(messages))
    return [*_context(messages), _user(asked)]


def response_prompt(messages: Sequence[Message], reply: Reply) -> list[Message]:
    """Phase 2: ask for a better response to the same instruction; the teacher sees the draft."""
    if reply == "whole":
        return [*messages, _user(_WHOLE_RESPONSE)]
    return [_user(_exchange(messages) + _BETTER + _form(reply, _RESPONSE_MEANINGS))]


def own_texts() -> list[str]:
    """Sentences of the prompts above, to be known again in a reply that repeats them.

    The tasks of the examples are among them: a small model may repeat one as its own.
    """
    prompts = (_EXCHANGE, _HARDER, _BETTER, _TAGGED, _JSON)
    whole = (_WHOLE_INSTRUCTION, _WHOLE_ANSWER, _WHOLE_RESPONSE)
    pieces = (
        piece.strip()
        for text in (*prompts, *whole, *(harder for _, harder in _EXAMPLES))
        for sentence in re.split(r"(?<=[.?!:])\s", text)
        for piece in re.split(r"\{\w+\}", sentence)
    )
    return [piece for piece in pieces if len(piece) >= 30]


def _exchange(messages: Sequence[Message]) -> str:
    """The row as a transcript: system turn and earlier turns, the instruction, the response."""
    turns = _transcript(messages)
    return _EXCHANGE.format(
        earlier=f"\n<earlier_turns>\n{turns}\n</earlier_turns>\n" if turns else "",
        instruction=instruction(messages),
        response=response(messages),
    )


def _transcript(messages: Sequence[Message]) -> str:
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in _context(messages))


def _form(reply: Reply, meanings: dict[str, str]) -> str:
    """How the reply must look."""
    if reply == "json":
        keys = ", ".join(f'"{name}" ({meaning})' for name, meaning in meanings.items())
        return _JSON.format(keys=keys)
    return _TAGGED + "\n".join(
        f"<{name}>\n{meaning}\n</{name}>" for name, meaning in meanings.items()
    )


def _context(messages: Sequence[Message]) -> list[Message]:
    """The turns before the instruction, which the response follows directly."""
    return list(messages[:-2])


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
