"""Synthesis: headers of chat templates, filters, and whole runs with scripted models.

Models are scripted at the engine boundary; tokenizer, templates, cache, answer checking, language
identification and ingest are the real ones.
"""

import asyncio
import copy
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, STUDENT
from endpoint_server import Answer, Asked, EndpointServer, refusal
from endpoint_server import reply as answered
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.rundir import opened_run, parts, read_columns
from pipeline.synthesize.config import read_synthesis
from pipeline.synthesize.prepare import prepared_training_file
from pipeline.synthesize.runner import Synthesized, synthesize
from stages.engines import Completion, GenerationRequest, Sampling
from stages.engines.chat import ChatRequest
from stages.engines.local import make_engine
from stages.engines.settings import ModelSettings
from stages.engines.tokens import text_ids
from stages.errors import ConfigError, EngineError, StageError
from stages.ingest import Row, iter_rows
from stages.pass_rate.rollouts import Tally
from stages.rows import key_hash
from stages.sources.settings import Source
from stages.storage import Store
from stages.synthesis.filters import reject_overlaps, reject_problems
from stages.synthesis.headers import end_of_turn_ids, user_header_ids
from stages.synthesis.language import check_languages, language_of
from stages.synthesis.ngrams import NgramOverlap, repeated_share, word_ngrams
from stages.synthesis.problems import sampled_problems
from stages.synthesis.sample import REASONS, Reject, Sample
from stages.synthesis.settings import FilterSettings, GeneratorSettings
from stages.synthesis.solutions import solution_of, solve, stated_answer
from stages.synthesis.student import solved_reject
from stages.synthesis.training import TrainingForm, training_example
from stages.synthesis.wording import REQUEST_WORDS, holds_solution, is_request

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '<|head|>system<|/head|>\n\nYou are "
    "helpful.<|eot|>' }}{% endif %}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>"
    "\n\n' + m['content'] + '<|eot|>' }}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] + "
    "'</turn>\n' }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] "
    "+ '[/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + "
    "m['content'] }}{% else %}{{ '<|Bot|>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SPECIAL = ["<s>", "</s>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>", "</turn>"]
SPECIAL += ["[INST]", "[/INST]", "<|User|>", "<|Bot|>"]


def with_template(tokenizer: Any, template: str, bos: str = "<s>") -> Any:
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": SPECIAL})
    other.chat_template = template
    other.bos_token, other.eos_token = bos, "</s>"
    return other


class TestHeaders:
    def test_student(self, student_tokenizer: Any) -> None:
        """What its template writes between a given system turn and the user's content."""
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "CONTENT"}]
        rendered = student_tokenizer.apply_chat_template(turns, tokenize=False)
        system, _, rest = rendered.partition("Be brief.<|im_end|>\n")
        header, _, end = rest.partition("CONTENT")
        assert system
        assert student_tokenizer.decode(user_header_ids(student_tokenizer)) == header
        assert end.rstrip() == student_tokenizer.decode(end_of_turn_ids(student_tokenizer))

    @pytest.mark.parametrize(
        ("template", "header", "end"),
        [
            (CHATML, "<|im_start|>user\n", "<|im_end|>"),
            (LLAMA, "<s><|head|>user<|/head|>\n\n", "<|eot|>"),
            (GEMMA, "<s><turn>user\n", "</turn>"),
            (MISTRAL, "<s>[INST]", "[/INST]"),
            (DEEPSEEK, "<s><|User|>", "</s>"),
        ],
        ids=["chatml", "llama", "gemma", "mistral", "deepseek"],
    )
    def test_templates(self, student_tokenizer: Any, template: str, header: str, end: str) -> None:
        tokenizer = with_template(student_tokenizer, template)
        assert tokenizer.decode(user_header_ids(tokenizer)) == header
        assert tokenizer.decode(end_of_turn_ids(tokenizer)) == end

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (None, "no chat template"),
            ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "nothing between turns"),
            ("{{ raise_exception('no turns today') }}", "no turns today"),
            (
                "{% for m in messages %}{{ m['content'] ~ 'Q' ~ loop.index }}{% endfor %}",
                "no header of user turns",
            ),
        ],
    )
    def test_no_header(self, student_tokenizer: Any, template: str | None, message: str) -> None:
        tokenizer = copy.deepcopy(student_tokenizer)
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=message):
            user_header_ids(tokenizer)


class TestTrainingFile:
    @pytest.mark.parametrize("own_bos", [False, True])
    def test_the_trainer_sees_the_header_and_one_bos(
        self, student_tokenizer: Any, own_bos: bool
    ) -> None:
        tokenizer = with_template(student_tokenizer, GEMMA)
        if own_bos:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
            )
        example = training_example(TrainingForm(tokenizer), " How many?\n")
        header = user_header_ids(tokenizer)
        assert tokenizer(example["prompt"])["input_ids"] == header
        both = tokenizer(example["prompt"] + example["completion"])["input_ids"]
        problem = text_ids(tokenizer, "How many?")
        assert both == [*header, *problem, *end_of_turn_ids(tokenizer)]
        assert both.count(tokenizer.bos_token_id) == 1

    def test_header_that_merges_with_the_problem(self, student_tokenizer: Any) -> None:
        """This tokenizer has one id for two newlines, but not where a word follows them."""
        tokenizer = with_template(student_tokenizer, LLAMA)
        alone = tokenizer("\n\n")["input_ids"]
        assert tokenizer("\n\nHow")["input_ids"][: len(alone)] != alone
        with pytest.raises(ConfigError, match="other ids than by themselves"):
            TrainingForm(tokenizer)


def words_text() -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(["a", "b", "c"]), max_size=12).map(" ".join)


class TestNgrams:
    @settings(max_examples=200)
    @given(st.lists(words_text(), max_size=4), words_text(), st.integers(1, 4))
    def test_containment_is_that_of_a_search_for_every_run(
        self, problems: list[str], text: str, n: int
    ) -> None:
        found = NgramOverlap(problems, n).containments([text])
        for place, problem in enumerate(problems):
            own = problem.split()
            if len(own) >= n:
                runs = {" ".join(own[i : i + n]) for i in range(len(own) - n + 1)}
                share = sum(f" {run} " in f" {text} " for run in runs) / len(runs)
            else:
                share = float(bool(own) and own == text.split())
            assert found.get(place, 0.0) == pytest.approx(share)

    def test_turns_are_not_read_on_into_each_other(self) -> None:
        overlap = NgramOverlap(["one two three four"], 4)
        assert overlap.containments(["one two", "three four"]) == {}
        assert overlap.containments(["zero", "one two three four five"]) == {0: 1.0}

    @pytest.mark.parametrize(("bound", "refused"), [(0.5, False), (0.49, True), (0.0, True)])
    def test_a_share_up_to_the_bound_is_allowed(self, bound: float, refused: bool) -> None:
        # Runs of 2: one two, two three; the row holds the first.
        sample = Sample(0, "one two three")
        reject_overlaps([sample], [("row 1", ["zero"]), ("row 2", ["one two"])], 2, bound)
        assert (sample.reject is not None) is refused
        if sample.reject:
            assert sample.reject == Reject("overlap", "50% of its 2-grams with row 2")

    def test_repeated_share_by_hand(self) -> None:
        # Runs of 2: ab ba ab ba ab; two of five are new.
        assert repeated_share("a b a b a b", 2) == pytest.approx(3 / 5)
        assert repeated_share("a b c d", 2) == 0
        assert repeated_share("", 2) == 0
        assert repeated_share("a", 2) == 0

    @settings(max_examples=100)
    @given(words_text(), st.integers(1, 4))
    def test_runs_cover_the_text_in_order(self, text: str, n: int) -> None:
        grams = word_ngrams(text, n)
        read = [gram[0] for gram in grams] + [word for gram in grams[-1:] for word in gram[1:]]
        assert read == text.split()


ENGLISH = r"\text{speed of the train} + \text{length of the bridge that it is crossing}"


class TestLanguage:
    def test_formulas_would_mislead(self) -> None:
        assert language_of(ENGLISH.replace(r"\text", "")).code == "en"

    @pytest.mark.parametrize(
        ("code", "text"),
        [
            ("en", "A gardener plants three rows of tulips. How many bulbs does she need in all?"),
            ("de", "Ein Gärtner pflanzt drei Reihen Tulpen. Wie viele Zwiebeln braucht er?"),
            ("fr", "Un jardinier plante trois rangées de tulipes. Combien de bulbes lui faut-il ?"),
            # The formula's letters alone would be of no language.
            ("de", f"Bestimme die kleinste ganze Zahl, für die gilt: ${ENGLISH}$."),
        ],
    )
    def test_sentences(self, code: str, text: str) -> None:
        found = language_of(text)
        assert found.code == code
        assert found.probability > 0.5

    def test_a_formula_alone_is_uncertain(self) -> None:
        assert language_of(r"$$\int_0^1 x\,dx = \frac{1}{2}$$").probability < 0.5

    @pytest.mark.parametrize(("bound", "reason"), [(0.5, None), (1.0, "language")])
    def test_uncertain_language_is_refused(self, bound: float, reason: str | None) -> None:
        sample = Sample(0, GOOD.format("six"))
        reject_problems([sample], FilterSettings(min_language_probability=bound))
        assert (sample.reject.reason if sample.reject else None) == reason

    def test_unknown_code(self) -> None:
        check_languages(["en", "de"])
        with pytest.raises(ConfigError, match="'english'"):
            check_languages(["en", "english"])


class TestWording:
    @pytest.mark.parametrize(
        ("text", "asked"),
        [
            ("Find all primes below 20.", True),
            ("Let n be a prime. Then prove that n + 1 is even.", True),
            ("If x = 3, compute x^2.", True),
            ("Two trains meet at noon. At what speed?", True),
            ("求x的值？", True),
            ("The finder of the ring was glad.", False),
            ("Suppose that n is prime.", False),
            ("We proved this before.", False),
        ],
    )
    def test_requests(self, text: str, asked: bool) -> None:
        assert is_request(text, REQUEST_WORDS) is asked

    def test_own_request_words(self) -> None:
        assert is_request("Bestimme alle Primzahlen.", ["bestimme"])
        assert not is_request("Find all primes.", [])

    @pytest.mark.parametrize(
        ("text", "held"),
        [
            ("Find x. Give it in \\boxed{}.", False),
            ("Find x. Give it in \\boxed{...}.", False),
            ("Find x. So x is \\boxed{3}.", True),
            ("Find x.\nSolution: x = 3", True),
            ("Find x.\n**Answer:** 3", True),
            ("The solution of this equation: is it real?", False),
        ],
    )
    def test_solutions(self, text: str, held: bool) -> None:
        assert holds_solution(text) is held


class TestSolutions:
    @pytest.mark.parametrize(
        ("reply", "answer"),
        [
            (r"So $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
            ("Add them.\n#### 72", "72"),
            ("The answer is 0.5.", "0.5"),
            ("**Answer:** 12", "12"),
            ("It follows that x = 3.", None),
            (r"<think>\boxed{1}</think>It is three.", None),
            (r"<think>\boxed{1}</think>It is \boxed{3}.", "3"),
            (r"\boxed{}", None),
        ],
    )
    def test_stated_answers(self, reply: str, answer: str | None) -> None:
        assert stated_answer(reply) == answer

    def test_reasoning_is_set_apart(self) -> None:
        opened = solution_of("<think>\nTwo and two.\n</think>\n\nFour.")
        assert (opened.reasoning, opened.text) == ("Two and two.", "Four.")
        # The template wrote the opening tag.
        assert solution_of("Two and two.\n</think>\n\nFour.") == opened
        assert solution_of("Four.").reasoning == ""

    def test_seeds_belong_to_the_problem(self) -> None:
        """They depend neither on the sample's number nor on the other samples."""

        def seeds(samples: list[Sample]) -> dict[str, int]:
            asked: list[ChatRequest] = []

            class Recorder:
                async def chat(self, requests: Any, sampling: Any) -> list[Completion]:
                    asked.extend(requests)
                    return [CUT] * len(requests)

            asyncio.run(solve(samples, Recorder(), None, Sampling(9), FilterSettings(), 1))
            problems = [sample.problem for sample in samples]
            return dict(zip(problems, (request.seed for request in asked), strict=True))

        one, two = "How many?", "How much?"
        both = seeds([Sample(0, one), Sample(1, two)])
        assert both[one] != both[two]
        assert seeds([Sample(7, two)]) == {two: both[two]}

    @pytest.mark.parametrize(
        ("verdicts", "share", "solved"),
        [
            (["correct"], 1.0, True),
            (["correct", "wrong"], 1.0, False),
            (["correct", "wrong"], 0.5, True),
            (["correct", "unreadable", "wrong"], 0.5, False),
            # What was cut or couldn't be compared says nothing.
            (["correct", "truncated", "unverified"], 1.0, True),
            (["truncated", "truncated"], 0.1, False),
        ],
    )
    def test_solved_share(self, verdicts: list[str], share: float, solved: bool) -> None:
        assert (solved_reject(Tally.of(verdicts), share) is not None) is solved


class Scripted:
    """A generator that answers by what it is asked for; it counts the requests."""

    def __init__(self, tokenizer: Any, reply: Callable[[str, int], str | Completion]) -> None:
        self.tokenizer, self.reply = tokenizer, reply
        self.asked: Counter[str] = Counter()
        self.closed = 0

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        return [self._one(self.tokenizer.decode(r.prompt), r.seed) for r in requests]

    def _one(self, prompt: str, seed: int) -> Completion:
        reply = self.reply(prompt, seed)
        if isinstance(reply, Completion):
            return reply
        return Completion(tuple(text_ids(self.tokenizer, reply)), reply, "stop", -1.0)

    def close(self) -> None:
        self.closed += 1


class TestProblems:
    def sampled(self, tokenizer: Any, ids: Sequence[int], finish: Any) -> Any:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        engine = Scripted(tokenizer, lambda p, s: Completion(tuple(ids), text, finish, -1.0))

        class Awaitable:
            async def generate(self, requests: Any, sampling: Any) -> list[Completion]:
                return engine.generate(requests, sampling)

        settings = GeneratorSettings(samples=1, max_new_tokens=64)
        (sample,), tokens = asyncio.run(sampled_problems(Awaitable(), tokenizer, settings, 0))
        assert tokens == len(ids)
        return sample

    def test_a_problem_ends_with_the_users_turn(self, student_tokenizer: Any) -> None:
        """Base models go on to the assistant's turn until they reach the limit."""
        ids = student_tokenizer("What is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4")["input_ids"]
        sample = self.sampled(student_tokenizer, ids, "length")
        assert (sample.problem, sample.reject) == ("What is 2 + 2?", None)

    def test_a_cut_problem_is_unfinished(self, student_tokenizer: Any) -> None:
        ids = student_tokenizer("What is 2 +")["input_ids"]
        assert self.sampled(student_tokenizer, ids, "length").reject.reason == "unfinished"
        assert self.sampled(student_tokenizer, ids, "stop").reject is None

    def test_a_special_token_is_no_text(self, student_tokenizer: Any) -> None:
        ids = student_tokenizer("What is<|im_start|> 2 + 2?<|im_end|>")["input_ids"]
        assert self.sampled(student_tokenizer, ids, "stop").reject.reason == "special_token"


TEACHER, STUDENT_ASK = "Solve it well.", "Try it."

GOOD = "A baker fills {} trays with nine rolls each. How many rolls are there in all?"
CUT = Completion((100, 101), "cut o", "length", -1.0)

CASES: list[tuple[str | Completion, str | None]] = [
    (GOOD.format("four"), None),
    (GOOD.format("five"), None),
    (CUT, "unfinished"),
    (Completion((1812, 1, 100), "What", "stop", -1.0), "special_token"),
    (" \n", "empty"),
    ("The baker fills four trays with nine rolls each every morning.", "no_request"),
    ("A baker fills ten trays. How many? Answer:\nSolution: ten of them", "holds_solution"),
    (GOOD.format("FOUR").replace(" trays", "\n trays"), "duplicate"),
    ("Ein Bäcker füllt vier Bleche mit je neun Brötchen. Wie viele sind es?", "language"),
    ("How many are they?", "too_short"),
    ("What is the number of rolls here? " + "The shop sold many fresh rolls today. " * 20,
     "too_long"),
    ("How many rolls? " + "There are nine rolls on a tray here. " * 5, "repetition"),
    ("Please tell me: what is the tallest mountain in the whole of Europe today?", "overlap"),
    ("How long is this number that she wrote down? " + "1234567890" * 14, "prompt_too_long"),
    ("How many rolls does the slow baker make on a cold Monday?", "solution_unfinished"),
    ("How many rolls does the silent baker make on a cold Monday?", "solution_empty"),
    ("How many rolls does the vague baker make on a cold Monday?", "solution_no_answer"),
    ("How many rolls does the stuttering baker make on a cold Monday?", "solution_repetition"),
    ("How many rolls does the odd baker make on a cold Monday?", "unreadable_answer"),
    ("How many rolls does the easy baker make on a cold Monday?", "solved_by_student"),
]  # fmt: skip

SOLUTIONS: dict[str, str | Completion] = {
    "four": "<think>Nine four times.</think>\nThere are \\boxed{36} rolls.",
    "five": "There are \\boxed{45}.",
    "slow": CUT,
    "silent": "<think>Hm.</think>\n",
    "vague": "A good number of them.",
    "stuttering": "He makes nine rolls and then he stops. " * 9 + "\\boxed{9}",
    "odd": "\\boxed{)+(}",
    "easy": "It is \\boxed{\\frac{1}{2}}.",
    "tallest": "\\boxed{Elbrus}",
}
ATTEMPTS: dict[str, str | Completion] = {
    "four": "I say \\boxed{35}.",
    "five": CUT,
    "odd": "7",
    "easy": "0.5",
    "tallest": "\\boxed{Etna}",
}


@pytest.fixture
def synthesis(tmp_path: Path, student_tokenizer: Any) -> Any:
    """A recipe whose samples fall to every filter once, and two of which are kept."""

    class Synthesis:
        def __init__(self) -> None:
            model = {"model": STUDENT, "generation_chunk": 4}
            self.value: dict[str, Any] = {
                "name": "made",
                "seed": 3,
                "models": {
                    "writer": model,
                    "solver": {**model, "max_length": 256},
                    "pupil": {**model, "max_length": 256},
                },
                "generator": {"model": "writer", "samples": len(CASES)},
                "teacher": {"model": "solver", "request": TEACHER, "max_new_tokens": 120},
                "student": {
                    "model": "pupil",
                    "request": STUDENT_ASK,
                    "max_new_tokens": 80,
                    "check": "normalised",
                },
                "filters": {"max_characters": 700, "repetition_words": 3},
                "avoid": {
                    "sources": [{"name": "known", "path": "known.jsonl"}],
                    "targets": [{"name": "exam", "path": "exam.jsonl"}],
                },
                "execution": {"run": str(tmp_path / "made"), "cache": str(tmp_path / "cache")},
            }
            known = {"question": "How many rolls fit on a tray?", "answer": "Nine rolls."}
            exam = "In geography: What is the tallest mountain in the whole of Europe?"
            (tmp_path / "known.jsonl").write_text(json.dumps(known) + "\n")
            (tmp_path / "exam.jsonl").write_text(json.dumps({"question": exam}) + "\n")
            self.model = Scripted(student_tokenizer, self.reply)
            self.fails = ""

        def reply(self, prompt: str, seed: int) -> str | Completion:
            role = "student" if STUDENT_ASK in prompt else "writer"
            role = "teacher" if TEACHER in prompt else role
            self.model.asked[role] += 1
            if role == self.fails:
                raise RuntimeError("the machine is gone")
            if role == "writer":
                samples = range(self.value["generator"]["samples"])
                seeds = {key_hash(f"problem:{i}", self.value["seed"]): i for i in samples}
                return CASES[seeds[seed] % len(CASES)][0]
            script = SOLUTIONS if role == "teacher" else ATTEMPTS
            (reply,) = [text for word, text in script.items() if f" {word} " in prompt]
            return reply

        def make(self, kind: str, model: ModelSettings) -> Any:
            return self.model if model.endpoint is None else make_engine(kind, model)

        @property
        def path(self) -> str:
            path = tmp_path / "synthesis.yaml"
            path.write_text(yaml.safe_dump(self.value))
            return str(path)

        def run(self) -> Synthesized:
            return synthesize(read_synthesis(self.path), lambda line: None, self.make)

        def lines(self, name: str) -> list[dict[str, Any]]:
            data = Store(self.value["execution"]["run"]).read_bytes(name)
            return [json.loads(line) for line in data.splitlines()]

    return Synthesis()


class TestRun:
    def test_every_sample_ends_in_one_place_for_the_reason_it_was_made_for(
        self, synthesis: Any
    ) -> None:
        synthesis.value["student"]["check"] = "math"
        report = synthesis.run().report
        expected = [(i, reason) for i, (_, reason) in enumerate(CASES) if reason]
        assert [(r["sample"], r["reason"]) for r in synthesis.lines("rejects.jsonl")] == expected
        assert report["samples"] == len(CASES)
        assert report["rows"] == 2
        # A model that runs here replies, whatever it says.
        assert report["rejected"] == dict.fromkeys(REASONS, 1) | {"no_reply": 0}
        assert [row["synthesis"]["sample"] for row in synthesis.lines("data.jsonl")] == [0, 1]
        # Cheap filters spare the models: the teacher sees what passed, the student what is solved.
        assert synthesis.model.asked == {"writer": len(CASES), "teacher": 8, "student": 3}
        assert synthesis.model.closed == 3
        assert report["avoided"]["exam"] == {"rows": 1, "unreadable": 0}

    def test_its_output_is_an_ordinary_source(self, synthesis: Any) -> None:
        synthesis.run()
        source = Source(name="made", path=synthesis.value["execution"]["run"] + "/data.jsonl")
        first, second, *_ = iter_rows(source)
        assert isinstance(first, Row)
        assert isinstance(second, Row)
        question, reply = first.messages
        assert question == {"role": "user", "content": GOOD.format("four")}
        assert reply["content"] == "There are \\boxed{36} rolls."
        assert reply["reasoning"] == "Nine four times."
        assert (first.answer, second.answer) == ("36", "45")
        origin = json.loads(first.extra or "")["synthesis"]
        assert origin["seed"] == 3
        assert origin["teacher"]["model"] == STUDENT
        assert origin["teacher"]["weights"].startswith("sha256:")
        assert (origin["student_decided"], origin["student_agreed"]) == (1, 0)
        # The student's attempt at the second one was cut: nothing is known.
        assert json.loads(second.extra or "")["synthesis"]["student_decided"] == 0

    def test_a_teacher_behind_an_endpoint(self, synthesis: Any) -> None:
        """The same rows as from one that runs here; what it doesn't answer is asked again."""
        expected = synthesis.run().report
        rows = [(row["messages"], row["answer"]) for row in synthesis.lines("data.jsonl")]

        def script(asked: Asked, times: int) -> Answer:
            if "this number" in asked.prompt:
                return refusal(400, "Too long.", "context_length_exceeded")
            word, text = next((w, t) for w, t in SOLUTIONS.items() if f" {w} " in asked.prompt)
            if word == "five" and times < 3:
                return refusal(503, "Busy.")
            if word == "vague":
                return refusal(400, "No.", "content_filter")
            if isinstance(text, Completion):
                return answered(text.text, text.finish_reason)
            return answered(text)

        with EndpointServer(script) as server:
            where = {"base_url": server.url, "max_retries": 1, "max_retry_wait_s": 0.01}
            synthesis.value["models"]["solver"] = {
                "model": "solver",
                "engine": "openai",
                "endpoint": where,
            }
            synthesis.value["execution"]["run"] += "-asked"
            with pytest.raises(EngineError, match=r"1 of 9 problems had no reply.*Busy.*run again"):
                synthesis.run()
            assert not Path(synthesis.value["execution"]["run"], "data.jsonl").exists()
            server.asked.clear()
            report = synthesis.run().report
            # And what it refused.
            assert len(server) == 3
        assert [(row["messages"], row["answer"]) for row in synthesis.lines("data.jsonl")] == rows
        moved = {"no_reply": 1, "solution_no_answer": 0}
        assert report["rejected"] == expected["rejected"] | moved
        (filtered,) = [r for r in synthesis.lines("rejects.jsonl") if r["reason"] == "no_reply"]
        assert filtered["detail"].startswith("content_filter: ")
        origin = synthesis.lines("data.jsonl")[0]["synthesis"]["teacher"]
        assert origin == {"model": "solver", "weights": f"endpoint:{server.url}:solver"}

    @pytest.mark.parametrize(
        ("role", "change", "message"),
        [
            ("writer", {}, r"generator\.model: models\.writer is behind an endpoint"),
            ("pupil", {}, r"student\.model: models\.pupil is behind an endpoint"),
            ("solver", {"template": {"x": 1}}, r"endpoint\.body\.chat_template_kwargs"),
        ],
    )
    def test_what_an_endpoint_cant_do(
        self, synthesis: Any, role: str, change: dict[str, Any], message: str
    ) -> None:
        where = {"base_url": "http://127.0.0.1:1/v1"}
        synthesis.value["models"][role] = {"model": "m", "engine": "openai", "endpoint": where}
        synthesis.value["teacher"].update(change)
        with pytest.raises(ConfigError, match=message):
            synthesis.run()

    def test_interrupted_run_goes_on_from_the_cache(self, synthesis: Any) -> None:
        synthesis.fails = "student"
        with pytest.raises(RuntimeError):
            synthesis.run()
        assert not Path(synthesis.value["execution"]["run"], "data.jsonl").exists()
        synthesis.fails = ""
        synthesis.model.asked.clear()
        assert not synthesis.run().was_complete
        assert synthesis.model.asked == {"student": 4}

    def test_finished_run_is_left_alone(self, synthesis: Any) -> None:
        first = synthesis.run()
        synthesis.model.asked.clear()
        again = synthesis.run()
        assert again.was_complete
        assert again.report == first.report
        assert not synthesis.model.asked
        synthesis.value["filters"]["min_characters"] = 10
        with pytest.raises(ConfigError, match=r"recipe\.filters\.min_characters: 20 → 10"):
            synthesis.run()

    def test_command(self, synthesis: Any) -> None:
        report = synthesis.run().report
        done = CliRunner().invoke(app, ["synthesize", "run", synthesis.path])
        assert done.exit_code == 0, done.output
        assert "nothing to do" in done.output
        assert f"{report['rows']} of {len(CASES)} samples" in done.output
        assert "solution_repetition" in done.output
        wrong = CliRunner().invoke(app, ["synthesize", "run", synthesis.path, "--set", "sed=1"])
        assert wrong.exit_code == 2

    def test_more_samples_keep_the_earlier_ones(self, synthesis: Any) -> None:
        synthesis.value["generator"]["samples"] = 2
        synthesis.run()
        rows = synthesis.lines("data.jsonl")
        synthesis.value["generator"]["samples"] = len(CASES)
        synthesis.value["execution"]["run"] += "-more"
        synthesis.run()
        assert synthesis.lines("data.jsonl")[:2] == rows
        assert synthesis.model.asked["writer"] == len(CASES)

    def test_same_bytes_in_a_store(self, synthesis: Any) -> None:
        synthesis.run()
        first = synthesis.lines("data.jsonl")
        synthesis.value["execution"] = {"run": "memory://synthesis", "cache": "memory://made-cache"}
        synthesis.run()
        assert synthesis.lines("data.jsonl") == first

    def test_nothing_left_is_a_failure_that_says_why(self, synthesis: Any) -> None:
        synthesis.value["filters"]["languages"] = ["fr"]
        # Left by a run that was interrupted before its manifest.
        Store(synthesis.value["execution"]["run"]).write_bytes("data.jsonl", b"{}\n")
        with pytest.raises(StageError, match=r"none of 20 samples is left: .*language \d+"):
            synthesis.run()
        assert len(synthesis.lines("rejects.jsonl")) == len(CASES)
        assert "teacher" not in synthesis.model.asked
        assert not Path(synthesis.value["execution"]["run"], "data.jsonl").exists()

    def test_source_overlap_has_its_own_bound(self, synthesis: Any) -> None:
        synthesis.value["avoid"]["sources"] = [{"name": "known", "path": "exam.jsonl",
            "columns": {"prompt": "question", "response": "question"}}]  # fmt: skip
        synthesis.value["avoid"]["targets"] = []
        for bound, count in [(0.9, 0), (0.1, 1)]:
            synthesis.value["filters"]["max_source_overlap"] = bound
            synthesis.value["execution"]["run"] += "-again"
            assert synthesis.run().report["rejected"]["overlap"] == count

    def test_unreadable_data_to_avoid(self, synthesis: Any, tmp_path: Path) -> None:
        (tmp_path / "exam.jsonl").write_text('{"question": "Why?"}\n{broken\n')
        with pytest.raises(ConfigError, match="exam: 1 of 2 records"):
            synthesis.run()


class TestRecipe:
    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            ("teacher.modle", "solver", r"teacher\.modle: unknown key; did you mean 'model'"),
            ("filters.overlap_word", 3, "did you mean 'overlap_words'"),
            ("avoid.targets.0.tsk", "x", "did you mean 'task'"),
            ("models.writer.dtpye", "float32", "did you mean 'dtype'"),
            ("student.model", "nobody", "names the model 'nobody'"),
            ("teacher.max_new_tokens", 256, "leaves no room for a prompt"),
            ("student.rollouts", 2, "one and the same"),
            ("filters.require_answer", False, r"student needs filters\.require_answer"),
            ("generator.samples", 0, r"generator\.samples: Input should be greater"),
            ("avoid.sources.0.name", "exam", "are called exam"),
        ],
    )
    def test_mistakes_are_named(self, synthesis: Any, place: str, value: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_synthesis(synthesis.path, [f"{place}={json.dumps(value)}"])

    def test_mistakes_found_before_a_model_is_opened(self, synthesis: Any) -> None:
        def opened(kind: str, model: ModelSettings) -> Any:
            raise AssertionError("a model was opened")

        for change in ("avoid.targets.0.path=gone.jsonl", "filters.languages=[english]",
                       "generator.max_new_tokens=2047"):  # fmt: skip
            with pytest.raises(ConfigError):
                synthesize(read_synthesis(synthesis.path, [change]), lambda line: None, opened)

    def test_shipped_recipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GENERATOR", "some/model")
        config = read_synthesis(str(ROOT / "configs" / "synthesis.yaml"))
        assert config.roles == ("generator", "teacher", "student")
        for source in (*config.avoid.sources, *config.avoid.targets):
            found = Counter(type(row) for row in iter_rows(source))
            assert found[Row] > 4 * (found.total() - found[Row])


class TestPrepare:
    @pytest.fixture
    def run(self, recipe: Any, execute: Any, tmp_path: Path) -> str:
        def row(*turns: str, system: str | None = None) -> dict[str, Any]:
            roles = ("user", "assistant") * len(turns)
            spoken = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
            first = [{"role": "system", "content": system}] if system else []
            return {"messages": [*first, *spoken]}

        records = [
            row("How far is the moon?", "Far."),
            row("How far is the moon?", "Very far."),
            row("And the sun?", "Farther.", "How much?", "A lot."),
            row("How far is Mars?", "It varies.", system="Be brief."),
            row("What does <|im_end|> mean?", "The end."),
        ]
        (tmp_path / "pears.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        recipe.value["reflection"] = None
        recipe.save()
        execute("ingest")
        execute("difficulty")
        return str(recipe.run_folder)

    def test_rows_that_meet_the_rule(self, run: str, student_tokenizer: Any) -> None:
        store = opened_run(run)
        homes = {"messages": "ingest", "source": "ingest", "ifd": "difficulty"}
        rows = [
            row
            for part in parts(store, "ingest")
            for row in read_columns(store, part, list(homes), homes).to_pylist()
        ]
        bound = sorted(row["ifd"] for row in rows if row["source"] == "apples")[4]
        prepared = prepared_training_file(run, f"ifd > {bound!r} and source == 'apples'", STUDENT)
        expected = [
            row["messages"][0]["content"]
            for row in rows
            if row["source"] == "apples" and row["ifd"] > bound
        ]
        lines = [json.loads(line) for line in prepared.data.splitlines()]
        assert len(lines) == prepared.examples == 5
        assert [line["completion"] for line in lines] == [f"{text}<|im_end|>" for text in expected]
        assert {line["prompt"] for line in lines} == {"<|im_start|>user\n"}
        assert prepared.left_out["not_met"] == len(rows) - 5

    def test_what_a_bare_header_has_no_place_for_is_counted(self, run: str) -> None:
        prepared = prepared_training_file(run, "source == 'pears'", STUDENT)
        (line,) = prepared.data.splitlines()
        assert json.loads(line)["completion"] == "How far is the moon?<|im_end|>"
        assert prepared.left_out == {
            "not_met": 10,
            "duplicate": 1,
            "multi_turn": 1,
            "system_turn": 1,
            "special_token": 1,
        }

    def test_errors(self, run: str, tmp_path: Path) -> None:
        for where, message in [
            ("pass_rate < 0.5", "column 'pass_rate', which no complete stage"),
            ("source == 'none'", r"no row is left to train on \(not_met 15\)"),
        ]:
            with pytest.raises(ConfigError, match=message):
                prepared_training_file(run, where, STUDENT)
        with pytest.raises(ConfigError, match="no run directory"):
            prepared_training_file(str(tmp_path / "nowhere"), "source == 'x'", STUDENT)

    def test_command(self, run: str, tmp_path: Path) -> None:
        out = tmp_path / "train" / "problems.jsonl"
        arguments = ["synthesize", "prepare", run, "--where", "source == 'pears'"]
        arguments += ["--model", STUDENT, "--out", str(out)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert len(out.read_text().splitlines()) == 1
        wrong = CliRunner().invoke(app, [*arguments[:3], "--where", "nope", *arguments[5:]])
        assert wrong.exit_code == 2


def test_import_loads_no_model_library() -> None:
    code = (
        "import sys, pipeline.cli, pipeline.synthesize.runner, pipeline.synthesize.prepare;"
        "print({'torch', 'transformers', 'ray', 'vllm', 'py3langid'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_real_model(synthesis: Any) -> None:
    """Whatever a 135M model writes, every sample is accounted for, and a second run agrees."""
    synthesis.value["generator"] |= {"samples": 4, "max_new_tokens": 48}
    synthesis.value["teacher"] |= {"max_new_tokens": 32}
    synthesis.value["filters"] |= {"require_answer": False, "languages": None}
    synthesis.value["student"] = None
    found = []
    for folder in ("first", "second"):
        run = synthesis.value["execution"]["run"] = f"memory://real-{folder}"
        synthesis.value["execution"]["cache"] = f"memory://real-{folder}-cache"
        # A model this small may write nothing that passes: that is a failed run with a report.
        with suppress(StageError):
            synthesize(read_synthesis(synthesis.path), lambda line: None)
        store = Store(run)
        report = store.read_json("report.json")
        assert report["samples"] == 4 == report["rows"] + sum(report["rejected"].values())
        assert report["tokens"]["generator"] > 0
        found.append([store.read_bytes(name) for name in ("rejects.jsonl", "report.json")])
    assert found[0] == found[1]
