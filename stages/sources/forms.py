"""From a record to turns: one small function a form.

| form              | columns                                                      |
| ----------------- | ------------------------------------------------------------ |
| messages          | messages                                                     |
| sharegpt          | conversations                                                |
| alpaca            | instruction, input, output or response, history              |
| prompt_completion | prompt, completion or response (text or lists of turns)      |
| question_answer   | question, answer                                             |
| problem_solution  | problem, solution                                            |
| columns           | those of the source's column map                             |

Every form but `columns` also takes `system`, `tools` and, where the name is free, `answer` (a
reference answer); all take `license` (`licence`, `licenses`, `licences`). All other columns, and
keys of a turn that a row has no place for, go to `extra` as they are. A record that cannot be a row
raises `RowError` with a reason of `reasons.REASONS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stages.errors import RowError
from stages.licenses import UNKNOWN, joined_licenses
from stages.rows import Message, canonical_json
from stages.sources.answers import extract_answer
from stages.sources.settings import Form, Source, Target
from stages.sources.turns import (
    Turn,
    check_order,
    from_json,
    json_text,
    text_turn,
    turns_of,
    without_end_markers,
)

FORM_COLUMNS: dict[Form, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages",), "answer": ("answer",)},
    "sharegpt": {"messages": ("conversations",), "answer": ("answer",)},
    "alpaca": {
        "prompt": ("instruction",),
        "input": ("input",),
        "response": ("output", "response"),
        "history": ("history",),
        "answer": ("answer",),
    },
    "prompt_completion": {
        "prompt": ("prompt",),
        "response": ("completion", "response"),
        "answer": ("answer",),
    },
    "question_answer": {"prompt": ("question",), "response": ("answer",)},
    "problem_solution": {
        "prompt": ("problem",),
        "response": ("solution",),
        "answer": ("answer",),
    },
}
"""Columns of each form by our field; of several, any."""

_LICENSE = ("license", "licence", "licenses", "licences")
_SHARED = {"system": ("system",), "tools": ("tools",), "license": _LICENSE}
_COLUMNS = {form: {**_SHARED, **columns} for form, columns in FORM_COLUMNS.items()}
_TABLES: tuple[Form, ...] = ("alpaca", "prompt_completion", "question_answer", "problem_solution")


class Parsed(NamedTuple):
    """What a record says.

    Attributes:
        messages: its turns, null fields left out.
        tools: tool definitions as JSON.
        answer: the reference answer.
        license: the record's own licence, else the source's.
        extra: its other columns as canonical JSON.
        end_markers: whether end-of-text markers were stripped from its responses.
        task: a target's task where the record names it.
    """

    messages: list[Message]
    tools: str | None = None
    answer: str | None = None
    license: str | None = None
    extra: str | None = None
    end_markers: bool = False
    task: str | None = None


def detect_form(record: Mapping[str, Any]) -> Form | None:
    """The form whose columns a record has: conversations first, then forms that are complete.

    A prompt without a response (a target, or a preference pair) has a form as well.
    """
    filled = {name for name, value in record.items() if value is not None}
    if "messages" in filled:
        return "messages"
    if "conversations" in filled:
        return "sharegpt"
    prompted = [form for form in _TABLES if filled & set(FORM_COLUMNS[form]["prompt"])]
    complete = [form for form in prompted if filled & set(FORM_COLUMNS[form]["response"])]
    if complete or prompted:
        return (complete or prompted)[0]
    return "messages" if _is_conversation(record.get("chosen")) else None


def parse(record: Mapping[str, Any], source: Source, *, answered: bool | None = None) -> Parsed:
    """A record as turns, by the source's form or column map.

    Args:
        record: its columns.
        source: what the recipe says.
        answered: whether it must have a response; unset: all but a `Target`'s must.

    Raises:
        RowError: the record cannot be a row; the text is the reason.
    """
    form = source.form
    if form == "auto":
        form = "columns" if source.columns else (detect_form(record) or "auto")
    if answered is None:
        answered = not isinstance(source, Target)
    fields = _Fields(record, form, source, answered)
    _refuse_bad_label(record, source)
    chosen = _chosen(fields, source)
    if form == "auto":
        raise RowError(f"unknown_form: columns {', '.join(map(str, record)) or '(none)'}")
    if _is_conversation(chosen):
        turns = turns_of(chosen, "chosen")
    elif "messages" in fields.names:
        turns = _conversation(fields, chosen)
    else:
        turns = _from_columns(fields, chosen)
    messages = _with_system([turn.message for turn in turns], fields)
    check_order(messages, needs_response=answered)
    stripped = [without_end_markers(message) for message in messages]
    messages = [message for message, _ in stripped]
    fields.rest_of(turns)
    parsed = Parsed(
        messages=messages,
        tools=_tools(fields),
        answer=_answer(fields, messages, source),
        license=_license(fields) or source.license,
        task=_task(fields, source),
        extra=fields.extra(),
        end_markers=any(marked for _, marked in stripped),
    )
    _refuse_bad_unicode(parsed)
    return parsed


class _Fields:
    """A record's columns by our field names, and which of them were used."""

    def __init__(
        self, record: Mapping[str, Any], form: Form, source: Source, answered: bool
    ) -> None:
        self.record = record
        self.answered = answered
        self.is_mapped = form == "columns"
        self.names: Mapping[str, tuple[str, ...]] = {}
        if self.is_mapped:
            mapped: dict[str, tuple[str, ...]] = {
                field: (name,) for field, name in (source.columns or {}).items()
            }
            # A record's own licence binds whether or not the map thinks of it.
            free = tuple(name for name in _LICENSE if (name,) not in mapped.values())
            self.names = {"license": free, **mapped}
        elif form != "auto":
            self.names = _COLUMNS[form]
        self._used: set[str] = set()
        self._rest: dict[str, Any] = {}

    def column(self, field: str) -> str:
        """The column that holds a field, for messages."""
        names = self.names.get(field, (field,))
        if len(names) == 1:
            return names[0]
        return next((name for name in names if self.record.get(name) is not None), names[0])

    def take(self, field: str) -> Any:
        """A field's value; None where no column holds one.

        Raises:
            RowError: two columns hold it and differ.
        """
        names = self.names.get(field)
        if not names:
            return None
        if len(names) == 1:
            self._used.add(names[0])
            return self.record.get(names[0])
        filled = [name for name in names if self.record.get(name) is not None]
        if any(self.record[name] != self.record[filled[0]] for name in filled[1:]):
            raise RowError(f"ambiguous: {' and '.join(filled)} differ")
        self._used.update(name for name in names if name in self.record)
        return self.record[filled[0]] if filled else None

    def take_column(self, name: str) -> Any:
        """A column's value by the record's own name; None where it isn't there."""
        self._used.add(name)
        return self.record.get(name)

    def give_back(self, field: str) -> None:
        """Keep a field's columns in `extra` after all."""
        self._used.difference_update(self.names.get(field, ()))

    def rest_of(self, turns: Sequence[Turn]) -> None:
        """Keep the keys of turns that rows have no place for, a list with one object a turn."""
        if any(turn.rest for turn in turns):
            self._rest["turns"] = [turn.rest for turn in turns]

    def extra(self) -> str | None:
        """All other columns as canonical JSON.

        Raises:
            RowError: a value is not JSON.
        """
        rest = {name: one for name, one in self.record.items() if name not in self._used}
        for name, value in self._rest.items():
            free = name
            while free in rest:
                free = f"_{free}"
            rest[free] = value
        if not rest:
            return None
        try:
            return canonical_json(rest)
        except (ValueError, TypeError, RecursionError) as error:
            raise RowError(f"unparsable: a column is no JSON: {error}") from error


# Forms


def _conversation(fields: _Fields, chosen: object) -> list[Turn]:
    where = fields.column("messages")
    value = fields.take("messages")
    if value is None:
        raise RowError(f"missing_turn: {where} is missing")
    turns = turns_of(value, where)
    if not turns:
        raise RowError(f"missing_turn: {where} is empty")
    if chosen is None:
        return turns
    if turns[-1].message["role"] == "assistant":
        raise RowError("ambiguous: the conversation ends with a response, and chosen is another")
    return [*turns, *_response_turns(chosen, "chosen")]


def _from_columns(fields: _Fields, chosen: object) -> list[Turn]:
    turns = [*_history(fields), *_prompt(fields)]
    where = fields.column("response")
    response = fields.take("response")
    if chosen is not None:
        if response not in (None, chosen):
            raise RowError(f"ambiguous: {where} and chosen differ")
        response, where = chosen, "chosen"
    if not fields.answered and (response is None or _is_blank(response)):
        return turns
    if response is None:
        raise RowError(f"no_assistant_turn: {where} is missing")
    return [*turns, *_response_turns(response, where)]


def _prompt(fields: _Fields) -> list[Turn]:
    where = fields.column("prompt")
    value = fields.take("prompt")
    added = fields.take("input")
    if added is not None and not isinstance(added, str):
        raise RowError(f"wrong_type: {fields.column('input')} is not text")
    added = "" if _is_blank(added) else added
    if value is None and not added:
        raise RowError(f"missing_turn: {where} is missing")
    if isinstance(value, list) and not added:
        if not fields.answered and value and all(isinstance(one, str) for one in value):
            # The later questions depend on answers that nobody gave yet: they stay in `extra`.
            fields.give_back("prompt")
            return [Turn(text_turn("user", value[0], f"{where}[0]"), {})]
        turns = turns_of(value, where)
        if not turns:
            raise RowError(f"missing_turn: {where} is empty")
        return turns
    if added and (value is None or _is_blank(value)):
        return [Turn(text_turn("user", added, fields.column("input")), {})]
    turn = text_turn("user", value, where)
    if added:
        turn["content"] = f"{turn['content']}\n\n{added}"
    return [Turn(turn, {})]


def _history(fields: _Fields) -> list[Turn]:
    value = fields.take("history")
    if not value:
        return []
    where = fields.column("history")
    pairs = from_json(value, where)
    if not isinstance(pairs, list):
        raise RowError(f"wrong_type: {where} is not a list of pairs")
    turns = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(f"wrong_type: {where}[{index}] is not a pair of question and answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Turn(text_turn(role, text, f"{where}[{index}]"), {}))
    return turns


def _response_turns(value: object, where: str) -> list[Turn]:
    if isinstance(value, (list, dict)):
        turns = turns_of(value if isinstance(value, list) else [value], where)
        if not turns or turns[0].message["role"] != "assistant":
            raise RowError(f"no_assistant_turn: {where} doesn't start with the assistant")
        return turns
    return [Turn(text_turn("assistant", value, where), {})]


# What every form has


def _with_system(messages: list[Message], fields: _Fields) -> list[Message]:
    text = fields.take("system")
    if _is_blank(text):
        return messages
    where = fields.column("system")
    turn = text_turn("system", text, where)
    if messages[0]["role"] != "system":
        return [turn, *messages]
    if messages[0]["content"] != text:
        raise RowError(f"ambiguous: {where} and the system turn differ")
    return messages


def _tools(fields: _Fields) -> str | None:
    value = fields.take("tools")
    if _is_blank(value):
        return None
    text = json_text(value, fields.column("tools"))
    return None if text in ("[]", "{}") else text


def _answer(fields: _Fields, messages: Sequence[Message], source: Source) -> str | None:
    value = fields.take("answer")
    if isinstance(value, str):
        if value.strip():
            return value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        return json.dumps(value)
    elif value is not None:
        if fields.is_mapped:
            raise RowError(f"wrong_type: {fields.column('answer')} is neither text nor a number")
        fields.give_back("answer")
    if source.answer_pattern is None or messages[-1]["role"] != "assistant":
        return None
    return extract_answer(messages[-1]["content"], source.answer_pattern)


def _license(fields: _Fields) -> str | None:
    """What the record states: all of a list bind it, and an object's name counts."""
    value = fields.take("license")
    if _is_blank(value):
        return None
    where = fields.column("license")
    stated = value
    if isinstance(value, str):
        try:
            stated = from_json(value, where)
        except RowError:
            return value
    if isinstance(value, str) and not isinstance(stated, (list, dict)):
        return value
    fields.give_back("license")
    several = stated if isinstance(stated, list) else [stated]
    return joined_licenses([_license_text(one, where) for one in several]) or None


def _license_text(value: object, where: str) -> str:
    if isinstance(value, dict):
        names = ("spdx_id", "spdx", "id", "name", "title", "type", "url")
        value = next((value[name] for name in names if not _is_blank(value.get(name))), value)
    if _is_blank(value):
        return UNKNOWN
    if not isinstance(value, str):
        raise RowError(f"wrong_type: {where} holds {type(value).__name__}, which names no licence")
    return value


def _task(fields: _Fields, source: Source) -> str | None:
    if not isinstance(source, Target) or source.task_column is None:
        return None
    value = fields.take_column(source.task_column)
    if isinstance(value, str) and value.strip():
        return value
    raise RowError(f"no_task: {source.task_column} holds no name")


def _refuse_bad_label(record: Mapping[str, Any], source: Source) -> None:
    if "label" in (source.columns or {}).values():
        return
    label = record.get("label")
    # CSV files hold text only.
    if label is False or (isinstance(label, str) and label.strip().lower() == "false"):
        raise RowError("bad_label: label is false")


def _chosen(fields: _Fields, source: Source) -> object:
    if fields.record.get("chosen") is None and fields.record.get("rejected") is None:
        return None
    if source.preference is None:
        raise RowError("preference_pair: chosen and rejected, and the source doesn't say which")
    chosen = fields.take_column("chosen")
    if chosen is None:
        raise RowError("no_assistant_turn: chosen is missing")
    return chosen


def _is_conversation(value: object) -> bool:
    """Whether a value is turns that start before the response."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    role = value[0].get("role", value[0].get("from"))
    return role in ("system", "developer", "user", "human")


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _refuse_bad_unicode(parsed: Parsed) -> None:
    texts: list[str] = [parsed.tools or "", parsed.answer or "", parsed.license or ""]
    texts += [parsed.extra or "", parsed.task or ""]
    for message in parsed.messages:
        texts += [value for value in message.values() if isinstance(value, str)]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise RowError(f"invalid_unicode: holds U+{ord(found):04X}, half a character") from error
