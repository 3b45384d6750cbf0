"""Turns as records write them, and as rows have them.

Both dialects are read everywhere: OpenAI's `role`/`content` and ShareGPT's `from`/`value`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from stages.errors import RowError
from stages.rows import Message

END_MARKERS = (
    "<|endoftext|>",
    "<|im_end|>",
    "</s>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
)
"""What tokenizers print where a text ends; data sets made from printed text carry them."""

ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Roles as records name them, and our four."""

_CALLS = ("function_call", "tool_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")


class Turn(NamedTuple):
    """A turn, and the keys of its record that a row has no place for."""

    message: Message
    rest: dict[str, Any]


def turns_of(value: object, where: str) -> list[Turn]:
    """A conversation's turns.

    Args:
        value: a list of turns, or its JSON text (as CSV files hold it).
        where: the column, for messages.

    Raises:
        RowError: it is no list of turns, or a turn is empty or of an unknown role or type.
    """
    items = from_json(value, where)
    if not isinstance(items, list):
        raise RowError(f"wrong_type: {where} is not a list of turns")
    found = [_turn(item, f"{where}[{index}]") for index, item in enumerate(items)]
    # A blank system prompt says nothing; it isn't a lost turn as a blank question would be.
    return [turn for turn in found if not _is_blank_system(turn.message)]


def text_turn(role: str, text: object, where: str) -> Message:
    """A turn of plain text.

    Raises:
        RowError: the text isn't a string, or is blank.
    """
    if not isinstance(text, str):
        raise RowError(f"wrong_type: {where} is {type(text).__name__}, not text")
    if not text.strip():
        raise RowError(f"empty_turn: {where}")
    return {"role": role, "content": text}


def check_order(messages: Sequence[Message], needs_response: bool) -> None:
    """Refuse what no conversation is.

    Raises:
        RowError: there is no user turn, no response where one is needed, or turns are out of order.
    """
    roles = [turn["role"] for turn in messages]
    if "user" not in roles:
        raise RowError("missing_turn: there is no user turn")
    spoken = [role for role in roles if role != "system"]
    if spoken[0] != "user":
        raise RowError(f"bad_roles: the conversation starts with the {spoken[0]}")
    for before, role in itertools.pairwise(roles):
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError(f"bad_roles: a tool's turn after the {before}'s")
    if needs_response and roles[-1] != "assistant":
        raise RowError(f"no_assistant_turn: the conversation ends with the {roles[-1]}")


def without_end_markers(message: Message) -> tuple[Message, bool]:
    """An assistant turn without the end-of-text markers it ends with, and whether it had any.

    Raises:
        RowError: nothing else was in it.
    """
    if message["role"] != "assistant":
        return message, False
    text = _unmarked(message["content"])
    if text == message["content"]:
        return message, False
    if not text.strip() and not message.get("tool_calls"):
        raise RowError("empty_turn: the response is only an end-of-text marker")
    return {**message, "content": text}, True


def json_text(value: object, where: str) -> str:
    """Tool calls or definitions as JSON text, keys in their order: models see it as it was written.

    Raises:
        RowError: it is not JSON.
    """
    value = from_json(value, where)
    if not isinstance(value, (list, dict)):
        raise RowError(f"wrong_type: {where} is neither a JSON list nor an object")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RowError(f"unparsable: {where}: {error}") from error


def from_json(value: object, where: str) -> object:
    """The value of a JSON text; anything but a string as it is.

    Raises:
        RowError: the text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"wrong_type: {where} is text that is no JSON: {error}") from error


def _turn(item: object, where: str) -> Turn:
    if not isinstance(item, dict):
        raise RowError(f"wrong_type: {where} is {type(item).__name__}, not a turn")
    rest = {key: value for key, value in item.items() if value is not None}
    named = _one(rest, ("role", "from"), where)
    role = ROLE_NAMES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise RowError(f"bad_roles: {where} has the role {named!r}")
    content = _text(_one(rest, ("content", "value"), where), where)
    calls = _tool_calls(rest, where)
    if calls is None and named.strip().lower() in _CALLS:
        content, calls = "", _called(content, where)
    if not content.strip() and role != "system" and not (role == "assistant" and calls):
        raise RowError(f"empty_turn: {where}, of the {role}")
    message: Message = {"role": role, "content": content}
    reasoning = _one(rest, _REASONING, where)
    if reasoning is not None and not isinstance(reasoning, str):
        raise RowError(f"wrong_type: {where}: reasoning is {type(reasoning).__name__}, not text")
    if reasoning:
        message["reasoning"] = reasoning
    if calls is not None:
        message["tool_calls"] = calls
    if isinstance(rest.get("name"), str):
        message["name"] = rest.pop("name")
    train = _train(rest, where)
    if train is not None:
        message["train"] = train
    return Turn(message, rest)


def _one(rest: dict[str, Any], names: Sequence[str], where: str) -> Any:
    """The value under any of the names, all of which are taken out."""
    values = {name: rest.pop(name) for name in names if name in rest}
    found = list(values.values())
    if any(value != found[0] for value in found[1:]):
        raise RowError(f"ambiguous: {where}: {' and '.join(values)} differ")
    return found[0] if found else None


def _text(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"wrong_type: {where}: content is {type(content).__name__}, not text")
    return "".join(_part(part, where) for part in content)


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) else None
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in (None, "text", "input_text", "output_text") or not isinstance(text, str):
        raise RowError(f"wrong_type: {where}: a content part of type {kind}; only text is read")
    return text


def _tool_calls(rest: dict[str, Any], where: str) -> str | None:
    calls = rest.pop("tool_calls", None)
    old = rest.pop("function_call", None)
    if not calls and old:
        calls = [{"type": "function", "function": from_json(old, where)}]
    return json_text(calls, f"{where}: tool_calls") if calls else None


def _called(content: str, where: str) -> str:
    """ShareGPT's function_call turn: its text is the call."""
    value = from_json(content, where)
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError(f"wrong_type: {where}: a call without a name")
    return json_text([{"type": "function", "function": call} for call in calls], where)


def _train(rest: dict[str, Any], where: str) -> bool | None:
    given = {name: rest.pop(name) for name in ("train", "weight") if name in rest}
    for name, value in given.items():
        if value not in (0, 1):
            raise RowError(f"wrong_type: {where}: {name} is {value!r}, not 0 or 1")
    if len({bool(value) for value in given.values()}) > 1:
        raise RowError(f"ambiguous: {where}: train and weight differ")
    return next((bool(value) for value in given.values()), None)


def _is_blank_system(message: Message) -> bool:
    return message["role"] == "system" and not message["content"].strip()


def _unmarked(text: str) -> str:
    if not text.rstrip().endswith(END_MARKERS):
        return text
    # `<s>struck out</s>` is HTML, not the end of a text.
    markup = text.count("<s>") >= text.count("</s>") > 0
    markers = tuple(mark for mark in END_MARKERS if not (markup and mark == "</s>"))
    while True:
        bare = text.rstrip()
        found = next((mark for mark in markers if bare.endswith(mark)), None)
        if found is None:
            return text
        text = bare[: -len(found)]
