"""Which version stands: the truth tables of both modes, and their equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.difficulty.losses import InstructionLoss, ResponseLoss
from stages.reflection.decision import (
    Scores,
    choose_in_grid,
    choose_instruction,
    choose_response,
)


def response_loss(log_ifd: float, *, truncated: bool = False) -> ResponseLoss:
    return ResponseLoss(2.0 + log_ifd, 2.0, 5, truncated)


class TestDecision:
    """Higher IFD wins phase 1 (Eq. 6), lower r-IFD phase 2 (Eq. 9); doubt keeps the original."""

    @pytest.mark.parametrize(
        ("current", "candidate", "margin", "max_ifd", "reason"),
        [
            (-0.5, -0.3, 0.0, 1.0, "accepted"),
            (-0.3, -0.5, 0.0, 1.0, "rejected_by_student"),
            (-0.5, -0.5, 0.0, 1.0, "tie"),
            (-0.5, -0.25, 0.25, 1.0, "tie"),
            (-0.25, -0.5, 0.25, 1.0, "tie"),
            (-0.5, -0.2, 0.25, 1.0, "accepted"),
            (-0.5, 0.0, 0.0, 1.0, "misaligned"),
            (-0.5, 0.2, 0.0, 1.0, "misaligned"),
            (-0.5, 0.2, 0.0, None, "accepted"),
            (-0.5, -0.1, 0.0, 0.9, "misaligned"),
            (None, -0.3, 0.0, 1.0, "unscored"),
            (-0.5, None, 0.0, 1.0, "unscored"),
            (None, None, 0.0, 1.0, "unscored"),
            (math.nan, -0.3, 0.0, 1.0, "unscored"),
            (-0.5, math.nan, 0.0, None, "unscored"),
            (-0.5, math.inf, 0.0, None, "unscored"),
            (-math.inf, -0.3, 0.0, 1.0, "unscored"),
        ],
    )
    def test_instruction(
        self,
        current: float | None,
        candidate: float | None,
        margin: float,
        max_ifd: float | None,
        reason: str,
    ) -> None:
        losses = [None if log is None else response_loss(log) for log in (current, candidate)]
        choice = choose_instruction(*losses, margin=margin, max_ifd=max_ifd)
        assert choice == (reason == "accepted", reason)

    def test_instruction_scored_in_part_is_refused(self) -> None:
        choice = choose_instruction(response_loss(-0.5), response_loss(-0.1, truncated=True))
        assert choice == (False, "too_long")

    @pytest.mark.parametrize(
        ("current", "candidate", "margin", "reason"),
        [
            (2.0, 1.5, 0.0, "accepted"),
            (1.5, 2.0, 0.0, "rejected_by_student"),
            (1.5, 1.5, 0.0, "tie"),
            (2.0, 1.5, 0.5, "tie"),
            (2.0, 1.25, 0.5, "accepted"),
            (None, 1.5, 0.0, "unscored"),
            (2.0, None, 0.0, "unscored"),
            (math.nan, 1.5, 0.0, "unscored"),
            (2.0, math.nan, 0.0, "unscored"),
            (math.inf, 1.5, 0.0, "unscored"),
        ],
    )
    def test_response(
        self, current: float | None, candidate: float | None, margin: float, reason: str
    ) -> None:
        losses = [
            None if loss is None else InstructionLoss(loss, 3.0, 7) for loss in (current, candidate)
        ]
        assert choose_response(*losses, margin=margin) == (reason == "accepted", reason)

    def test_response_scored_on_fewer_instruction_tokens_is_refused(self) -> None:
        current, candidate = InstructionLoss(2.0, 3.0, 7), InstructionLoss(1.0, 3.0, 4)
        assert choose_response(current, candidate) == (False, "too_long")

    def test_phase_2_is_the_smaller_rifd(self) -> None:
        """L(x1) cancels: deciding by L(x1|y') is deciding by r-IFD, whatever L(x1) is."""
        rng = np.random.default_rng(0)
        for given_a, given_b, alone in rng.uniform(0.1, 6.0, size=(500, 3)):
            current = InstructionLoss(given_a, alone, 9)
            candidate = InstructionLoss(given_b, alone, 9)
            assert choose_response(current, candidate).accepted == (candidate.rifd < current.rifd)

    def test_phase_1_is_the_greater_ifd(self) -> None:
        rng = np.random.default_rng(1)
        for a, b, c, d in rng.uniform(0.1, 6.0, size=(500, 4)):
            current, candidate = ResponseLoss(a, b, 9, False), ResponseLoss(c, d, 9, False)
            choice = choose_instruction(current, candidate, max_ifd=None)
            assert choice.accepted == (candidate.ifd > current.ifd)


# Half of the draws from a few values, so that ties happen.
SCORE = st.one_of(
    st.sampled_from([0.25, 0.5, 1.0, 1.5, 0.0, math.nan, math.inf, -math.inf]), st.floats()
)
SCORES = st.builds(Scores, SCORE, SCORE)


def released(ori: Scores, q: Scores, a: Scores, qa: Scores) -> str | None:
    """The released selection, as its script has it: the version that is kept, or None."""
    if q.ifd > ori.ifd:
        return "both" if qa.rifd < q.rifd and qa.rifd < 1 and qa.ifd < 1 else None
    return "response" if a.rifd < ori.rifd and a.rifd < 1 and a.ifd < 1 else None


class TestGrid:
    @given(SCORES, SCORES, SCORES, SCORES)
    @settings(max_examples=2000)
    def test_keeps_the_responses_that_the_released_selection_keeps(
        self, ori: Scores, q: Scores, a: Scores, qa: Scores
    ) -> None:
        version = choose_in_grid(ori, q, a, qa, max_ifd=1.0, max_rifd=1.0).version
        kept = released(ori, q, a, qa)
        assert version == kept or (kept is None and version in ("none", "instruction"))

    @given(SCORES, SCORES, SCORES, SCORES, st.lists(st.booleans(), min_size=7, max_size=7))
    @settings(max_examples=1000)
    def test_a_missing_score_or_text_is_one_that_compares_false(
        self, ori: Scores, q: Scores, a: Scores, qa: Scores, gone: list[bool]
    ) -> None:
        nothing = Scores(math.nan, math.nan)
        present = [
            None if missing else scores
            for missing, scores in zip(gone[4:], (q, a, qa), strict=True)
        ]
        first, *rest = (
            one and Scores(*(None if lost and math.isnan(value or 0) else value for value in one))
            for lost, one in zip(gone[:4], (ori, *present), strict=True)
        )
        compared = choose_in_grid(ori, *(one or nothing for one in present))
        assert choose_in_grid(first, *rest) == compared

    @given(SCORES, SCORES, SCORES, SCORES)
    @settings(max_examples=1000)
    def test_an_instruction_stands_alone_where_it_won_and_fits(
        self, ori: Scores, q: Scores, a: Scores, qa: Scores
    ) -> None:
        choice = choose_in_grid(ori, q, a, qa)
        alone = q.ifd > ori.ifd and q.ifd < 1 and released(ori, q, a, qa) is None
        assert (choice.version == "instruction") == alone

    @pytest.mark.parametrize(
        ("ifd", "rifd", "chosen"),
        [
            # IFD of ori and Q; r-IFD of what is compared and of the candidate.
            ((0.5, 0.6), (0.8, 0.7), ("both", "accepted", "accepted")),
            ((0.5, 0.5), (0.8, 0.7), ("response", "tie", "accepted")),
            ((0.5, 0.4), (0.8, 0.7), ("response", "rejected_by_student", "accepted")),
            ((0.5, None), (0.8, 0.7), ("response", "unscored", "accepted")),
            ((None, 0.6), (0.8, 0.7), ("response", "unscored", "accepted")),
            ((0.5, 0.6), (0.8, 0.8), ("instruction", "accepted", "tie")),
            ((0.5, 0.6), (0.8, 0.9), ("instruction", "accepted", "rejected_by_student")),
            ((0.5, 0.6), (0.8, None), ("instruction", "accepted", "unscored")),
            ((0.5, 0.6), (None, 0.7), ("instruction", "accepted", "unscored")),
            ((0.5, 0.6), (1.3, 1.2), ("instruction", "accepted", "uninformative")),
            ((0.5, 1.2), (0.8, 0.9), ("none", "misaligned", "rejected_by_student")),
            ((0.5, 1.2), (0.8, 0.7), ("both", "accepted", "accepted")),
            ((0.5, 0.4), (0.8, 0.9), ("none", "rejected_by_student", "rejected_by_student")),
        ],
    )
    def test_reasons(
        self,
        ifd: tuple[float | None, float | None],
        rifd: tuple[float | None, float | None],
        chosen: tuple[str, str, str],
    ) -> None:
        base, candidate = rifd
        choice = choose_in_grid(
            Scores(ifd[0], base), Scores(ifd[1], base), *[Scores(0.6, candidate)] * 2
        )
        assert choice == chosen

    def test_limits_are_options(self) -> None:
        low, high = Scores(0.5, 1.4), Scores(1.2, 1.3)
        assert choose_in_grid(low, None, high, None).response == "uninformative"
        assert choose_in_grid(low, None, high, None, max_rifd=None).response == "misaligned"
        free = choose_in_grid(low, None, high, None, max_rifd=None, max_ifd=None)
        assert free.version == "response"

    def test_margin_is_a_difference_of_logarithms(self) -> None:
        ori, q = Scores(0.5, 0.8), Scores(0.5 * math.exp(0.2), 0.8)
        better = Scores(0.6, 0.8 * math.exp(-0.2))
        assert choose_in_grid(ori, q, better, better, margin=0.19).version == "both"
        assert choose_in_grid(ori, q, better, better, margin=0.21) == ("none", "tie", "tie")
