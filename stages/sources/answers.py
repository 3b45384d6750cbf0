r"""Reference answers in responses: by a regular expression, or the last `\boxed{...}`."""

from __future__ import annotations

import re
from functools import lru_cache

from stages.sources.settings import BOXED

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")


def extract_answer(response: str, pattern: str, *, by_line: bool = False) -> str | None:
    """What the pattern finds last in the response, without white space around it.

    Args:
        response: the text to search.
        pattern: a regular expression with one group, or `boxed`.
        by_line: `^` and `$` stand for the ends of every line, not of the whole response.

    Returns:
        The answer, or None where there is none.
    """
    if pattern == BOXED:
        found = last_boxed(response)
    else:
        matches = list(_compiled(pattern, re.MULTILINE if by_line else 0).finditer(response))
        found = matches[-1].group(1) if matches else None
    return (found or "").strip() or None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` (or `\fbox{...}`), braces balanced; None without one."""
    starts = [match.end() for match in _BOX.finditer(text)]
    if not starts:
        return None
    depth, position = 1, starts[-1]
    while position < len(text):
        character = text[position]
        if character == "\\":
            # An escaped brace prints one and groups nothing: `\left\{ x \right.` has no partner.
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[starts[-1] : position]
        position += 1
    return None


@lru_cache(maxsize=64)
def _compiled(pattern: str, flags: int) -> re.Pattern[str]:
    return re.compile(pattern, flags)
