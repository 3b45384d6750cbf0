"""The reflection stage: what a shard looks like afterwards, in both modes."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from typing import Any

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

from stages.engines import Completion
from stages.errors import ConfigError, StageError
from stages.reflection import ReflectionSettings, ReflectionStage
from stages.reflection.parsing import Rewrite
from stages.reflection.prompts import read_prompts
from stages.rows import Message

PROMPTS = read_prompts(None)


VERSIONS = ("before", "instruction", "response", "both", "effective")


def logs(row: dict[str, Any], kind: str) -> list[float | None]:
    """Logarithms of a row's scores, version by version, to four places."""
    values = [row[f"{kind}_{version}"] for version in VERSIONS]
    return [None if value is None else round(math.log(value), 4) for value in values]


class TestStage:
    def test_outcomes_scores_and_order(self) -> None:
        """Five rows that end in the paper's four outcomes and a failed one, in input order."""
        rows = table(
            [
                chat("Q both", "A both"),
                chat("Q instruction", "A instruction"),
                [{"role": "user", "content": "no reply"}],
                chat("Q response", "A response"),
                chat("Q none", "A none"),
            ],
            ["1", "2", "3", None, "5"],
        )
        teacher = FakeTeacher(
            rewriting(
                {
                    "Q both": Rewrite("Q2 both", "B both"),
                    "Q instruction": Rewrite("Q2 instruction", "B instruction"),
                    "Q response": Rewrite("Q2 response", "B response"),
                },
                {"B both": "C both", "B instruction": "C instruction", "A response": "C response"},
            )
        )
        ifd = {"A both": -0.5, "B both": -0.2, "C both": -0.1, "A instruction": -0.5}
        ifd |= {"B instruction": -0.4, "A response": -0.3, "B response": -0.6, "C response": -0.7}
        ifd |= {"A none": -0.8}
        rifd = {"A both": -0.1, "B both": -0.2, "C both": -0.9, "A instruction": -0.1}
        rifd |= {"B instruction": -0.5, "C instruction": -0.4, "A response": -0.2}
        rifd |= {"C response": -0.3, "A none": -0.2}
        judge = student(ifd, rifd)
        both, changed, failed, response, none = reflect(rows, teacher, judge, rifd=True)

        assert [r["reflection_outcome"] for r in (both, changed, failed, response, none)] == [
            "both",
            "instruction",
            "failed",
            "response",
            "none",
        ]
        assert [m["content"] for m in both["messages_reflected"]] == ["Q2 both", "C both"]
        assert [m["content"] for m in changed["messages_reflected"]] == [
            "Q2 instruction",
            "B instruction",
        ]
        assert [m["content"] for m in response["messages_reflected"]] == [
            "Q response",
            "C response",
        ]
        assert none["messages_reflected"] is None

        results = [
            (r["reflection_instruction_result"], r["reflection_response_result"])
            for r in (both, changed, failed, response, none)
        ]
        assert results == [
            ("accepted", "accepted"),
            ("accepted", "rejected_by_student"),
            (None, None),
            ("rejected_by_student", "accepted"),
            ("missing_tag", "missing_tag"),
        ]
        # An unreadable reply is an outcome, not a failed row.
        assert none["reflection_status"] == "ok"
        assert failed["reflection_status"].startswith("failed: no_response")
        assert failed["teacher_tokens"] is None

        # ln IFD and ln r-IFD of what came in, of each version offered, and of what stands.
        assert logs(both, "ifd") == [-0.5, -0.2, None, -0.1, -0.1]
        assert logs(both, "rifd") == [-0.1, -0.2, None, -0.9, -0.9]
        assert logs(changed, "ifd") == [-0.5, -0.4, None, None, -0.4]
        assert logs(changed, "rifd") == [-0.1, -0.5, None, -0.4, -0.5]
        assert logs(response, "ifd") == [-0.3, -0.6, -0.7, None, -0.7]
        assert logs(response, "rifd") == [-0.2, None, -0.3, None, -0.3]
        assert logs(none, "ifd") == [-0.8, None, None, None, -0.8]
        assert both["reverse_loss_both"] == pytest.approx(ALONE - 0.9)
        assert both["reflection_teacher"] == SMALL.model
        assert both["teacher_tokens"] > 0 < both["teacher_prompt_tokens"]
        # An answer belongs to its instruction.
        assert [r["answer_effective"] for r in (both, changed, failed, response, none)] == [
            None,
            None,
            "3",
            None,
            "5",
        ]

    @pytest.mark.parametrize("failing", ["original", "instruction", "response", "winner"])
    def test_failed_score_never_accepts(self, failing: str) -> None:
        """The published scorer's (0, 0) wins phase 2; here a missing score keeps the original."""
        ifd = {"A": -0.5, "B": -0.9 if failing != "instruction" else math.nan, "C": -0.4}
        rifd = {"A": -0.1, "C": -0.5}
        if failing == "original":
            ifd["A"] = math.nan
        if failing == "response":
            rifd["C"] = math.nan
        if failing == "winner":
            ifd["C"] = math.nan
        phases = "instruction" if failing == "instruction" else "both"
        teacher = FakeTeacher(rewriting({"Q": Rewrite("Q2", "B")}, {"A": "C"}))
        (row,) = reflect(table([chat("Q", "A")]), teacher, student(ifd, rifd), phases=phases)
        assert row["messages_reflected"] is None
        if failing == "original":
            assert row["reflection_status"].startswith("failed: ")
            assert not teacher.calls
        else:
            assert row["reflection_outcome"] == "none"
            column = "instruction" if failing == "instruction" else "response"
            assert row[f"reflection_{column}_result"] == "unscored"
            assert row["ifd_effective"] == pytest.approx(math.exp(-0.5))

    def test_response_that_does_not_fit_its_instruction_is_refused(self) -> None:
        teacher = FakeTeacher(rewriting({}, {"A": "C"}))
        judge = student({"A": -0.5, "C": 0.3}, {"A": -0.1, "C": -0.5})
        (row,) = reflect(table([chat("Q", "A")]), teacher, judge, phases="response")
        assert row["reflection_response_result"] == "misaligned"
        assert row["messages_reflected"] is None
        (row,) = reflect(table([chat("Q", "A")]), teacher, judge, phases="response", max_ifd=None)
        assert row["reflection_outcome"] == "response"

    @pytest.mark.parametrize(
        ("phases", "outcome", "calls"),
        [("both", "both", 2), ("instruction", "instruction", 1), ("response", "response", 1)],
    )
    def test_phases(self, phases: str, outcome: str, calls: int) -> None:
        teacher = FakeTeacher(rewriting({"Q": Rewrite("Q2", "B")}, {"A": "C", "B": "C"}))
        judge = student({"A": -0.5, "B": -0.3, "C": -0.4}, {"A": -0.1, "B": -0.2, "C": -0.5})
        (row,) = reflect(table([chat("Q", "A")]), teacher, judge, phases=phases)
        assert row["reflection_outcome"] == outcome
        assert len(teacher.calls) == calls
        skipped = {"both": [], "instruction": ["response"], "response": ["instruction"]}[phases]
        assert all(row[f"reflection_{name}_result"] is None for name in skipped)

    def test_new_response_must_keep_the_answer(self) -> None:
        rows = table([chat("Q", "It is 12."), chat("R", "It is 12!")], ["12", "12"])
        better = {"It is 12.": "It is 13.", "It is 12!": "That makes 12."}
        texts = [*better, *better.values()]
        judge = student(dict.fromkeys(texts, -0.5), {t: -0.1 * i for i, t in enumerate(texts)})
        lost, kept = reflect(rows, FakeTeacher(rewriting({}, better)), judge, phases="response")
        assert lost["reflection_response_result"] == "answer_missing"
        assert (kept["reflection_outcome"], kept["answer_effective"]) == ("response", "12")

    def test_whole_replies_ask_for_instruction_and_answer_in_turn(self) -> None:
        """Both or neither: without an answer the new instruction is dropped."""

        def reply(prompt: str) -> str | Completion:
            last = prompt.rsplit("<|im_start|>user\n", 1)[1]
            if "more demanding version" in last:
                return "Q2" if "Task: Q\n" in last else "R2"
            if last.startswith("Q2"):
                return "B"
            return Completion((1, 2), "cut o", "length", -1.0) if last.startswith("R2") else "x"

        teacher = FakeTeacher(reply)
        judge = student({"A": -0.5, "B": -0.3, "D": -0.5}, {"A": -0.1, "B": -0.2, "D": -0.1})
        rows = table([chat("Q", "A"), chat("R", "D")])
        first, second = reflect(rows, teacher, judge, reply="whole", phases="instruction")
        assert [m["content"] for m in first["messages_reflected"]] == ["Q2", "B"]
        assert second["messages_reflected"] is None
        assert second["reflection_instruction_result"] == "truncated"
        assert [len(call) for call in teacher.calls] == [2, 2]

    def test_teacher_sees_earlier_turns_and_they_are_kept(self) -> None:
        before = (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"))
        rows = table([chat("Q", "A", *before)])
        teacher = FakeTeacher(rewriting({"Q": Rewrite("Q2", "B")}, {"B": "C"}))
        judge = student({"A": -0.5, "B": -0.3, "C": -0.2}, {"A": -0.1, "B": -0.2, "C": -0.5})
        (row,) = reflect(rows, teacher, judge)
        contents = [m["content"] for m in row["messages_reflected"]]
        assert contents == ["Be brief.", "Hello", "Hi", "Q2", "C"]
        for (request,) in teacher.calls:
            asked = TOKENIZER.decode(request.prompt)
            assert all(text in asked for text in ("system: Be brief.", "user: Hello"))
        for reply in ("tagged", "json", "whole"):
            for ask in (PROMPTS.instruction_prompt, PROMPTS.response_prompt):
                asked = " ".join(m["content"] for m in ask(chat("Q", "A", *before), reply))
                assert all(text in asked for text in ("Be brief.", "Hello", "Hi", "Q"))

    def test_seeds_belong_to_row_and_purpose(self) -> None:
        """They depend neither on the shard's other rows nor on their order."""
        conversations = [chat(f"Q{i}", f"A{i}") for i in range(4)]
        judge = student({f"A{i}": -0.5 for i in range(4)}, {f"A{i}": -0.1 for i in range(4)})

        def seeds(rows: pa.Table) -> dict[str, tuple[int, ...]]:
            teacher = FakeTeacher(lambda prompt: "No idea.")
            reflect(rows, teacher, judge)
            per_call = [[request.seed for request in call] for call in teacher.calls]
            return dict(zip(rows["id"].to_pylist(), zip(*per_call, strict=True), strict=True))

        whole = seeds(table(conversations))
        assert len({seed for pair in whole.values() for seed in pair}) == 8
        assert all(0 <= seed < 2**64 for pair in whole.values() for seed in pair)
        for part in (conversations[2:], conversations[::-1]):
            for row, pair in seeds(table(part)).items():
                assert whole[row] == pair

    def test_prompt_too_long_for_the_teacher_keeps_the_row(self) -> None:
        rows = table([chat("Q " * 400, "A"), chat("R", "D")])
        models = {"teacher": SMALL.model_copy(update={"max_length": 500}), "student": SMALL}
        teacher = FakeTeacher(rewriting({"R": Rewrite("R2", "E")}, {}))
        judge = student({"A": -0.5, "D": -0.5, "E": -0.3}, {"A": -0.1, "D": -0.1, "E": -0.1})
        long, short = reflect(rows, teacher, judge, models)
        assert long["reflection_status"] == "ok"
        assert long["reflection_outcome"] == "none"
        assert long["reflection_instruction_result"] == "prompt_too_long"
        assert long["teacher_tokens"] == 0
        assert short["reflection_outcome"] == "instruction"

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            ([], "no_response"),
            ([{"role": "assistant", "content": "A"}], "no_response"),
            (chat("Q", " "), "empty_response"),
            (chat("", "A"), "empty_instruction"),
            (
                [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "", "tool_calls": "[]"},
                    {"role": "tool", "content": "3"},
                    {"role": "assistant", "content": "A"},
                ],
                "no_instruction: a tool turn",
            ),
            (
                [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A", "tool_calls": "[{}]"},
                ],
                "tool_call",
            ),
        ],
    )
    def test_unusable_turns_are_failed_rows(self, messages: list[Message], reason: str) -> None:
        teacher = FakeTeacher(lambda prompt: "No idea.")
        judge = student({"D": -0.5}, {"D": -0.1})
        bad, good = reflect(table([messages, chat("R", "D")]), teacher, judge)
        assert bad["reflection_status"].startswith(f"failed: {reason}")
        assert bad["reflection_outcome"] == "failed"
        assert bad["ifd_effective"] is None
        assert good["reflection_status"] == "ok"

    def test_no_rows(self) -> None:
        assert reflect(table([]), FakeTeacher(str), student({}, {})) == []

    def test_too_many_failures_stop_the_stage(self) -> None:
        rows = table([chat("Q", "A"), chat("R", "D")])
        teacher = FakeTeacher(rewriting({"Q": Rewrite("Q2", "B")}, {}))
        judge = student({"A": -0.5, "D": -0.5, "B": -0.6}, {"A": -0.1, "D": -0.1})
        reflect(rows, teacher, judge, phases="instruction", max_failed_share=0.5)
        with pytest.raises(StageError, match=r"1 of 2 rewrites .*missing_tag 1.*max_failed_share"):
            reflect(rows, teacher, judge, phases="instruction", max_failed_share=0.4)

    def test_unknown_model(self) -> None:
        with pytest.raises(ConfigError, match=r"reflection\.student: no model named 'student'"):
            ReflectionStage(ReflectionSettings(), {"teacher": SMALL}, seed=0)


def test_import_loads_no_model_library() -> None:
    code = (
        "import sys, stages.reflection, stages.reflection.stage;"
        "print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_real_model() -> None:
    """Eight rows, 24 new tokens: whatever a 135M teacher writes, the columns agree."""
    from stages.engines.generator import TransformersGenerator
    from stages.engines.local import LocalHandle
    from stages.engines.scorer import TransformersScorer

    questions = ["Name a fruit.", "What is 2 + 3?", "Name a river.", "Say hello."]
    questions += ["Name a colour.", "What is a cat?", "Name a month.", "Is ice cold?"]
    replies = ["Apple.", "5", "The Rhine.", "Hello!", "Blue.", "An animal.", "May.", "Yes."]
    rows = table([chat(q, a) for q, a in zip(questions, replies, strict=True)])
    settings = ReflectionSettings(reply="whole", max_new_tokens=24)
    stage = ReflectionStage(settings, {"teacher": SMALL, "student": SMALL}, seed=0)
    engines = {
        "teacher": LocalHandle(TransformersGenerator(SMALL)),
        "student": LocalHandle(TransformersScorer(SMALL)),
    }
    out = asyncio.run(stage.process(rows, engines, {})).to_pylist()
    assert len(out) == 8
    assert any(row["ifd_instruction"] is not None for row in out)
    for row in out:
        assert row["reflection_status"] == "ok"
        assert row["teacher_tokens"] > 0
        changed = row["reflection_outcome"] != "none"
        assert (row["messages_reflected"] is not None) == changed
        if row["reflection_outcome"] == "none":
            assert row["ifd_effective"] == row["ifd_before"]
        if row["reflection_instruction_result"] == "accepted":
            assert row["ifd_before"] < row["ifd_instruction"] < 1
        if row["reflection_outcome"] == "response":
            losses = [row[f"reverse_loss_{name}"] for name in ("effective", "response", "before")]
            assert losses[0] == losses[1] < losses[2]


def test_read_losses_are_those_of_the_real_model() -> None:
    """Over the same rows difficulty and reflection ask alike, so every bit agrees."""
    from stages.difficulty.settings import DifficultySettings
    from stages.difficulty.stage import DifficultyStage
    from stages.engines.local import LocalHandle
    from stages.engines.scorer import TransformersScorer

    questions = ["Name a fruit.", "What is 2 + 3? Explain it.", "Name a river in Europe.", "Hi"]
    replies = ["Apple, or pear.", "It is 5, since 2 and 3 make 5.", "The Rhine.", "Hello there!"]
    rows = table([chat(q, a) for q, a in zip(questions, replies, strict=True)])
    models = {"teacher": SMALL, "student": SMALL}
    scorer = LocalHandle(TransformersScorer(SMALL))
    engines = {"student": scorer, "teacher": FakeTeacher(lambda prompt: "No idea.")}
    settings = ReflectionSettings(reply="tagged", max_new_tokens=64)

    async def process() -> list[pa.Table]:
        difficulty = DifficultyStage(DifficultySettings(), models)
        scored = await difficulty.process(rows, {"student": scorer}, {})
        beside = rows
        for name in scored.column_names:
            beside = beside.append_column(name, scored[name])
        reading = ReflectionStage(settings, models, 0, difficulty=DifficultySettings())
        computing = ReflectionStage(settings, models, 0)
        return [
            await stage.process(given.select(list(stage.columns().needs)), engines, {})
            for stage, given in ((reading, beside), (computing, rows))
        ]

    read, computed = asyncio.run(process())
    assert read["ifd_before"].null_count == 0
    assert read.equals(computed)
