"""Solutions: one from the teacher for each problem that is left."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.engines import Completion, Sampling
from stages.engines.chat import RETRIED, ChatFailure, ChatGenerator, ChatRequest
from stages.errors import EngineError
from stages.pass_rate.checks import answer_text, conclusion
from stages.rows import key_hash
from stages.sources.answers import last_boxed
from stages.synthesis.asking import asked_messages, text_id
from stages.synthesis.filters import solution_reject
from stages.synthesis.sample import Reject, Sample, Solution, remaining
from stages.synthesis.settings import FilterSettings

_MARKED = re.compile(r"####|\banswer(?:\s+is\b|\s*[:=])", re.IGNORECASE)
_OPEN, _CLOSE = "<think>", "</think>"


async def solve(
    samples: Sequence[Sample],
    teacher: ChatGenerator,
    request: str | None,
    sampling: Sampling,
    filters: FilterSettings,
    seed: int,
) -> int | None:
    """Have every problem that is left solved once, and mark what is no good solution.

    Args:
        samples: those that are left are asked about.
        teacher: solves them.
        request: a sentence after the problem and a blank line, or None.
        sampling: of the solutions.
        filters: what a solution has to be.
        seed: the recipe's.

    Returns:
        The tokens that were generated, or None where an endpoint doesn't report them.

    Raises:
        EngineError: the engine can't go on, or an endpoint didn't answer at times.
    """
    asked = remaining(samples)
    requests = [
        ChatRequest(
            asked_messages(sample.problem, request),
            key_hash(f"{text_id(sample)}:solution", seed),
        )
        for sample in asked
    ]
    replies = await teacher.chat(requests, sampling)
    _check_answered(replies)
    for sample, done in zip(asked, replies, strict=True):
        if isinstance(done, Completion):
            sample.solution = solution_of(done.text)
            sample.reject = (
                Reject("solution_unfinished")
                if _is_cut(done)
                else solution_reject(sample.solution, filters)
            )
        elif done.code == "prompt_too_long":
            sample.reject = Reject("prompt_too_long", done.detail)
        else:
            sample.reject = Reject("no_reply", str(done))
    usages = [done.usage for done in replies if isinstance(done, Completion)]
    counts = [usage.generated_tokens for usage in usages if usage]
    return sum(counts) if len(counts) == len(usages) else None


def solution_of(reply: str) -> Solution:
    """A reply with the reasoning up to its last `</think>` set apart.

    Chat templates that open the reasoning leave only the closing tag in the reply.
    """
    reasoning, _, text = reply.rpartition(_CLOSE)
    reasoning = reasoning.strip().removeprefix(_OPEN).strip()
    return Solution(reasoning, text.strip(), stated_answer(reply))


def stated_answer(reply: str) -> str | None:
    r"""The final answer that a reply marks as such; None where it marks none.

    The content of the last box, else the line after the last `####`, `answer is` or `answer:`.
    """
    text = conclusion(reply)
    if last_boxed(text) is not None:
        return answer_text(reply)
    if _MARKED.search(text) is None:
        return None
    line = answer_text(reply)
    return line.lstrip("* ").rstrip("*. ") or None if line else None


def _check_answered(replies: Sequence[Completion | ChatFailure]) -> None:
    """Refuse to go on where another run may get the replies that are missing.

    Raises:
        EngineError: some are.
    """
    silent = [one for one in replies if isinstance(one, ChatFailure) and one.code in RETRIED]
    if silent:
        raise EngineError(
            f"{len(silent)} of {len(replies)} problems had no reply from the teacher, for example "
            f"{silent[0]}; run again: what was answered is kept"
        )


def _is_cut(done: Completion) -> bool:
    """Whether the reply reached its limit or was filtered, or ended inside of its reasoning."""
    inside = done.text.lstrip().startswith(_OPEN) and _CLOSE not in done.text
    return done.finish_reason != "stop" or inside
