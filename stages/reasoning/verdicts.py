"""From a judge's reply to one verdict a step, or the reason why there is none.

Nothing is guessed: a reply that was cut, leaves a step out, judges one twice or holds anything but
the object that was asked for says nothing about the row.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.engines import Completion
from stages.errors import RowError

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)

_THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
"""The judge's own reasoning, which some models write before their reply."""

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


class StepVerdict(BaseModel):
    """What the judge says of one step, numbered from 1."""

    model_config = _STRICT

    step: int
    kind: Literal["progress", "review"]
    failed: bool


class JudgeReply(BaseModel):
    """The object that the judge is asked for."""

    model_config = _STRICT

    steps: list[StepVerdict]


def step_verdicts(reply: Completion, window: range) -> list[StepVerdict]:
    """The verdict on every step of a window, in the order of the steps.

    The reply may be inside a Markdown fence, and may list the steps in any order.

    Args:
        reply: what the judge wrote.
        window: indices of the steps that it was asked about, counted from 0.

    Raises:
        RowError: `truncated`, where the reply reached its limit; `content_filter`, where an
            endpoint's filter ended it; `unreadable_verdict`, where it isn't the object asked for or
            doesn't have every step exactly once.
    """
    asked = range(window.start + 1, window.stop + 1)
    about = f"the reply on steps {asked.start} to {asked.stop - 1}"
    if reply.finish_reason == "content_filter":
        raise RowError(f"content_filter: the endpoint's filter ended {about}")
    if reply.finish_reason == "length":
        raise RowError(f"truncated: {about} reached max_new_tokens")
    text = _THINKING.sub("", reply.text, count=1).strip()
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_single_keys)
        verdicts = JudgeReply.model_validate(value).steps
    except ValidationError as error:
        raise RowError(f"unreadable_verdict: {about}: {_first_problem(error)}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"unreadable_verdict: {about} is no JSON: {error}") from error
    judged = sorted(verdict.step for verdict in verdicts)
    if judged != list(asked):
        raise RowError(f"unreadable_verdict: {about} {_miscount(judged, asked)}")
    return sorted(verdicts, key=lambda verdict: verdict.step)


def _single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"]


def _miscount(judged: list[int], asked: range) -> str:
    missing = sorted(set(asked) - set(judged))
    if missing:
        return f"has no verdict on step {missing[0]}"
    foreign = sorted(set(judged) - set(asked))
    if foreign:
        return f"judges step {foreign[0]}, which it wasn't asked about"
    twice = next(step for step in judged if judged.count(step) > 1)
    return f"judges step {twice} more than once"
