"""What the verdicts on its steps say about a chain of thought. One function an equation."""

from __future__ import annotations

from collections.abc import Sequence


def reasoning_characters(steps: Sequence[str]) -> int:
    r"""Length of a chain of thought in characters (Unicode code points).

    .. math:: C = \sum_{i=1}^{n} |s_i|

    Source: arXiv 2509.19284, which measures length in characters.
    """
    return sum(map(len, steps))


def review_ratio(steps: Sequence[str], reviews: Sequence[bool]) -> float:
    r"""Share of a chain of thought that looks back, in characters.

    .. math:: R = \frac{\sum_{i} r_i \, |s_i|}{\sum_{i} |s_i|}

    Args:
        steps: texts :math:`s_i` of its steps.
        reviews: :math:`r_i`, whether a step checks, restates or goes back, one a step.

    Returns:
        In [0, 1].

    Raises:
        ValueError: there is no character, or not one verdict a step.

    Source: arXiv 2509.19284.
    """
    reviewed = [step for step, review in zip(steps, reviews, strict=True) if review]
    total = reasoning_characters(steps)
    if total == 0:
        raise ValueError("the review ratio of an empty chain of thought isn't defined")
    return reasoning_characters(reviewed) / total


def failed_step_fraction(failed: Sequence[bool]) -> float:
    r"""Share of steps that belong to an abandoned attempt.

    .. math:: \mathrm{FSF} = \frac{1}{n} \sum_{i=1}^{n} f_i

    Args:
        failed: :math:`f_i`, one a step.

    Returns:
        In [0, 1].

    Raises:
        ValueError: there is no step.

    Source: arXiv 2509.19284, where the sum goes over the nodes of a graph that a model draws of
    the chain of thought; here over steps that were split by rule.
    """
    if not failed:
        raise ValueError("the failed-step fraction of an empty chain of thought isn't defined")
    return sum(failed) / len(failed)
