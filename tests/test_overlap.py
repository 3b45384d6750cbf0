"""Overlap with unseen texts: checked against brute force over all pairs of word sequences."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.overlap import Overlap, OverlapIndex, normalised

QUESTION = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes "
    "muffins for her friends every day with four."
)
SHORT = "How many clips did Natalia sell altogether in April?"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (QUESTION, "exact"),
        (QUESTION.upper().replace(".", " ;") + "!", "exact"),
        ("Solve this: " + QUESTION, "ngram"),
        (" ".join(QUESTION.split()[5:18]), "ngram"),
        (" ".join(QUESTION.split()[5:17]), None),
        (QUESTION.replace("16", "19"), "ngram"),
        # Of 9 words: all of them in a row, and no fewer.
        (SHORT, "exact"),
        ("Tell me: how many clips did Natalia sell altogether in April, and in May?", "ngram"),
        ("How many clips did Natalia sell altogether in May?", None),
        # Of 4 words: as a whole only.
        ("what is 2 + 2", "exact"),
        ("What is 2 + 2? And what is 3 + 3?", None),
        ("", None),
        ("!!!", None),
    ],
)
def test_rule(text: str, kind: str | None) -> None:
    index = OverlapIndex([("gsm8k", QUESTION), ("gsm8k", SHORT), ("sums", "What is 2 + 2?")])
    found = index.match(text)
    assert (found.kind if found else None) == kind


def test_names_the_set_and_the_text() -> None:
    index = OverlapIndex([("a", SHORT), ("b", QUESTION), ("c", QUESTION), ("d", " ")])
    assert index.match(QUESTION) == Overlap("b", "exact", QUESTION)
    assert OverlapIndex([]).match(QUESTION) is None


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    chinese = "小明每天早上吃三个鸡蛋，还用四个鸡蛋给朋友做松饼。"
    index = OverlapIndex([("zh", chinese)])
    assert index.match("请看：小明每天早上吃三个鸡蛋，还用四个鸡蛋！") is not None
    assert index.match("小明每天早上吃") is None
    assert normalised("Ｎｏ． ４２ Straße 小明") == "no 42 strasse 小 明"


WORDS = st.lists(st.sampled_from("abc"), max_size=30).map(" ".join)


@given(st.lists(WORDS, max_size=4), WORDS)
@settings(max_examples=1000, derandomize=True)
def test_equals_brute_force(unseen: list[str], text: str) -> None:
    def overlap(one: str) -> bool:
        words, size = one.split(), min(13, len(one.split()))
        if not words:
            return False
        if words == text.split():
            return True
        mine = text.split()
        return size >= 8 and any(
            words[i : i + size] == mine[j : j + size]
            for i in range(len(words) - size + 1)
            for j in range(len(mine) - size + 1)
        )

    found = OverlapIndex(("set", one) for one in unseen).match(text)
    assert (found is not None) == any(map(overlap, unseen))
    assert found is None or overlap(found.text)
