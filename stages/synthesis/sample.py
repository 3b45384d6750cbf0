"""One sample on its way: a problem, perhaps a solution, and the reason where it is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stages.pass_rate.rollouts import Tally

REASONS: dict[str, str] = {
    "unfinished": "the problem reached max_new_tokens",
    "empty": "no text at all",
    "special_token": "a token that is no text stands inside the problem",
    "no_request": "nothing is asked: no question mark, no word that opens a request",
    "holds_solution": "the problem holds its solution",
    "duplicate": "the text of an earlier sample, but for case and white space",
    "language": "none of the languages asked for, or too uncertain",
    "too_short": "fewer characters than min_characters",
    "too_long": "more characters than max_characters",
    "repetition": "the problem repeats itself",
    "overlap": "too many of its word n-grams stand in one row of a source or target",
    "prompt_too_long": "it leaves no room for the teacher's or the student's reply",
    "no_reply": "the teacher's endpoint gave no reply, or its filter none",
    "solution_unfinished": "the solution, or its reasoning, was cut off",
    "solution_empty": "nothing but reasoning",
    "solution_no_answer": "no final answer is stated",
    "solution_repetition": "the solution repeats itself",
    "unreadable_answer": "its answer can't be compared: it can't be parsed",
    "solved_by_student": "the student reaches the same answer",
}
"""Why a sample is left out, in the order of the filters."""


class Reject(NamedTuple):
    """A code of `REASONS`, and what was found."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Solution:
    """What the teacher wrote: its reasoning where it is kept apart, the solution, the answer."""

    reasoning: str
    text: str
    answer: str | None


@dataclass
class Sample:
    """One sample.

    Attributes:
        index: its number; with the recipe's seed it determines the problem.
        problem: what the generator wrote, without white space around it.
        solution: the teacher's, where it came so far.
        tally: of the student's attempts, where it came so far.
        reject: why it is left out; None while it isn't.
    """

    index: int
    problem: str
    solution: Solution | None = None
    tally: Tally | None = None
    reject: Reject | None = None


def remaining(samples: Sequence[Sample]) -> list[Sample]:
    """Those that no filter has left out so far."""
    return [sample for sample in samples if sample.reject is None]
