"""What a rewrite is refused for whatever the student says: lost answers, texts of the targets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pyarrow as pa
import pytest
from reflection_fakes import SMALL, FakeTeacher, chat, reflect, rewriting, student, table

from stages.ingest.settings import ContaminationSettings
from stages.overlap import OverlapIndex
from stages.pass_rate.checker import AnswerChecker
from stages.reflection import ReflectionSettings, ReflectionStage
from stages.reflection.checks import RewriteChecks, unseen_texts
from stages.reflection.parsing import Rewrite
from stages.reflection.record import ReflectedRow, Version
from stages.rows import MESSAGES
from stages.storage import Store

ANSWERS = [
    ("math", "The change is 620 cents.", "620", None),
    ("math", "#### 620", "620", None),
    ("math", r"So it is \boxed{620}, not 3.", "620", None),
    ("math", "That is 1,620.00 in all.", "1620", None),
    ("math", r"That is $\frac{1}{2}$.", "0.5", None),
    ("math", "That is 1620 cents.", "620", "answer_missing"),
    ("math", "That is 620.5 cents.", "620", "answer_missing"),
    ("math", "They have 19 - 12 = 9 stamps.", "19", "answer_missing"),
    ("math", "620 cents, after 2 steps", "620", "answer_missing"),
    ("math", "It has no number.", "19", "answer_missing"),
    ("math", "It is -5.", "5", "answer_missing"),
    # Doubt: the comparison doesn't end.
    ("math", r"It is \boxed{9^{9^{9^{9}}}}.", "5", "answer_unverified"),
    ("normalised", "The answer is the Rhine.", "rhine", None),
    ("normalised", "The answer is the Elbe.", "rhine", "answer_missing"),
    ("exact", "It is\n(B)", "(B)", None),
    ("exact", "It is\n(b)", "(B)", "answer_missing"),
]


def test_answer_problems() -> None:
    rows = [
        ReflectedRow("id", check, {"none": Version(chat("Q", "A"), answer)})
        for check, _, answer, _ in ANSWERS
    ]
    with AnswerChecker(timeout_s=2) as checker:
        checks = RewriteChecks(checker, OverlapIndex([]))
        found = asyncio.run(checks.answer_problems(rows, [case[1] for case in ANSWERS]))
    assert list(zip(ANSWERS, found, strict=True)) == [(case, case[3]) for case in ANSWERS]


HASHES = r"####\s*(.+)$"


@pytest.mark.parametrize(
    ("pattern", "response", "answer", "problem"),
    [
        (None, "#### 987 \n(the key says 620)", "620", None),
        (HASHES, "#### 987 \n(the key says 620)", "620", "answer_missing"),
        (HASHES, "#### 987\nThe answer is \\boxed{620}", "620", "answer_missing"),
        (HASHES, "It is 620.\n#### 620", "620", None),
        (HASHES, "#### 1,620 \nThat makes 1620", "1620", None),
        (HASHES, "#### 0.5", r"\frac{1}{2}", None),
        (HASHES, r"#### \frac{1}{2}" + "\nor 0.5", "0.5", None),
        # The last place counts, as in the source.
        (HASHES, "#### 9\nNo:\n#### 620", "620", None),
        # Nothing to hold against the answer.
        (HASHES, "The change is 620 cents.", "620", None),
        (r"is (\w+)\.", "So it is 12. In all 620", "620", "answer_missing"),
        ("boxed", r"First \boxed{620}, then \boxed{9}. The answer is 620", "620", "answer_missing"),
        (HASHES, "#### 987", None, None),
    ],
)
def test_what_the_source_reads_from_a_response_must_be_the_answer(
    pattern: str | None, response: str, answer: str | None, problem: str | None
) -> None:
    row = ReflectedRow("id", "math", {"none": Version(chat("Q", "A"), answer)}, pattern)
    with AnswerChecker(processes=1) as checker:
        checks = RewriteChecks(checker, OverlapIndex([]))
        assert asyncio.run(checks.answer_problems([row], [response])) == [problem]


def test_a_row_without_answer_has_no_problem_and_order_is_kept() -> None:
    rows = [
        ReflectedRow(str(i), "math", {"none": Version([], answer)})
        for i, answer in enumerate(["1", None, "2", None, "3"])
    ]
    with AnswerChecker(processes=1) as checker:
        checks = RewriteChecks(checker, OverlapIndex([]))
        found = asyncio.run(checks.answer_problems(rows, ["1", "x", "9", "y", "3"]))
    assert found == [None, None, "answer_missing", None, None]


def test_new_response_must_keep_the_answer() -> None:
    rows = table([chat("Q", "It is 12."), chat("R", "It is 12!")], ["12", "12"])
    better = {"It is 12.": "It is 13.", "It is 12!": "That makes 12."}
    texts = [*better, *better.values()]
    judge = student(dict.fromkeys(texts, -0.5), {t: -0.1 * i for i, t in enumerate(texts)})
    lost, kept = reflect(rows, FakeTeacher(rewriting({}, better)), judge, phases="response")
    assert lost["reflection_response_result"] == "answer_missing"
    assert (kept["reflection_outcome"], kept["answer_effective"]) == ("response", "12")


@pytest.mark.parametrize("mode", ["sequential", "grid"])
def test_answer_of_a_new_instruction_is_null_unless_its_response_gives_it(mode: str) -> None:
    rewrites = {"Q": Rewrite("Q2", "It makes 12."), "R": Rewrite("R2", "It makes 13.")}
    better = {"It makes 12.": "No idea, 7.", "It makes 13.": "No idea, 8."}
    texts = ["It is 12.", "It makes 12.", "It makes 13.", "No idea, 7.", "No idea, 8."]
    ifd = dict.fromkeys(texts, -0.3) | {"It is 12.": -0.5}
    judge = student(ifd, {text: -0.1 * place for place, text in enumerate(texts)})
    rows = table([chat("Q", "It is 12."), chat("R", "It is 12.")], ["12", "12"])
    verified, other = reflect(rows, FakeTeacher(rewriting(rewrites, better)), judge, mode=mode)
    assert (verified["reflection_outcome"], verified["answer_effective"]) == ("instruction", "12")
    # What was verified has to stay so in phase 2.
    assert verified["reflection_response_result"] == "answer_missing"
    assert (other["reflection_outcome"], other["answer_effective"]) == ("both", None)


def test_no_response_is_paid_for_where_the_answer_cannot_be_compared() -> None:
    rows = table([chat("Q", "A"), chat("R", "D")], ["two\nlines", None])
    teacher = FakeTeacher(rewriting({}, {"A": "C", "D": "E"}))
    judge = student(dict.fromkeys("ACDE", -0.5), {"A": -0.1, "C": -0.5, "D": -0.1, "E": -0.5})
    settings = {"phases": "response", "checks": {"sums": "exact"}}
    unreadable, free = reflect(rows, teacher, judge, **settings)
    assert unreadable["reflection_response_result"] == "answer_unreadable"
    assert unreadable["teacher_tokens"] == 0
    assert free["reflection_outcome"] == "response"
    assert [len(call) for call in teacher.calls] == [1]


QUESTION = "How many clips did Natalia sell altogether in April and in May of that year?"
SOLUTION = "In April she sold 48 clips, and in May half as many, 24, which makes 72 of them."


def test_texts_of_targets() -> None:
    """Their questions, and answers that are long enough to be told from any other's."""
    messages = [
        chat(QUESTION, SOLUTION, ("system", "You are a helpful assistant that answers briefly.")),
        chat("Is it so?", "Yes."),
        [{"role": "user", "content": "Without an answer"}],
    ]
    targets = pa.table(
        {"source": ["gsm8k", "bbh", "bbh"], "messages": pa.array(messages, MESSAGES)}
    )
    assert list(unseen_texts(targets)) == [
        ("gsm8k", QUESTION),
        ("gsm8k", SOLUTION),
        ("bbh", "Is it so?"),
        ("bbh", "Without an answer"),
    ]


def test_a_rewrite_that_brings_in_a_target_is_refused_with_the_name_of_the_set(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    messages = pa.array([chat(QUESTION, SOLUTION), chat("Is it so?", "Yes.")], MESSAGES)
    targets = pa.table({"source": ["gsm8k", "bbh"], "messages": messages})
    store.write_table("part-00000.parquet", targets)
    rewrites = {
        "Q0": Rewrite("is it SO", "B0"),
        "Q1": Rewrite("Mind: " + QUESTION, "B1"),
        "Q2": Rewrite("Q2, harder", "I recall: " + SOLUTION),
        # Only the whole of a short text counts, and a short answer doesn't.
        "Q3": Rewrite("Is it so, and why?", "Yes."),
        "Q4": Rewrite("Q4, harder", "B4"),
    }
    better = {"A0": SOLUTION.upper(), "A1": "C1", "Yes.": "C3", "B4": QUESTION}
    rows = table([chat(f"Q{i}", f"A{i}") for i in range(5)])
    texts = [f"{name}{i}" for name in "ABC" for i in range(5)] + ["Yes.", *better.values()]
    texts += [rewrite.response for rewrite in rewrites.values()]
    ifd = {text: -0.5 if text.startswith("A") else -0.3 for text in texts}
    rifd = {text: -0.9 if text.startswith("C") else -0.1 for text in texts}
    stage = ReflectionStage(
        ReflectionSettings(reply="tagged", max_new_tokens=64),
        {"teacher": SMALL, "student": SMALL},
        seed=0,
        unseen=ContaminationSettings(),
    )
    assert stage.artifacts() == ("unseen",)
    engines = {"teacher": FakeTeacher(rewriting(rewrites, better)), "student": student(ifd, rifd)}
    out = asyncio.run(stage.process(rows, engines, {"unseen": store})).to_pylist()
    results = [
        (row["reflection_instruction_result"], row["reflection_response_result"]) for row in out
    ]
    assert results == [
        ("overlaps: bbh", "overlaps: gsm8k"),
        ("overlaps: gsm8k", "accepted"),
        ("overlaps: gsm8k", "missing_tag"),
        ("accepted", "accepted"),
        ("accepted", "overlaps: gsm8k"),
    ]
    # A refused text is in no column.
    assert QUESTION not in str(out)
    assert SOLUTION not in str(out)

    # Another set of targets under the same name is read anew.
    store.write_table("part-00000.parquet", targets.slice(1))
    out = asyncio.run(stage.process(rows.slice(1, 1), engines, {"unseen": store})).to_pylist()
    assert out[0]["reflection_instruction_result"] == "accepted"
