"""The filters that a problem passes by itself, in order; the first that refuses it names it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stages.synthesis.language import language_of
from stages.synthesis.ngrams import NgramOverlap, repeated_share
from stages.synthesis.sample import Reject, Sample, Solution, remaining
from stages.synthesis.settings import FilterSettings
from stages.synthesis.wording import holds_solution, is_request


def reject_problems(samples: Sequence[Sample], settings: FilterSettings) -> None:
    """Mark what is no good problem, and what an earlier sample says already."""
    seen: dict[str, int] = {}
    for sample in remaining(samples):
        sample.reject = _form_reject(sample.problem, settings)
        if sample.reject is None:
            first = seen.setdefault(" ".join(sample.problem.split()).casefold(), sample.index)
            if first != sample.index:
                sample.reject = Reject("duplicate", f"of sample {first}")
        if sample.reject is None:
            sample.reject = _text_reject(sample.problem, settings)


def reject_overlaps(
    samples: Sequence[Sample],
    rows: Iterable[tuple[str, Sequence[str]]],
    n: int,
    max_share: float,
) -> None:
    """Mark problems of whose word n-grams one row holds more than a share.

    Args:
        samples: those of them that are left are checked.
        rows: what each row is called, and the texts of its turns.
        n: words in a run.
        max_share: 0 allows no shared run.
    """
    checked = remaining(samples)
    overlap = NgramOverlap([sample.problem for sample in checked], n)
    worst: dict[int, tuple[float, str]] = {}
    for name, texts in rows:
        for place, share in overlap.containments(texts).items():
            if share > max(max_share, worst.get(place, (0.0, ""))[0]):
                worst[place] = (share, name)
    for place, (share, name) in worst.items():
        checked[place].reject = Reject("overlap", f"{share:.0%} of its {n}-grams with {name}")


def solution_reject(solution: Solution, settings: FilterSettings) -> Reject | None:
    """Why a finished solution is refused, or None."""
    if not solution.text:
        return Reject("solution_empty")
    if settings.require_answer and solution.answer is None:
        return Reject("solution_no_answer")
    share = max(
        repeated_share(text, settings.repetition_words)
        for text in (solution.reasoning, solution.text)
    )
    if share > settings.max_solution_repetition:
        return Reject("solution_repetition", f"{share:.0%} of its n-grams")
    return None


def _form_reject(problem: str, settings: FilterSettings) -> Reject | None:
    if not problem:
        return Reject("empty")
    if holds_solution(problem):
        return Reject("holds_solution")
    if settings.require_request and not is_request(problem, settings.request_words):
        return Reject("no_request")
    return None


def _text_reject(problem: str, settings: FilterSettings) -> Reject | None:
    if settings.languages is not None:
        code, probability = language_of(problem)
        if code not in settings.languages or probability < settings.min_language_probability:
            return Reject("language", f"{code} {probability:.2f}")
    if len(problem) < settings.min_characters:
        return Reject("too_short", f"{len(problem)} characters")
    if len(problem) > settings.max_characters:
        return Reject("too_long", f"{len(problem)} characters")
    share = repeated_share(problem, settings.repetition_words)
    if share > settings.max_problem_repetition:
        return Reject("repetition", f"{share:.0%} of its n-grams")
    return None
