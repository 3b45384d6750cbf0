"""Words, and runs of words as numbers: equal runs have equal numbers, others don't."""

from __future__ import annotations

import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.words import characters_per_word, hashed_words, words

ROOT = Path(__file__).resolve().parents[1]

INVISIBLE = "\xad\u034f\u1160\u200b\u2060\u3164\ufe0f"
ODD = INVISIBLE + "\u2013\u2014\ufe58\x00\x0b\x1c\x1f\x85\xa0\u2028\u3000İßﬁᏻ𠀀求ไ.“_ \n"
texts = st.lists(st.text(alphabet="ab. \n", max_size=30), max_size=8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Find  (the) “Sum”,\nof $x^2$ — ﬁve.", ["find", "the", "sum", "of", "$x^2$", "five"]),
        ("2+3? 2-3!", ["2+3", "2-3"]),
        ("求x的值。", ["求", "x", "的", "值"]),
        ("ひらカナ", ["ひ", "ら", "カ", "ナ"]),
        ("ไทย ab", ["ไ", "ท", "ย", "ab"]),
        ("𠀀𠀁", ["𠀀", "𠀁"]),
        ("한국어 문장", ["한국어", "문장"]),
        (" .\n", []),
        # Zero-width space, soft hyphen, joiners and selectors print nothing.
        (
            "ed\u200bgy so\u00adft wo\u034frd jo\u2060in e\u200b\u0301 heart\ufe0f",
            ["edgy", "soft", "word", "join", "é", "heart"],
        ),
        ("one—two, 3–4 – well-known", ["one", "two", "3", "4", "well-known"]),
        ("## Title\n<b>bold</b> ~gone~ | a/b |", ["title", "b>bold</b", "gone", "a/b"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("All human beings are born free and equal in dignity and rights.", 1),
        ("人人生而自由,在尊严和权利上一律平等。", 2),
        ("すべての人間は、生まれながらにして自由である。", 2),
        ("มนุษย์ทั้งหลายเกิดมามีอิสระ", 4),
        ("모든 인간은 태어날 때부터 자유로우며", 1),
        # Most of its words are of scripts with spaces; or not.
        ("The word 机器 means machine.", 1),
        ("用 Python 写一个函数", 2),
        ("", 1),
    ],
)
def test_characters_that_say_as_much_as_a_word(text: str, expected: int) -> None:
    assert characters_per_word(words(text)) == expected


def test_no_format_control_is_a_word() -> None:
    every = map(chr, range(sys.maxunicode + 1))
    controls = [character for character in every if unicodedata.category(character) == "Cf"]
    assert len(controls) > 150
    assert words("a".join(["", *controls, ""])) == ["a" * (len(controls) + 1)]
    assert words("".join(controls)) == []


@settings(max_examples=200)
@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=60))
def test_plain_text_takes_the_same_path_as_any_other(text: str) -> None:
    # A word that isn't ASCII sends the text through NFKC and the pattern.
    assert words(text + " é") == [*words(text), "é"]


@settings(max_examples=200)
@given(texts, st.integers(1, 4))
def test_ngrams_have_equal_numbers_where_they_are_equal(found: list[str], n: int) -> None:
    numbers, before = hashed_words(found).ngrams(n)
    expected = []
    for place, text in enumerate(found):
        mine = words(text)
        grams = [tuple(mine[i : i + n]) for i in range(max(len(mine) - n + 1, min(len(mine), 1)))]
        assert before[place + 1] - before[place] == len(grams)
        expected += grams
    assert len(numbers) == len(expected)
    pairs = list(zip(expected, numbers.tolist(), strict=True))
    assert all((a == b) == (m == k) for a, m in pairs for b, k in pairs)


@settings(max_examples=300)
@given(st.lists(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(ODD)))))
def test_hashed_words_are_the_words_of_any_text(found: list[str]) -> None:
    numbers, before = hashed_words(found).ngrams(1)
    lists = [words(text) for text in found]
    assert np.diff(before).tolist() == [len(one) for one in lists]
    flat = [word for one in lists for word in one]
    of = dict(zip(flat, numbers.tolist(), strict=True))
    assert [of[word] for word in flat] == numbers.tolist()
    assert len(set(of.values())) == len(of)


def test_white_space_at_the_end_of_a_full_array_belongs_to_no_word() -> None:
    draws = random.Random(0)
    for length in [64, 128] * 2000:
        end = "".join(draws.choice("ab. \n") for _ in range(draws.randrange(1, 30))) + "\n"
        found = ["".join(draws.choice("ab. \n") for _ in range(length - len(end))), end]
        _, before = hashed_words(found).ngrams(1)
        assert np.diff(before).tolist() == [len(words(text)) for text in found]


def test_numbers_are_the_same_in_every_process() -> None:
    code = "from stages.words import hashed_words; print(*hashed_words(['a b c']).ngrams(2)[0])"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[0]
        for seed in ("1", "2")
    }
    assert found == {str(hashed_words(["a b c"]).ngrams(2)[0][0])}


def test_a_long_text_keeps_its_numbers_behind_others() -> None:
    # Prefix sums wrap many times before the last text.
    many = [" ".join(f"w{i}" for i in range(20_000)), "one two three four"]
    numbers, before = hashed_words(many).ngrams(3)
    alone, _ = hashed_words(many[1:]).ngrams(3)
    assert np.array_equal(numbers[before[1] :], alone)
