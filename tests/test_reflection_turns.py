"""Several exchanges in one row, and an Alpaca record's way to the teacher."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from reflection_fakes import (
    ALONE,
    SMALL,
    TOKENIZER,
    FakeTeacher,
    chat,
    reflect,
    rewriting,
    student,
    table,
)

from stages.difficulty.settings import DifficultySettings
from stages.engines import Completion, Sampling, Usage
from stages.engines.chat import ChatFailure, ChatRequest
from stages.engines.settings import ModelSettings
from stages.ingest.parse import Row, iter_rows
from stages.reflection import ReflectionSettings, ReflectionStage
from stages.reflection.parsing import Rewrite
from stages.rows import Message, row_id
from stages.sources.settings import Source

BEHIND = ModelSettings.model_validate(
    {"model": "big", "engine": "openai", "endpoint": {"base_url": "http://host/v1"}}
)
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


def known_losses(rows: pa.Table, ifd: dict[str, float]) -> pa.Table:
    """With what difficulty would have found for the last response."""
    said = [messages[-1]["content"] for messages in rows["messages"].to_pylist()]
    given = [ALONE + ifd[text] for text in said]
    return (
        rows.append_column("loss_conditional", pa.array(given, pa.float32()))
        .append_column("loss_unconditional", pa.array([ALONE] * len(said), pa.float32()))
        .append_column("response_tokens", pa.array([2] * len(said), pa.int32()))
        .append_column("response_truncated", pa.array([False] * len(said)))
    )


def test_a_last_exchange_that_cant_be_reflected_on_keeps_its_score() -> None:
    """Unless the turns before it have changed, so that nobody knows what it would be."""
    call = chat("Q2", "A2", ("user", "Q1"), ("assistant", "A1"))
    call[-1]["tool_calls"] = "[{}]"
    stage = ReflectionStage(
        ReflectionSettings(reply="tagged", max_new_tokens=64, turns="every"),
        {"teacher": SMALL, "student": SMALL},
        seed=7,
        difficulty=DifficultySettings(student="student"),
    )
    rows = known_losses(table([call]), IFD)
    for better, kept in (({}, -0.6), ({"A1": "C1"}, None)):
        engines = {"teacher": FakeTeacher(rewriting({}, better)), "student": student(IFD, RIFD)}
        (row,) = asyncio.run(stage.process(rows, engines, {})).to_pylist()
        assert row["reflection_status"] == "ok"
        assert row["reflection_outcome"] == ("response" if better else "none")
        last = row["reflection_exchanges"][-1]
        assert last["outcome"] == "failed"
        for name in ("ifd_before", "ifd_effective"):
            assert row[name] == last[name]
            assert (row[name] and math.log(row[name])) == (kept and pytest.approx(kept))


class Endpoint:
    """A teacher behind an endpoint that doesn't answer where a prompt holds certain words."""

    def __init__(self, reply: Callable[[str], str], busy: Sequence[str]) -> None:
        self.reply = reply
        self.busy = busy
        self.spent = Usage(0, 0)

    async def chat(
        self, requests: Sequence[ChatRequest], sampling: Sampling
    ) -> list[Completion | ChatFailure]:
        return [self._answer(request.messages[-1]["content"]) for request in requests]

    def _answer(self, prompt: str) -> Completion | ChatFailure:
        if any(words in prompt for words in self.busy):
            return ChatFailure("rate_limited", "http://host/v1: Slow down.")
        text = self.reply(prompt)
        used = Usage(len(prompt), len(text))
        self.spent = Usage(self.spent[0] + used[0], self.spent[1] + used[1])
        return Completion((), text, "stop", -1.0, used)


@pytest.mark.parametrize(
    ("talk", "busy", "kept"),
    [
        # The response to the new instruction, the only exchange.
        (chat("Q2", "A2"), "B2", -0.6),
        # The same in the last exchange of two, after one that stands as it came.
        (chat("Q2", "A2", ("user", "Q0"), ("assistant", "D0")), "B2", -0.6),
        # After one that was rewritten, and in the first: what the last would be isn't known.
        (TALK, "B2", None),
        (TALK, "B1", None),
    ],
)
def test_a_row_that_its_endpoint_fails_keeps_what_is_known(
    talk: list[Message], busy: str, kept: float | None
) -> None:
    ifd, rifd = IFD | {"B2": -0.3, "D0": -0.5}, RIFD | {"D0": -0.1}
    pairs = {"Q1": Rewrite("P1", "B1"), "Q2": Rewrite("P2", "B2")}
    models = {"teacher": BEHIND, "student": SMALL}
    for mode in ("sequential", "grid"):
        teacher = Endpoint(rewriting(pairs, {"A1": "C1"}), [busy])
        (row,) = reflect(
            table([talk], ["4"]),
            teacher,
            student(ifd, rifd),
            models,
            turns="every",
            mode=mode,
            check="exact",
        )
        assert row["reflection_status"] == "failed: rate_limited: http://host/v1: Slow down."
        assert row["reflection_outcome"] == "failed"
        assert row["messages_reflected"] is None
        assert row["answer_effective"] == "4"
        assert row["reflection_teacher"] == "big"
        assert (row["teacher_prompt_tokens"], row["teacher_tokens"]) == teacher.spent
        assert teacher.spent.generated_tokens > 0
        for name in ("ifd_before", "ifd_effective"):
            assert (row[name] and math.log(row[name])) == (kept and pytest.approx(kept))
        assert row["ifd_instruction"] is None
        assert row["reflection_instruction_result"] is None


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
