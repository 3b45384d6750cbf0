"""What a problem looks like from outside: something is asked, and nothing is answered yet."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.sources.answers import last_boxed

REQUEST_WORDS = (
    "add", "analyse", "analyze", "arrange", "are", "argue", "assume", "build", "calculate", "can",
    "choose", "classify", "combine", "compare", "complete", "compute", "consider", "construct",
    "convert", "count", "create", "decide", "deduce", "define", "derive", "describe", "design",
    "determine", "differentiate", "discuss", "do", "does", "draw", "estimate", "evaluate",
    "examine", "expand", "explain", "express", "factor", "factorise", "factorize", "fill", "find",
    "formulate", "generate", "give", "how", "identify", "implement", "integrate", "is", "justify",
    "list", "make", "match", "maximise", "maximize", "minimise", "minimize", "name", "order",
    "outline", "place", "plot", "predict", "prove", "provide", "rank", "reduce", "rewrite", "round",
    "select", "show", "simplify", "sketch", "solve", "sort", "specify", "state", "suggest",
    "summarise", "summarize", "tell", "translate", "use", "verify", "what", "when", "where",
    "which", "who", "why", "write",
)  # fmt: skip
"""English words that open a request."""

_QUESTION_MARKS = "?？؟"
_CLAUSE = r"(?:^|[.:;,!()\n])\s*"
_LINKS = r"(?:(?:also|and|finally|first|hence|next|now|or|please|then|thus)[,\s]+)*"
_SOLUTION = re.compile(
    r"^[\W_]*(?:answer|assistant|proof|response|solution)[\W_]*:|^#{2,}\s*(?:answer|solution)\b",
    re.IGNORECASE | re.MULTILINE,
)


def is_request(text: str, words: Sequence[str]) -> bool:
    """Whether something is asked: a question mark, or a word that opens a clause.

    Args:
        text: the problem.
        words: openings such as "find", as in "Let n be prime; find n."
    """
    if any(mark in text for mark in _QUESTION_MARKS):
        return True
    opening = "|".join(re.escape(word) for word in words)
    found = re.search(rf"{_CLAUSE}{_LINKS}(?:{opening})\b", text, re.IGNORECASE) if words else None
    return found is not None


def holds_solution(text: str) -> bool:
    r"""Whether a problem goes on to its solution: a filled `\boxed{}`, or a heading such as that.

    A box without a letter or digit (`\boxed{}`, `\boxed{...}`) is a request for one.
    """
    box = last_boxed(text)
    return bool(box and re.search(r"\w", box)) or _SOLUTION.search(text) is not None
