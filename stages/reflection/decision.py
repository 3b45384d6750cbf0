r"""Which text stands: the student's verdict on a rewrite. Pure functions of losses.

A rewrite stands only where both texts have finite scores and it is better by more than the margin;
whatever goes wrong keeps the text that is there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from stages.difficulty.losses import InstructionLoss, ResponseLoss

Reason = Literal["accepted", "rejected_by_student", "tie", "misaligned", "too_long", "unscored"]


class Choice(NamedTuple):
    """Whether the rewrite stands, and why or why not."""

    accepted: bool
    reason: Reason


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


def _log_ifd(losses: ResponseLoss) -> float:
    return losses.given_prompt - losses.alone


def _by_gain(gain: float, margin: float) -> Choice:
    if abs(gain) <= margin:
        return Choice(False, "tie")
    return Choice(True, "accepted") if gain > 0 else Choice(False, "rejected_by_student")
