"""A chain of thought as steps, by rule: paragraphs, and sentences that turn the reasoning."""

from __future__ import annotations

import re
from bisect import bisect_left
from itertools import pairwise

_CUES = (
    r"(?:(?:but|oh|no|so|and|or),?\s+)?wait\b",
    r"h+m+\b",
    r"oops\b",
    r"hold on\b",
    r"(?:but\s+)?actually\b",
    r"alternatively\b",
    r"instead,",
    r"on second thoughts?\b",
    r"(?:perhaps\s+|maybe\s+)?(?:another|a different)\s+(?:way|approach|idea|method|possibility)\b",
    r"(?:maybe|perhaps)\s+(?:i|we)\s+(?:can|could|should)\b",
    r"(?:(?:but|so|now|ok|okay),?\s+)?(?:let\s+me|let['’]s|let\s+us|i\s+should|we\s+should)\s+"
    r"(?:just\s+|also\s+|quickly\s+)?"
    r"(?:check|double[- ]check|verify|confirm|test|try|go\s+back|start\s+over|think\s+again|"
    r"re-?(?:check|consider|compute|calculate|do|examine|read|start|think|visit|verify))\b",
    r"to\s+(?:check|double[- ]check|verify|confirm)\b",
    r"going\s+back\b",
    r"(?:(?:but|so|no),?\s+)?(?:that|this|it)(?:['’]s|\s+is)\s+(?:wrong|incorrect|not\s+right)\b",
)
"""What a sentence starts with that checks, doubts, or begins another attempt."""

_PARAGRAPH = re.compile(r"\n(?:[^\S\n]*\n)+")
_CUE = re.compile(rf"\s*(?:{'|'.join(_CUES)})", re.IGNORECASE)
_TURN = re.compile(
    rf"(?:^[ \t]*|[.!?…][\"'”’)\]*_$]*\s+)(?={'|'.join(_CUES)})", re.IGNORECASE | re.MULTILINE
)

_OPENING = re.compile(
    r"^[ \t]*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})"
    r"|(?P<dollars>\$\$)"
    r"|(?<!\\)(?P<bracket>\\\[)"
    r"|\\begin\{(?P<environment>[A-Za-z]+\*?)\}",
    re.MULTILINE,
)


def reasoning_steps(text: str, min_characters: int) -> list[str]:
    """The steps of a chain of thought; joined, they are the text again.

    A step starts after a blank line, and where a sentence or a line starts with a cue of checking,
    doubt or another attempt (English). None starts inside a code fence or displayed LaTeX. A short
    piece joins what follows it; where that begins with a cue, what it closes.

    Args:
        text: the chain of thought.
        min_characters: a step has at least as many, not counting white space around it, unless
            the whole text has fewer.

    Source: own rule; arXiv 2509.19284 splits its traces into chunks by a rule that we know not.
    """
    steps: list[str] = []
    held = ""
    for piece in _pieces(text):
        if held and steps and _CUE.match(piece) and not _CUE.match(held):
            steps[-1] += held
            held = ""
        held += piece
        if len(held.strip()) >= min_characters:
            steps.append(held)
            held = ""
    if held and steps:
        steps[-1] += held
    elif held:
        steps.append(held)
    return steps


def _pieces(text: str) -> list[str]:
    """The text cut wherever a step may start."""
    spans = _verbatim_spans(text)
    starts = [start for start, _ in spans]
    cuts = {match.end() for pattern in (_PARAGRAPH, _TURN) for match in pattern.finditer(text)}
    inside = {
        cut for cut in cuts if (before := bisect_left(starts, cut)) and cut < spans[before - 1][1]
    }
    places = [0, *sorted(cuts - inside - {0, len(text)}), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


def _verbatim_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of every code fence and displayed formula, in order and apart."""
    spans: list[tuple[int, int]] = []
    # What isn't found once isn't found later either: a text of openings is read once, not often.
    absent: set[str] = set()
    place = 0
    while opening := _OPENING.search(text, place):
        place = opening.end()
        if opening["fence"]:
            place = _end_of_fence(text, opening)
            spans.append((opening.start(), place))
            continue
        closer = _closer(opening)
        found = -1 if closer in absent else text.find(closer, place)
        if found < 0:
            absent.add(closer)
        else:
            place = found + len(closer)
            spans.append((opening.start(), place))
    return spans


def _end_of_fence(text: str, opening: re.Match[str]) -> int:
    """Where a code fence closes; as in Markdown, an open one runs to the end."""
    fence = opening["fence"]
    closing = re.compile(rf"^[ \t]*{fence}{fence[0]}*[ \t]*$", re.MULTILINE)
    closed = closing.search(text, opening.end())
    return closed.end() if closed else len(text)


def _closer(opening: re.Match[str]) -> str:
    """What ends the displayed formula that was opened."""
    if opening["dollars"]:
        return "$$"
    return r"\]" if opening["bracket"] else rf"\end{{{opening['environment']}}}"
