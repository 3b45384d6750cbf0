"""Overlap with unseen texts: against the rule written out plainly, and on real evaluation sets."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.overlap import OverlapIndex, normalised
from stages.words import words

EULER = "What is the sum of all natural numbers below one thousand that three or five divide?"


def overlaps(text: str, unseen: str, n: int, short: int) -> bool:
    """The rule, by comparing every run with every run."""
    mine, theirs = words(text), words(unseen)
    if not mine or not theirs:
        return False
    length = min(n, len(theirs))
    runs = [theirs[i : i + length] for i in range(len(theirs) - length + 1)]
    shared = any(mine[i : i + length] in runs for i in range(len(mine) - length + 1))
    return mine == theirs or (length >= min(n, short) and shared)


few_words = st.lists(st.sampled_from("abc"), max_size=9).map(" ".join)
problems = given(
    st.lists(few_words, max_size=4),
    st.lists(few_words, max_size=4),
    st.integers(2, 5),
    st.integers(1, 5),
)


@settings(max_examples=400)
@problems
def test_every_overlap_is_found_and_no_other(
    found: list[str], unseen: Sequence[str], n: int, short: int
) -> None:
    index = OverlapIndex([(f"set {i}", text) for i, text in enumerate(unseen)], n=n, short=short)
    matches = index.matches(found)
    assert [index.match(text) for text in found] == matches
    for text, match in zip(found, matches, strict=True):
        assert (match is not None) == any(overlaps(text, one, n, short) for one in unseen)
        if match is not None:
            mine = f" {normalised(text)} "
            theirs = f" {normalised(unseen[int(match.set.removeprefix('set '))])} "
            assert f" {match.text} " in mine
            assert f" {match.text} " in theirs
            assert (match.kind == "exact") == (mine == theirs)


@pytest.mark.parametrize(
    ("text", "kind", "shared"),
    [
        (f"  {EULER.upper()} ", "exact", 16),
        (f"Solve this. {EULER} Think first.", "ngram", 16),
        ("Say what is the sum of all natural numbers below one thousand that three like", "ngram",
         13),
        ("Say what is the sum of all natural numbers below one thousand that four like", None, 0),
        ("The sum of all natural numbers below one thousand is what?", None, 0),
        ("Name the largest planet of our sun, please.", "ngram", 7),
        ("name the largest planet of our sun", "exact", 7),
        # Signs that print nothing, or only mark up, hide no word.
        ("Na\u200bme the lar\u00adgest pla\u2060net o\u034ff our s\ufe0fun", "exact", 7),
        ("# Name <the> largest~ |planet| of our sun /", "exact", 7),
        ("Riddle—name the largest planet of our sun–please", "ngram", 7),
        ("What is two plus two?", "exact", 5),
        ("Tell me: what is two plus two?", None, 0),
    ],
)  # fmt: skip
def test_long_short_and_shorter_texts(text: str, kind: str | None, shared: int) -> None:
    index = OverlapIndex(
        [
            ("euler", EULER),
            ("planets", "Name the largest planet of our sun."),
            ("sums", "What is two plus two?"),
        ]
    )
    match = index.match(text)
    assert (match.kind if match else None) == kind
    assert len(match.text.split() if match else []) == shared


TWINS = {
    "Chinese": {"a": "甲乙", "b": "丙丁", "c": "戊己"},
    "Japanese": {"a": "ある", "b": "カメ", "c": "何度"},
    "Thai": {"a": "กขคง", "b": "จชซญ", "c": "ดตถท"},
}


@pytest.mark.parametrize("script", TWINS)
@settings(max_examples=200)
@problems
def test_scripts_without_spaces_overlap_where_their_words_do(
    script: str, found: list[str], unseen: list[str], n: int, short: int
) -> None:
    def twin(text: str) -> str:
        return "".join(TWINS[script][word] for word in text.split())

    def kinds(mine: list[str], theirs: list[str]) -> list[tuple[str, str] | None]:
        index = OverlapIndex([(f"set {i}", one) for i, one in enumerate(theirs)], n=n, short=short)
        return [match and (match.set, match.kind) for match in index.matches(mine)]

    assert kinds([twin(text) for text in found], [twin(text) for text in unseen]) == kinds(
        found, unseen
    )


@pytest.mark.parametrize(
    ("unseen", "inside", "whole"),
    [
        (
            "What is machine learning?",
            "Write an essay on what is machine learning and how it relates to statistics.",
            "what is machine learning",
        ),
        (
            "什么是机器学习？",
            "请写一篇文章，说明什么是机器学习，以及它和统计的关系。",
            "什么是机器学习",
        ),
        (
            "機械学習とは何？",
            "「機械学習とは何？」という題で作文を書いてください。",
            "機械学習とは何",
        ),
    ],
)
def test_a_few_common_words_reject_no_longer_text_in_any_script(
    unseen: str, inside: str, whole: str
) -> None:
    index = OverlapIndex([("target", unseen)])
    assert index.match(inside) is None
    assert index.match(whole) == ("target", "exact", normalised(unseen))


@pytest.mark.parametrize(
    ("unseen", "other"),
    [
        (
            "小明每天早上骑自行车去学校，路上要花二十分钟，回家时因为上坡要多花五分钟。",
            "题目：小明每天早上骑自行车去学校，路上要花二十分钟，回家时因为上坡，要骑多久？",
        ),
        (
            "花子さんは毎朝七時に家を出て、駅まで歩いて十五分かかり、そこから電車に乗ります。",
            "問題：花子さんは毎朝七時に家を出て、駅まで歩いて十五分かかり、では何時に着きますか。",
        ),
        (
            "Every morning Tom rides his bicycle to school, which takes him twenty minutes uphill.",
            "Every morning Tom rides his bicycle to school, which takes him twenty minutes; why?",
        ),
    ],
)
def test_a_long_run_is_found_in_any_script(unseen: str, other: str) -> None:
    match = OverlapIndex([("target", unseen)]).match(other)
    assert match is not None
    assert match.kind == "ngram"


def test_texts_without_a_word_match_nothing() -> None:
    index = OverlapIndex([("a", "..."), ("b", "")])
    assert index.matches(["", "...", "?!"]) == [None, None, None]
    assert OverlapIndex([]).match("anything") is None
    assert OverlapIndex([("a", "one two")]).matches([]) == []
