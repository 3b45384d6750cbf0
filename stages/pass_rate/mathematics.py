r"""Answers compared as mathematics, by math-verify.

It can compute for ever (`\boxed{9^{9^{9}}}`), its own time limit is a signal handler that works
only in the main thread and only between two steps of the interpreter, so its limits are off here
and `worker` runs these functions where they can be ended from outside.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from stages.pass_rate.checks import Verdict, conclusion
from stages.sources.answers import last_boxed

_WORDS = re.compile(r"(?=.*[^\W\d_]{3})[^\W\d_]+(?:\s+[^\W\d_]+)*")


def math_verdict(answer: str, text: str) -> Verdict:
    """Whether the answer that a text gives equals the reference answer.

    Read from the text: its last box; else what a phrase like `final answer is` announces; else its
    last formula or number. What math-verify can't compare counts as not equal, as it does there.
    """
    from math_verify import verify

    given = _parsed(conclusion(text))
    if not given:
        return "unreadable"
    equal = verify(_reference(answer), given, timeout_seconds=0)
    return "correct" if equal else "wrong"


def is_readable(answer: str) -> bool:
    """Whether a reference answer can be read as mathematics."""
    return bool(_reference(answer))


@lru_cache(maxsize=64)
def _reference(answer: str) -> list[Any]:
    """A reference answer, bare or in a box: a bare formula is found only inside of one."""
    if last_boxed(answer) is not None:
        return _parsed(answer)
    bare = answer.strip()
    if _WORDS.fullmatch(bare):
        # Bare letters are a product of variables, in which `was` equals `saw`.
        bare = rf"\text{{{bare}}}"
    return _parsed(rf"\boxed{{{bare}}}")


def _parsed(text: str) -> list[Any]:
    """The expression that math-verify reads from a text; empty where it reads none."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    found: list[Any] = parse(
        text,
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )
    return found
