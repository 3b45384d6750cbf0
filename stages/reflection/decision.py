r"""Which text stands: the student's verdict on a rewrite. Pure functions of losses and scores.

A rewrite stands only where both texts have finite scores and it is better by more than the margin;
whatever goes wrong keeps the text that is there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from stages.difficulty.losses import InstructionLoss, ResponseLoss

Reason = Literal[
    "accepted", "rejected_by_student", "tie", "misaligned", "uninformative", "too_long", "unscored"
]
VersionName = Literal["none", "instruction", "response", "both"]
"""Which texts of an exchange are the teacher's."""


class Choice(NamedTuple):
    """Whether the rewrite stands, and why or why not."""

    accepted: bool
    reason: Reason


ACCEPTED = Choice(True, "accepted")


def choose_instruction(
    current: ResponseLoss | None,
    candidate: ResponseLoss | None,
    *,
    margin: float = 0.0,
    max_ifd: float | None = 1.0,
) -> Choice:
    r"""Phase 1: of two pairs of instruction and response, the harder one for the student.

    .. math:: (x_1, y_1) = \arg\max_{(x_0, y_0),\,(x_{ins}, y_{ins})} \mathrm{IFD}(y \mid x)

    Compared as :math:`\ln \mathrm{IFD} = L(y \mid x) - L(y)`, nats per token.

    Args:
        current: losses of the pair that is there; None where it has none.
        candidate: losses of the teacher's pair; None where it has none.
        margin: nats per token; a difference within it is a tie.
        max_ifd: a candidate of this IFD or more is refused.

    Source: Selective Reflection-Tuning (arXiv 2402.10110), Eq. 6; the limit on IFD is in the
    released selection code (`< 1`) and not in the paper.
    """
    if current is None or candidate is None:
        return Choice(False, "unscored")
    gain = _log_ifd(candidate) - _log_ifd(current)
    if not math.isfinite(gain):
        return Choice(False, "unscored")
    unfit = unfit_pair(candidate, max_ifd=max_ifd)
    return Choice(False, unfit) if unfit else _by_gain(gain, margin)


def choose_response(
    current: InstructionLoss | None, candidate: InstructionLoss | None, *, margin: float = 0.0
) -> Choice:
    r"""Phase 2: of two responses to one instruction, the one from which it is told more easily.

    .. math:: (x_2, y_2) = \arg\min_{y \in \{y_1,\,y_{res}\}} \mathrm{rIFD}(x_1 \mid y)

    Both share :math:`x_1`, so the denominator of r-IFD cancels; only conditional losses count:

    .. math::
        \ln \mathrm{rIFD}(x_1 \mid y_{res}) - \ln \mathrm{rIFD}(x_1 \mid y_1)
        = [L(x_1 \mid y'_{res}) - L(x_1)] - [L(x_1 \mid y'_1) - L(x_1)]
        = L(x_1 \mid y'_{res}) - L(x_1 \mid y'_1)

    It cancels only where both were scored on the same tokens of :math:`x_1`: where a response left
    too little room for them in the student's window, the rewrite is refused as too long to compare.

    Args:
        current: losses of the instruction with the response that is there; None where it has none.
        candidate: losses of the instruction with the teacher's response; None where it has none.
        margin: nats per token; a difference within it is a tie.

    Source: Selective Reflection-Tuning (arXiv 2402.10110), Eq. 8 and 9.
    """
    if current is None or candidate is None:
        return Choice(False, "unscored")
    gain = current.given_response - candidate.given_response
    if not math.isfinite(gain):
        return Choice(False, "unscored")
    if candidate.tokens != current.tokens:
        return Choice(False, "too_long")
    return _by_gain(gain, margin)


def unfit_pair(
    candidate: ResponseLoss | None, *, max_ifd: float | None
) -> Literal["unscored", "too_long", "misaligned"] | None:
    """Why a pair can't stand whatever it is compared with, or None where it can."""
    if candidate is None or not math.isfinite(_log_ifd(candidate)):
        return "unscored"
    if candidate.truncated:
        return "too_long"
    if max_ifd is not None and _log_ifd(candidate) >= math.log(max_ifd):
        return "misaligned"
    return None


class Scores(NamedTuple):
    """IFD and r-IFD of one version of a row; None (or NaN) where it has none."""

    ifd: float | None
    rifd: float | None


class GridChoice(NamedTuple):
    """The version that stands, and the verdicts on its instruction and its response."""

    version: VersionName
    instruction: Reason
    response: Reason


def choose_in_grid(
    original: Scores,
    instruction: Scores | None,
    response: Scores | None,
    both: Scores | None,
    *,
    margin: float = 0.0,
    max_ifd: float | None = 1.0,
    max_rifd: float | None = 1.0,
) -> GridChoice:
    r"""Of four versions of a row, the one that the released selection takes.

    With ori the original, Q the teacher's pair, A the teacher's response to the original
    instruction, and QA its response to the instruction of Q:

    .. math::
        (b, c) = \begin{cases}
            (Q, QA) & \mathrm{IFD}(Q) > \mathrm{IFD}(ori) \\
            (ori, A) & \text{else}
        \end{cases}
        \qquad
        c \text{ is kept} \iff
        \mathrm{rIFD}(c) < \mathrm{rIFD}(b) \wedge \mathrm{rIFD}(c) < 1 \wedge \mathrm{IFD}(c) < 1

    Comparisons are strict and false for a score that isn't there, so ties and failures keep what
    there is. Where c isn't kept the released code drops the row; here Q stands where it won and its
    own IFD is below the limit, else the original.

    Args:
        original: scores of ori.
        instruction: of Q; None where there is no such text, as for the other two.
        response: of A.
        both: of QA.
        margin: nats per token by which a ratio must differ.
        max_ifd: limit on IFD; None: none.
        max_rifd: limit on r-IFD; None: none.

    Source: the selection script released with Selective Reflection-Tuning; the paper has neither
    limit.
    """
    pair = instruction or Scores(None, None)
    harder = _less(original.ifd, pair.ifd, margin)
    base, candidate = (pair, both) if harder else (original, response)
    candidate = candidate or Scores(None, None)
    judged = _verdict(candidate.rifd, base.rifd, margin)
    if judged == "accepted" and not _below(candidate.rifd, max_rifd):
        judged = "uninformative"
    if judged == "accepted" and not _below(candidate.ifd, max_ifd):
        judged = "misaligned" if _known(candidate.ifd) else "unscored"
    if not harder:
        lost = _verdict(original.ifd, pair.ifd, margin)
        return GridChoice("response" if judged == "accepted" else "none", lost, judged)
    if judged == "accepted":
        return GridChoice("both", "accepted", judged)
    if _below(pair.ifd, max_ifd):
        return GridChoice("instruction", "accepted", judged)
    return GridChoice("none", "misaligned", judged)


def _verdict(lower: float | None, higher: float | None, margin: float) -> Reason:
    """Whether the first score is lower by more than the margin, and else why not."""
    if not (_known(lower) and _known(higher)):
        return "unscored"
    if _less(lower, higher, margin):
        return "accepted"
    return "rejected_by_student" if _less(higher, lower, margin) else "tie"


def _less(lower: float | None, higher: float | None, margin: float) -> bool:
    """Whether a ratio is below another by more than the margin in its logarithm."""
    return lower is not None and higher is not None and lower * math.exp(margin) < higher


def _below(score: float | None, limit: float | None) -> bool:
    """Whether a score is there and below its limit."""
    return score is not None and score < (math.inf if limit is None else limit)


def _known(score: float | None) -> bool:
    return score is not None and not math.isnan(score)


def _log_ifd(losses: ResponseLoss) -> float:
    return losses.given_prompt - losses.alone


def _by_gain(gain: float, margin: float) -> Choice:
    if abs(gain) <= margin:
        return Choice(False, "tie")
    return ACCEPTED if gain > 0 else Choice(False, "rejected_by_student")
