"""Solutions: one from the teacher for each problem that is left."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.engines import Completion, GenerationRequest, Sampling, TextGenerator
from stages.pass_rate.checks import answer_text, conclusion
from stages.rows import key_hash
from stages.sources.answers import last_boxed
from stages.synthesis.asking import Asker, text_id
from stages.synthesis.filters import solution_reject
from stages.synthesis.sample import Reject, Sample, Solution
from stages.synthesis.settings import FilterSettings

_MARKED = re.compile(r"####|\banswer(?:\s+is\b|\s*[:=])", re.IGNORECASE)
_OPEN, _CLOSE = "<think>", "</think>"


async def solve(
    samples: Sequence[Sample],
    engine: TextGenerator,
    asker: Asker,
    sampling: Sampling,
    filters: FilterSettings,
    seed: int,
) -> int:
    """Have every problem that is left solved once, and mark what is no good solution.

    Returns:
        The tokens that were generated.

    Raises:
        EngineError: the engine can't go on.
    """
    asked = asker.prompts(samples)
    requests = [
        GenerationRequest(prompt, key_hash(f"{text_id(sample)}:solution", seed))
        for sample, prompt in asked
    ]
    completions = await engine.generate(requests, sampling) if requests else []
    for (sample, _), done in zip(asked, completions, strict=True):
        sample.solution = solution_of(done.text)
        sample.reject = (
            Reject("solution_unfinished")
            if _is_cut(done)
            else solution_reject(sample.solution, filters)
        )
    return sum(len(done.token_ids) for done in completions)


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


def _is_cut(done: Completion) -> bool:
    """Whether the reply reached its limit, or ended inside of its reasoning."""
    inside = done.text.lstrip().startswith(_OPEN) and _CLOSE not in done.text
    return done.finish_reason == "length" or inside
