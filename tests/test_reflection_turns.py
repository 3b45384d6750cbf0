"""Several exchanges in one row, and an Alpaca record's way to the teacher."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
from reflection_fakes import (
    SMALL,
    TOKENIZER,
    FakeTeacher,
    chat,
    reflect,
    rewriting,
    student,
    table,
)

from stages.ingest.parse import Row, iter_rows
from stages.reflection import ReflectionSettings, ReflectionStage
from stages.reflection.parsing import Rewrite
from stages.rows import row_id
from stages.sources.settings import Source

TALK = chat("Q2", "A2", ("system", "Be kind."), ("user", "Q1"), ("assistant", "A1"))
IFD = {"A1": -0.5, "B1": -0.3, "C1": -0.4, "A2": -0.6, "B2": -0.7, "C2": -0.5}
RIFD = {"A1": -0.1, "B1": -0.2, "C1": -0.3, "A2": -0.1, "C2": -0.4}


def test_every_exchange_is_shown_with_earlier_turns_as_they_stand() -> None:
    teacher = FakeTeacher(
        rewriting({"Q1": Rewrite("P1", "B1"), "Q2": Rewrite("P2", "B2")}, {"B1": "C1", "A2": "C2"})
    )
    (row,) = reflect(table([TALK]), teacher, student(IFD, RIFD), turns="every")
    assert [turn["content"] for turn in row["messages_reflected"]] == [
        "Be kind.",
        "P1",
        "C1",
        "Q2",
        "C2",
    ]
    asked = [TOKENIZER.decode(request.prompt) for call in teacher.calls for request in call]
    assert ["user: P1\n\nassistant: C1" in prompt for prompt in asked] == [False, False, True, True]
    assert all("system: Be kind." in prompt for prompt in asked)
    # The seed of an exchange is its own; the last one's is that of `turns: last`.
    seeds = [request.seed for call in teacher.calls for request in call]
    assert len(set(seeds)) == 4
    last = FakeTeacher(lambda prompt: "No idea.")
    reflect(table([TALK]), last, student(IFD, RIFD))
    assert seeds[2:] == [request.seed for call in last.calls for request in call]

    # The row's columns are those of its last exchange, but for what it has in all.
    assert row["reflection_outcome"] == "both"
    assert row["reflection_instruction_result"] == "rejected_by_student"
    assert row["reflection_response_result"] == "accepted"
    assert math.log(row["ifd_before"]) == pytest.approx(-0.6)
    assert math.log(row["ifd_effective"]) == pytest.approx(-0.5)
    first, second = row["reflection_exchanges"]
    assert (first["outcome"], second["outcome"]) == ("both", "response")
    assert math.log(first["ifd_before"]) == pytest.approx(-0.5)
    assert math.log(first["ifd_effective"]) == pytest.approx(-0.4)
    assert second["ifd_effective"] == row["ifd_effective"]
    assert row["teacher_tokens"] == first["teacher_tokens"] + second["teacher_tokens"]


def test_one_exchange_gives_the_columns_of_the_last() -> None:
    rows = table([chat("Q1", "A1"), chat("Q2", "A2")])
    reply = rewriting({"Q1": Rewrite("P1", "B1")}, {"B1": "C1", "A2": "C2"})
    last = reflect(rows, FakeTeacher(reply), student(IFD, RIFD))
    every = reflect(rows, FakeTeacher(reply), student(IFD, RIFD), turns="every")
    for one, other in zip(last, every, strict=True):
        assert {name: other[name] for name in one} == one
        assert len(other["reflection_exchanges"]) == 1


def test_an_exchange_that_calls_a_tool_is_left_and_the_others_are_not() -> None:
    call = [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1", "tool_calls": "[{}]"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "A2"},
    ]
    teacher = FakeTeacher(rewriting({}, {"A2": "C2"}))
    rows = table([call, call[:4], TALK[:4]])
    row, only, open_ = reflect(rows, teacher, student(IFD, RIFD), turns="every")
    assert [turn["content"] for turn in row["messages_reflected"]] == [
        *("Q1", "A1", "3", "It is 3.", "Q2", "C2")
    ]
    assert [part["outcome"] for part in row["reflection_exchanges"]] == ["failed", "response"]
    assert row["reflection_exchanges"][0]["error"].startswith("tool_call")
    assert only["reflection_status"].startswith("failed: tool_call")
    # The last turn is the user's: the exchange before it is reflected on all the same.
    assert open_["reflection_status"] == "ok"


def test_answer_of_the_row_belongs_to_its_last_exchange() -> None:
    """An earlier question that changed may change what is right, unless the answer is given."""
    talk = chat("And plus 1?", "It is 6.", ("user", "Q1"), ("assistant", "It is 3."))
    ifd = {"It is 3.": -0.5, "It is 4.": -0.3, "It is 6.": -0.5, "So it is 6.": -0.5, "No.": -0.5}
    rifd = {"It is 3.": -0.1, "It is 4.": -0.1, "It is 6.": -0.1, "So it is 6.": -0.4, "No.": -0.9}
    for better, answer, outcome in (
        ({}, None, "instruction"),
        ({"It is 6.": "So it is 6."}, "6", "both"),
        ({"It is 6.": "No."}, None, "instruction"),
    ):
        teacher = FakeTeacher(rewriting({"Q1": Rewrite("P1", "It is 4.")}, better))
        (row,) = reflect(table([talk], ["6"]), teacher, student(ifd, rifd), turns="every")
        assert (row["answer_effective"], row["reflection_outcome"]) == (answer, outcome)


@pytest.mark.parametrize("reply", ["tagged", "json", "whole"])
def test_input_of_an_alpaca_record_is_shown_to_the_teacher(tmp_path: Path, reply: str) -> None:
    record = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}
    (tmp_path / "alpaca.json").write_text(json.dumps([record]))
    (row,) = iter_rows(Source(name="alpaca", path=str(tmp_path / "alpaca.json")))
    assert isinstance(row, Row)
    teacher = FakeTeacher(lambda prompt: "No idea.")
    stage = ReflectionStage(
        ReflectionSettings(reply=reply, max_new_tokens=64),
        {"teacher": SMALL, "student": SMALL},
        seed=0,
    )
    rows = table([row.messages])
    assert rows["id"].to_pylist() == [row_id(row.messages, None)]
    judge = student({"Good day": -0.5}, {"Good day": -0.1})
    asyncio.run(stage.process(rows, {"teacher": teacher, "student": judge}, {}))
    prompts = [TOKENIZER.decode(request.prompt) for call in teacher.calls for request in call]
    assert len(prompts) >= 2
    # With `whole` a reply is taken for the new instruction, and its answer is asked for next.
    shown = [prompt for prompt in prompts if "No idea." not in prompt]
    assert len(shown) == 2
    assert all("Translate.\n\nGuten Tag" in prompt for prompt in shown)
