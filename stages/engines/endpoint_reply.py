"""What an OpenAI-compatible endpoint sends back: a completion, or why there is none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from pydantic import BaseModel, ValidationError

from stages.engines import Completion, FinishReason, Usage
from stages.engines.chat import ChatCode, ChatFailure

_FINISHED: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
}


_MOST_TOKENS = 10_000_000
"""More than any window holds; what a server reports beyond it is no count."""


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None


class _Reply(BaseModel):
    choices: list[_Choice]
    usage: dict[str, Any] | None = None


def completion_of(body: bytes) -> Completion | ChatFailure:
    """The completion in the body of a reply with status 200.

    Reasoning that the endpoint sets apart goes before the text, between `<think>` tags, as models
    that run here write it.
    """
    try:
        value = json.loads(body.decode())
        reply = _Reply.model_validate(value)
    except UnicodeDecodeError as error:
        return ChatFailure("invalid_unicode", f"the reply is no UTF-8 ({error.reason})")
    except ValidationError as error:
        said = words_of(body).message
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        return ChatFailure("bad_reply", said or f"{where or 'the reply'}: {problem['msg']}")
    except (ValueError, RecursionError) as error:
        return ChatFailure("bad_reply", f"the reply is no JSON ({error})")
    if not reply.choices:
        return ChatFailure("empty_choices", "the reply holds no choice")
    choice = reply.choices[0]
    message = choice.message
    if message.refusal and not message.content:
        return ChatFailure("refusal", message.refusal)
    if choice.finish_reason not in _FINISHED:
        return ChatFailure("bad_reply", f"the reply ended by {choice.finish_reason!r}")
    text = message.content or ""
    if reasoning := message.reasoning or message.reasoning_content:
        text = f"<think>\n{reasoning}\n</think>\n\n{text}"
    if re.search("[\ud800-\udfff]", text):
        return ChatFailure("invalid_unicode", "the reply holds half a surrogate pair")
    return Completion(
        token_ids=(),
        text=text,
        finish_reason=_FINISHED[choice.finish_reason],
        log_prob=math.nan,
        usage=_usage_of(reply.usage or {}),
    )


def _usage_of(reported: Mapping[str, Any]) -> Usage | None:
    """The two counts; None unless both are reported and can be true."""
    prompt, generated = reported.get("prompt_tokens"), reported.get("completion_tokens")
    return Usage(prompt, generated) if _is_count(prompt) and _is_count(generated) else None


def _is_count(value: object) -> TypeGuard[int]:
    # JSON's true and false are ints to Python.
    return type(value) is int and 0 <= value <= _MOST_TOKENS


class Words(NamedTuple):
    """An endpoint's own error code and message, empty where it gives none."""

    code: str
    message: str


def words_of(body: bytes) -> Words:
    """What the body of an error says, in any of the forms that servers use."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return Words("", body.decode(errors="replace"))
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return Words("", error if isinstance(error, str) else "")
    said: Any = error.get("message") or error.get("detail") or ""
    code = error.get("code") or error.get("type") or ""
    return Words(str(code), said if isinstance(said, str) else json.dumps(said))


def is_unknown_model(words: Words) -> bool:
    """Whether a refusal is about the model's name."""
    return words.code in _MODEL_CODES or bool(_MODEL.search(words.message))


def is_spent_account(words: Words) -> bool:
    """Whether a refusal is about money and no pause will help."""
    return words.code in _QUOTA_CODES


def is_filtered(words: Words) -> bool:
    """Whether a refusal is about what the prompt says."""
    return words.code in _FILTER_CODES or bool(_FILTER.search(words.message))


def refused_prompt(status: int, words: Words) -> ChatFailure:
    """Why one prompt was refused with status 4xx."""
    said = words.message or f"status {status}"
    if status == 413 or words.code in _LENGTH_CODES or _LENGTH.search(words.message):
        return ChatFailure("prompt_too_long", said)
    code: ChatCode = "content_filter" if is_filtered(words) else "bad_request"
    return ChatFailure(code, said)


_MODEL_CODES = ("model_not_found", "invalid_model", "unknown_model", "DeploymentNotFound")
_MODEL = re.compile(
    r"\bmodel\b.{0,200}?(?:not exist|not found|n['\u2019]t exist|not a valid)"
    r"|(?:invalid|unknown|not a valid) model\b",
    re.IGNORECASE | re.DOTALL,
)
_QUOTA_CODES = ("insufficient_quota", "insufficient_balance", "billing_hard_limit_reached")
_LENGTH_CODES = ("context_length_exceeded", "exceed_context_size_error", "string_above_max_length")
_LENGTH = re.compile(
    r"context (?:length|window|size)|maximum model length|prompt is too long|too many tokens",
    re.IGNORECASE,
)
_FILTER_CODES = ("content_filter", "content_policy_violation", "data_inspection_failed")
_FILTER = re.compile(
    r"\bflagged\b|content (?:filter|policy|management policy)|moderation", re.IGNORECASE
)
