"""Both modes through the stage: every verdict, tie, missing score and failure, row by row."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
from pydantic import ValidationError
from reflection_fakes import FakeTeacher, chat, reflect, rewriting, student, table

from stages.reflection import ReflectionSettings
from stages.reflection.parsing import Rewrite

NONE = math.nan
ORI = -0.5
BASE = 0.5
"""ln IFD of the original, and ln r-IFD of every text that a new response is compared with."""

PAIRS = {"fails": None, "lower": -0.6, "tie": ORI, "higher": -0.3, "misfit": 0.2, "unscored": NONE}
"""ln IFD of the teacher's pair."""


class Offer(NamedTuple):
    """ln r-IFD and ln IFD of a new response."""

    rifd: float
    ifd: float


OFFERS = {
    "fails": None,
    **{
        f"{rifd[0]}, {ifd[0]}": Offer(rifd[1], ifd[1])
        for rifd, ifd in itertools.product(
            [("lower", -0.3), ("not below 1", 0.2), ("tie", BASE), ("higher", 0.7), ("none", NONE)],
            [("fits", -0.4), ("misfit", 0.1), ("unscored", NONE)],
        )
    },
}
CASES = list(itertools.product(PAIRS, OFFERS))


def reflected(taken: str | None = None, **settings: Any) -> list[dict[str, Any]]:
    """One row a case. With `taken` the response to the other instruction wins everywhere."""
    rewrites, better, ifd, rifd = {}, {}, {}, {}
    rows = []
    for place, (pair, offer) in enumerate(CASES):
        rows.append(chat(f"Q{place}", f"A{place}"))
        ifd[f"A{place}"], rifd[f"A{place}"] = ORI, BASE
        if PAIRS[pair] is not None:
            rewrites[f"Q{place}"] = Rewrite(f"Q{place}, harder", f"B{place}")
            ifd[f"B{place}"], rifd[f"B{place}"] = PAIRS[pair], BASE
        # C answers the original instruction, D the teacher's.
        harder = pair in ("higher", "misfit")
        for answer, shown in (("C", "A"), ("D", "B")):
            made = OFFERS[offer]
            if taken == "other" and (answer == "D") != harder:
                made = Offer(-0.9, -0.4)
            if made is not None:
                better[f"{shown}{place}"] = f"{answer}{place}"
                rifd[f"{answer}{place}"], ifd[f"{answer}{place}"] = made
    teacher = FakeTeacher(rewriting(rewrites, better))
    out = reflect(table(rows), teacher, student(ifd, rifd), **settings)
    for row, place in zip(out, range(len(CASES)), strict=True):
        turns = row["messages_reflected"]
        row["texts"] = [turn["content"] for turn in turns] if turns else None
        assert (
            row["texts"]
            == {
                "none": None,
                "instruction": [f"Q{place}, harder", f"B{place}"],
                "response": [f"Q{place}", f"C{place}"],
                "both": [f"Q{place}, harder", f"D{place}"],
            }[row["reflection_outcome"]]
        )
    return out


def below(value: float, limit: float | None) -> bool:
    return limit is None or value < limit


class TestSequential:
    @pytest.mark.parametrize(("max_ifd", "max_rifd"), [(1.0, None), (None, None), (1.0, 1.0)])
    def test_every_case(self, max_ifd: float | None, max_rifd: float | None) -> None:
        rows = reflected(max_ifd=max_ifd, max_rifd=max_rifd)
        top = None if max_ifd is None else 0.0
        for (pair, offer), row in zip(CASES, rows, strict=True):
            ifd, made = PAIRS[pair], OFFERS[offer]
            first = ifd is not None and ifd > ORI and below(ifd, top)
            second = (
                made is not None
                and made.rifd < BASE
                and below(made.rifd, None if max_rifd is None else 0.0)
                and made.ifd < (math.inf if top is None else top)
            )
            expected = [["none", "response"], ["instruction", "both"]][first][second]
            assert row["reflection_outcome"] == expected, (pair, offer)

    def test_reasons(self) -> None:
        rows = dict(zip(CASES, reflected(max_rifd=1.0), strict=True))
        assert [rows[pair, "fails"]["reflection_instruction_result"] for pair in PAIRS] == [
            "missing_tag",
            "rejected_by_student",
            "tie",
            "accepted",
            "misaligned",
            "unscored",
        ]
        assert {
            offer: rows["tie", offer]["reflection_response_result"]
            for offer in OFFERS
            if offer.endswith((", fits", "fails"))
        } == {
            "fails": "missing_tag",
            "lower, fits": "accepted",
            "not below 1, fits": "uninformative",
            "tie, fits": "tie",
            "higher, fits": "rejected_by_student",
            "none, fits": "unscored",
        }
        assert rows["tie", "lower, misfit"]["reflection_response_result"] == "misaligned"
        assert rows["tie", "lower, unscored"]["reflection_response_result"] == "unscored"

    def test_the_denominator_bears_on_no_verdict(self) -> None:
        """Phase 2 is the same by losses and by ratios: L(x) cancels."""
        verdicts = ("reflection_outcome", "reflection_response_result", "texts", "ifd_effective")
        by_loss, by_ratio = reflected(), reflected(rifd=True)
        for one, other in zip(by_loss, by_ratio, strict=True):
            assert [one[name] for name in verdicts] == [other[name] for name in verdicts]
        assert "rifd_effective" not in by_loss[0]
        assert by_ratio[0]["rifd_effective"] == pytest.approx(math.exp(BASE))

    def test_margin_keeps_what_is_close(self) -> None:
        for (pair, offer), row in zip(CASES, reflected(margin=0.25, max_ifd=None), strict=True):
            made = OFFERS[offer]
            first = pair == "misfit"
            second = made is not None and made.rifd <= 0.2 and math.isfinite(made.ifd)
            expected = [["none", "response"], ["instruction", "both"]][first][second]
            assert row["reflection_outcome"] == expected, (pair, offer)

    def test_without_selection_every_readable_rewrite_stands(self) -> None:
        for (pair, offer), row in zip(
            CASES, reflected(no_selection=True, max_ifd=None), strict=True
        ):
            expected = [["both", "instruction"], ["response", "none"]]
            assert row["reflection_outcome"] == expected[pair == "fails"][offer == "fails"]
            assert row["reflection_status"] == "ok"

    def test_without_selection_an_original_without_score_is_no_failure(self) -> None:
        teacher = FakeTeacher(rewriting({}, {"A": "C"}))
        judge = student({"A": math.nan, "C": -0.5}, {})
        settings = {"no_selection": True, "max_ifd": None, "phases": "response"}
        (row,) = reflect(table([chat("Q", "A")]), teacher, judge, **settings)
        assert (row["reflection_status"], row["reflection_outcome"]) == ("ok", "response")
        assert (row["ifd_before"], row["ifd_effective"]) == (None, pytest.approx(math.exp(-0.5)))


class TestGrid:
    @pytest.mark.parametrize("taken", [None, "other"])
    def test_every_case(self, taken: str | None) -> None:
        """The branch is chosen by the IFD of the pair alone; the other branch's win is no win."""
        rows = reflected(taken, mode="grid", max_rifd=1.0)
        for (pair, offer), row in zip(CASES, rows, strict=True):
            ifd, made = PAIRS[pair], OFFERS[offer]
            harder = ifd is not None and ifd > ORI
            kept = made is not None and made.rifd < BASE and made.rifd < 0 and made.ifd < 0
            if kept:
                expected = "both" if harder else "response"
            else:
                expected = "instruction" if harder and ifd < 0 else "none"
            assert row["reflection_outcome"] == expected, (pair, offer)

    def test_sequential_mode_differs_only_after_a_pair_that_does_not_fit(self) -> None:
        grid, sequential = (reflected(mode=mode, max_rifd=1.0) for mode in ("grid", "sequential"))
        differing = {
            pair
            for (pair, _), one, other in zip(CASES, grid, sequential, strict=True)
            if one["texts"] != other["texts"]
        }
        assert differing == {"misfit"}

    def test_all_versions_are_scored_and_asked_for(self) -> None:
        rewrites = {"Q": Rewrite("Q, harder", "B")}
        teacher = FakeTeacher(rewriting(rewrites, {"A": "C", "B": "D"}))
        ifd = {"A": -0.5, "B": -0.4, "C": -0.3, "D": -0.2}
        rifd = {"A": -0.1, "B": -0.15, "C": -0.2, "D": -0.25}
        (row,) = reflect(table([chat("Q", "A")]), teacher, student(ifd, rifd), mode="grid")
        versions = ("before", "instruction", "response", "both", "effective")
        for kind, logs in (("ifd", ifd), ("rifd", rifd)):
            found = [math.log(row[f"{kind}_{version}"]) for version in versions]
            assert found == pytest.approx([*logs.values(), logs["D"]], abs=1e-6)
        assert [len(call) for call in teacher.calls] == [1, 1, 1]
        assert row["teacher_prompt_tokens"] == sum(len(c[0].prompt) for c in teacher.calls)

    def test_a_cut_response_is_too_long_to_compare(self) -> None:
        rows = table([chat("Q", "A")])
        long = "word " * 600
        teacher = FakeTeacher(rewriting({}, {"A": long.strip()}))
        judge = student({"A": -0.5, long.strip(): -0.4}, {"A": -0.1, long.strip(): -0.9})
        judge.loss = lambda prompt, target: 3.0 if "user" not in prompt else 2.0
        models = {"teacher": _sized(2000), "student": _sized(400)}
        (row,) = reflect(rows, teacher, judge, models, mode="grid", max_new_tokens=1000)
        assert row["reflection_outcome"] == "none"
        assert row["reflection_response_result"] == "too_long"


def _sized(max_length: int) -> Any:
    from reflection_fakes import SMALL

    return SMALL.model_copy(update={"max_length": max_length})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "grid", "phases": "response"}, "leave phases out"),
        ({"mode": "grid", "no_selection": True, "max_ifd": None}, "grid is a selection"),
        ({"no_selection": True}, "max_ifd: null"),
        ({"no_selection": True, "max_ifd": None, "margin": 0.1}, "no score decide"),
        ({"phases": "instruction", "max_rifd": 1.0}, "rule for new responses"),
        ({"phases": "instruction", "require_response_rewrite": True}, "drop every row"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ReflectionSettings.model_validate(settings)
