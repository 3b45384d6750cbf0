"""From a teacher's reply to a rewrite: one well-formed answer, or a failure with a code.

Nothing is guessed. A reply that was cut, that holds two answers, or of which a part is missing is
a failure, and a failure keeps the whole original: a new instruction beside the old response would
have a high IFD for the wrong reason.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NamedTuple

from stages.engines import FinishReason
from stages.engines.chat import ChatCode
from stages.reflection.prompts import INSTRUCTION_TAG, RESPONSE_TAG, Prompts, squeezed
from stages.reflection.settings import Form
from stages.words import words

FailureCode = (
    ChatCode
    | Literal[
        "truncated",
        "unclear_thinking",
        "missing_tag",
        "repeated_tag",
        "invalid_json",
        "empty",
        "placeholder",
        "copied_prompt",
        "unchanged",
    ]
)


class Rewrite(NamedTuple):
    """An instruction and the response to it."""

    instruction: str
    response: str


class ParseFailure(NamedTuple):
    """Why there is no rewrite: what the reply lacks, or why there is none (`ChatCode`)."""

    code: FailureCode
    detail: str


def parse_instruction_reply(
    text: str,
    finish_reason: FinishReason,
    reply: Literal["tagged", "json"],
    original: Rewrite,
    prompts: Prompts,
) -> Rewrite | ParseFailure:
    """Phase 1: a new instruction and its response, both or neither.

    Args:
        text: the teacher's reply.
        finish_reason: why it ended; `length` is a failure in every form.
        reply: the form that was asked for (`whole` takes two calls, see the functions below).
        original: what the teacher was shown.
        prompts: what it was asked with.
    """
    parts = _parts(text, finish_reason, reply, (INSTRUCTION_TAG, RESPONSE_TAG), prompts)
    if isinstance(parts, ParseFailure):
        return parts
    new = Rewrite(*parts)
    return (
        _unlike(new.instruction, original.instruction)
        or _no_echo(new.response, new.instruction)
        or new
    )


def parse_whole_instruction(
    text: str, finish_reason: FinishReason, original: Rewrite, prompts: Prompts
) -> str | ParseFailure:
    """Phase 1 with `whole` replies, first call: the reply is the new instruction."""
    parts = _parts(text, finish_reason, "whole", (INSTRUCTION_TAG,), prompts)
    if isinstance(parts, ParseFailure):
        return parts
    (new,) = parts
    return _unlike(new, original.instruction) or _unlike(new, original.response) or new


def parse_whole_answer(
    text: str, finish_reason: FinishReason, instruction: str, prompts: Prompts
) -> str | ParseFailure:
    """Phase 1 with `whole` replies, second call: the reply is the answer to the new instruction."""
    parts = _parts(text, finish_reason, "whole", (RESPONSE_TAG,), prompts)
    if isinstance(parts, ParseFailure):
        return parts
    (new,) = parts
    return _no_echo(new, instruction) or new


def parse_response_reply(
    text: str, finish_reason: FinishReason, reply: Form, original: Rewrite, prompts: Prompts
) -> str | ParseFailure:
    """Phase 2: a new response to the same instruction.

    Args:
        text: the teacher's reply.
        finish_reason: why it ended; `length` is a failure in every form.
        reply: the form that was asked for.
        original: what the teacher was shown.
        prompts: what it was asked with.
    """
    parts = _parts(text, finish_reason, reply, (RESPONSE_TAG,), prompts)
    if isinstance(parts, ParseFailure):
        return parts
    (new,) = parts
    return _unlike(new, original.response) or _no_echo(new, original.instruction) or new


def _parts(
    text: str,
    finish_reason: FinishReason,
    reply: Form,
    names: tuple[str, ...],
    prompts: Prompts,
) -> list[str] | ParseFailure:
    """The named parts of a reply, each usable by itself."""
    if finish_reason == "content_filter":
        return ParseFailure("content_filter", "the endpoint's filter ended the reply")
    if finish_reason != "stop":
        return ParseFailure("truncated", "the reply reached max_new_tokens")
    if not _encodes(text):
        return ParseFailure("invalid_unicode", "the reply holds half a surrogate pair")
    spoken = _after_thinking(text.replace("\r\n", "\n"))
    if spoken is None:
        return ParseFailure("unclear_thinking", "where the reasoning ends can't be told")
    text = spoken.strip()
    if not text:
        return ParseFailure("empty", "the reply is empty")
    if _REFUSAL.match(text):
        return ParseFailure("refusal", text[:80])
    if reply == "whole":
        parts: list[str] | ParseFailure = [text]
    else:
        parts = _json_parts(text, names) if reply == "json" else _tagged_parts(text, names)
    if isinstance(parts, ParseFailure):
        return parts
    parts = [part.strip() for part in parts]
    problems = [problem for part in parts if (problem := _unusable(part, prompts))]
    return problems[0] if problems else parts


# A tag counts where it opens a line and its partner closes one, so that prose may speak of tags and
# contents may hold words such as "End". A part never runs over the opening of another part.
_ANY_OPENING = rf"^[ \t]*<(?:{INSTRUCTION_TAG}|{RESPONSE_TAG})>"
_FORM = re.MULTILINE | re.DOTALL


def _tagged_parts(text: str, names: tuple[str, ...]) -> list[str] | ParseFailure:
    parts = []
    rest = text
    for name in names:
        block = re.compile(rf"^[ \t]*<{name}>((?:(?!{_ANY_OPENING}).)*?)</{name}>[ \t]*$", _FORM)
        found = block.findall(text)
        if not found:
            return ParseFailure("missing_tag", f"no <{name}>…</{name}> on lines of its own")
        if len(found) > 1:
            return ParseFailure("repeated_tag", f"{len(found)} <{name}> parts")
        parts.append(found[0])
        rest = block.sub("", rest)
    # What is left may mention a tag within a line; one alone on its line belongs to a broken part.
    stray = re.search(rf"^[ \t]*</?({'|'.join(names)})>[ \t]*$", rest, re.MULTILINE)
    return ParseFailure("repeated_tag", f"a second {stray[0].strip()}") if stray else parts


def _json_parts(text: str, names: tuple[str, ...]) -> list[str] | ParseFailure:
    fenced = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_single_keys)
    except (ValueError, RecursionError) as error:
        return ParseFailure("invalid_json", str(error))
    if not isinstance(value, dict):
        return ParseFailure("invalid_json", "the reply is JSON but no object")
    parts = [part for name in names if isinstance(part := value.get(name), str)]
    if len(parts) < len(names):
        return ParseFailure("invalid_json", f"needs the keys {', '.join(names)}, each with a text")
    if not all(map(_encodes, parts)):
        return ParseFailure("invalid_unicode", "a text holds half a surrogate pair")
    return parts


def _single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _after_thinking(text: str) -> str | None:
    """A reply without the reasoning that some models write first; None where it isn't clear.

    A chat template may have opened the reasoning already, so that only its end, alone on a line, is
    in the reply.
    """
    before, closed, after = text.partition("</think>")
    if text.lstrip().startswith("<think>"):
        return after if closed else None
    if not closed or "<think>" in before:
        return text
    alone = _LINE_START.search(before) and _LINE_END.match(after)
    return after if alone else None


_LINE_START, _LINE_END = re.compile(r"(?:\A|\n)[ \t]*\Z"), re.compile(r"[ \t]*(?:\n|\Z)")

# Only openings that refuse the task itself: "I'm sorry for your loss" and "I can't make it on
# Friday" are good responses.
_SORRY = (
    r"(?:(?:i['\u2019]?m|i am)\s+)?(?:(?:very|really|so)\s+)?sorry(?:\s+for\s+[^.,;\n]{1,40})?"
    r"[,.!]?\s*(?:but\s+)?",
    r"(?:i\s+)?apologi[sz]e[,.!]?\s*(?:but\s+)?",
    r"unfortunately,?\s*",
)
_CANNOT = r"(?:can(?:['\u2019]t|not| not)|won['\u2019]t|am (?:unable|not able) to)"
_TASK = (
    r"(?:help|assist|comply|fulfill?|provide|generate|create|produce|rewrite|answer|engage|"
    r"(?:do|continue with|complete) (?:this|that|the|your))"
)
_REFUSAL = re.compile(
    rf"\W{{0,3}}(?:{'|'.join(_SORRY)})?"
    rf"(?:(?:i\s+{_CANNOT}|i['\u2019]m (?:unable|not able) to)\s+(?:\w+ly\s+)?{_TASK}\b"
    r"|as an? (?:\w+ ){0,2}(?:ai|artificial intelligence|chatbot|language model)\b(?: language)?"
    r"(?: model| assistant)?,? i(?:['\u2019]m)?\b)",
    re.IGNORECASE,
)

_PLACEHOLDER = re.compile(
    r"(?:\W*|\W*n/a\W*|\W*(?:(?:the|your|a|an|my)[ _])?"
    r"(?:(?:new|better|improved|rewritten|revised|updated)[ _])?"
    r"(?:instruction|response|answer|text)(?:[ _](?:goes[ _])?here)?\W*)",
    re.IGNORECASE,
)
"""A whole text that names what should stand there, or holds no word at all such as `...`."""


def _unusable(part: str, prompts: Prompts) -> ParseFailure | None:
    """Why a part is no answer by itself."""
    if not part:
        return ParseFailure("empty", "nothing between the tags")
    known = squeezed(part)
    if known in prompts.stand_ins or _PLACEHOLDER.fullmatch(part):
        return ParseFailure("placeholder", part[:80])
    if _REFUSAL.match(part):
        return ParseFailure("refusal", part[:80])
    repeated = next((text for text in prompts.own_texts if text in known), None)
    return ParseFailure("copied_prompt", repeated) if repeated else None


def _unlike(new: str, original: str) -> ParseFailure | None:
    """What differs in no word is no rewrite; as a new instruction it would shed the answer."""
    if words(new) == words(original):
        return ParseFailure("unchanged", "the reply repeats what the teacher was shown")
    return None


def _no_echo(response: str, instruction: str) -> ParseFailure | None:
    """A response made up of its instruction would have the best r-IFD of all, and teach nothing.

    An honest answer may restate the instruction, and then says at least as many words of its own.
    """
    asked, answer = words(instruction), words(response)
    own = len(answer) - len(asked) * _copies(asked, answer)
    if own < min(len(asked), len(answer)):
        return ParseFailure("copied_prompt", "the response repeats its instruction")
    return None


def _copies(run: list[str], text: list[str]) -> int:
    """How often a run of words stands in a text, without overlap; 0 for an empty run."""
    inner, outer = ("".join(f" {word} " for word in part) for part in (run, text))
    return outer.count(inner) if run else 0


def _encodes(text: str) -> bool:
    """Whether Arrow can hold the text: JSON escapes can spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
