"""What a rollout is checked against, what may come out, and matching by text.

Matching compares one line: what the rollout gives as its answer (`answer_text`) with the reference
answer. Mathematics is in `mathematics`, and everything is asked through `checker.AnswerChecker`.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal, NamedTuple

from stages.sources.answers import last_boxed

Check = Literal["math", "exact", "normalised"]

Verdict = Literal["correct", "wrong", "unreadable", "truncated", "unverified"]
"""`unreadable`: no answer could be read from the rollout. `truncated`: it reached its limit.
`unverified`: the check itself took too long, which says nothing about the answer."""

_MARKER = re.compile(r"####|\banswer(?:\s+is\b|\s*[:=])[\s:=]*", re.IGNORECASE)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")

_IN_NUMBER = re.compile(r"(?<!\w)-(?=\.?\d)|(?<!\w)\.(?=\d)|(?<=\d)[./:](?=\d)|(?<=\d)%")
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=\S)")
_HYPHENS = str.maketrans("\u2010\u2011\u2212", "---")


class Case(NamedTuple):
    """A text to check: how, against which reference answer."""

    check: Check
    answer: str
    text: str


def conclusion(text: str) -> str:
    """What follows the reasoning of a model that marks it: the text after the last `</think>`."""
    return text.rpartition("</think>")[2]


def answer_text(text: str) -> str | None:
    r"""The one piece of a rollout that matching compares, or None where there is none.

    The content of the last `\boxed{...}`; else the line after the last `####`, `answer is`,
    `answer:` or `answer =`; else the last line that isn't blank. Reasoning up to `</think>` is left
    out, and a box that holds nothing but `\text{...}` is opened.
    """
    text = conclusion(text)
    boxed = last_boxed(text)
    if boxed is not None:
        inner = _TEXT_COMMAND.fullmatch(boxed.strip())
        return (inner.group(1) if inner else boxed).strip() or None
    markers = list(_MARKER.finditer(text))
    lines = [line.strip() for line in text[markers[-1].end() if markers else 0 :].splitlines()]
    found = [line for line in lines if line]
    if not found:
        return None
    return found[0] if markers else found[-1]


def normalised_text(text: str) -> str:
    """A text without what doesn't matter to an answer; empty where nothing is left.

    Unicode NFKC and case folding; punctuation dropped but for what belongs to a number (`-3`,
    `0.5`, `1/2`, `12:30`, `50%`; a comma between digits is dropped); articles dropped before
    another word; white space collapsed.
    """
    text = unicodedata.normalize("NFKC", text).casefold().translate(_HYPHENS)
    numeric = {match.start() for match in _IN_NUMBER.finditer(text)}
    kept = "".join(
        character
        for place, character in enumerate(text)
        if place in numeric or not unicodedata.category(character).startswith("P")
    )
    return " ".join(_ARTICLE.sub("", " ".join(kept.split())).split())


def matched(case: Case) -> Verdict:
    """The verdict of `exact` (white space around the answer left out) or `normalised` matching.

    Raises:
        ValueError: the case asks for mathematics.
    """
    if case.check == "math":
        raise ValueError("mathematics isn't matched by text; ask an AnswerChecker")
    given = answer_text(case.text)
    if given is None:
        return "unreadable"
    if case.check == "exact":
        return "correct" if given == case.answer.strip() else "wrong"
    return "correct" if normalised_text(given) == normalised_text(case.answer) else "wrong"


def unmatchable(check: Check, answer: str) -> str | None:
    """Why no text can match a reference answer, or None where one can."""
    if len(answer.strip().splitlines()) > 1:
        return "it has several lines, and matching compares one"
    if check == "normalised" and not normalised_text(answer):
        return "nothing is left of it after normalisation"
    return None
