"""Prefixes: what is sampled, where it is cut, what it is trained after, and who keeps the whole.

The generator is scripted at the engine boundary (one test uses the real model); tokenizer, chat
template and tables are the real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import STUDENT

from stages.base import checked_columns
from stages.engines import Completion, GenerationRequest, Sampling
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, StageError
from stages.prefixes.settings import PrefixesSettings
from stages.prefixes.stage import PrefixesStage
from stages.rows import MESSAGES

END = 50_000
"""An end that isn't the tokenizer's EOS."""
SMALL = ModelSettings(model=STUDENT, threads=1, max_length=256)


class Streams:
    """A sampler whose tokens are a function of the seed; a stream of odd length ends early."""

    def __init__(self, ends_at: int | None = None) -> None:
        self.ends_at = ends_at
        self.asked: list[tuple[GenerationRequest, Sampling]] = []

    def stream(self, seed: int, tokens: int) -> list[int]:
        return np.random.default_rng(seed).integers(300, 49_000, tokens).tolist()

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        self.asked += [(request, sampling) for request in requests]
        made = []
        for request in requests:
            ends = self.ends_at is not None and self.ends_at < sampling.max_new_tokens
            count = self.ends_at if ends and self.ends_at is not None else sampling.max_new_tokens
            ids = tuple(self.stream(request.seed, count))
            end = END if ends else None
            made.append(Completion(ids, "text", "stop" if ends else "length", -1.0, None, end))
        return made


def rows(prompts: Sequence[str]) -> pa.Table:
    messages = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"Unused {i}."}]
        for i, text in enumerate(prompts)
    ]
    ids = [f"{i:032x}" for i in range(len(prompts))]
    return pa.table({"id": ids, "effective_messages": pa.array(messages, MESSAGES)})


def made(
    prompts: Sequence[str], generator: Any, seed: int = 3, **settings: Any
) -> list[dict[str, Any]]:
    settings = {"max_new_tokens": 64, **settings}
    stage = PrefixesStage(PrefixesSettings(**settings), {"student": SMALL}, seed)
    table = asyncio.run(stage.process(rows(prompts), {"model": generator}, {}))
    return checked_columns("prefixes", len(prompts), stage.columns().adds, table).to_pylist()


def test_prefix_is_the_samplers_first_ids_and_not_its_text_encoded_again(
    student_tokenizer: Any,
) -> None:
    sampler = Streams()
    prompts = [f"How many are {i} and {i}?" for i in range(40)]
    found = made(prompts, sampler, tokens=8, share=0.0)
    again = 0
    for (request, sampling), row in zip(sampler.asked, found, strict=True):
        assert sampling.max_new_tokens == 8
        assert row["prefix_ids"] == sampler.stream(request.seed, 8)
        assert row["prefix_sampled_tokens"] == 8
        text = student_tokenizer.decode(row["prefix_ids"])
        again += student_tokenizer(text)["input_ids"] != row["prefix_ids"]
    assert again > 0  # some would have come back as other ids


def test_training_prompts_of_prefix_and_whole_differ_and_sampling_uses_the_ordinary_one(
    student_tokenizer: Any,
) -> None:
    sampler = Streams(ends_at=20)
    prompts = [f"What is {i}?" for i in range(60)]
    found = made(
        prompts, sampler, share=0.5, tokens=8, max_new_tokens=64,
        request="Box the answer.", prefix_request="Only begin.",
    )  # fmt: skip
    kinds = {row["prefix_kind"] for row in found}
    assert kinds == {"prefix", "full"}
    for request, _ in sampler.asked:
        text = student_tokenizer.decode(request.prompt)
        assert "Box the answer." in text
        assert "Only begin." not in text
        assert text.endswith("<|im_start|>assistant\n")
    for prompt, row in zip(prompts, found, strict=True):
        text = student_tokenizer.decode(row["prefix_prompt_ids"])
        asked = "Only begin." if row["prefix_kind"] == "prefix" else "Box the answer."
        assert f"{prompt}\n\n{asked}<|im_end|>" in text
        assert ("Box" in text) != ("Only" in text)
        assert text.endswith("<|im_start|>assistant\n")
        assert len(row["prefix_ids"]) == (8 if row["prefix_kind"] == "prefix" else 21)


@pytest.mark.parametrize(
    ("share", "ends_at", "end_token", "ids", "ends"),
    [
        (0.0, None, False, 8, False),
        (0.0, None, True, 9, True),
        (0.0, 5, False, 6, True),  # the solution itself ended within the prefix
        (1.0, 20, False, 21, True),
    ],
)
def test_end_token(
    student_tokenizer: Any, share: float, ends_at: int | None, end_token: bool, ids: int, ends: bool
) -> None:
    (row,) = made(
        ["Why?"], Streams(ends_at), share=share, tokens=8, max_new_tokens=64, end_token=end_token
    )
    assert len(row["prefix_ids"]) == ids
    end = student_tokenizer.eos_token_id if ends_at is None else END
    assert (row["prefix_ids"][-1] == end) == ends
    assert not {END, student_tokenizer.eos_token_id} & set(row["prefix_ids"][:-1])


def test_whole_solution_without_an_end_is_left_out() -> None:
    (row,) = made(["Why?"], Streams(), share=1.0, max_new_tokens=16)
    assert row["prefixes_status"] == "unfinished: no end within max_new_tokens=16"
    assert row["prefix_ids"] is None
    assert row["prefix_kind"] is None
    assert row["prefix_sampled_tokens"] == 16


def test_share_is_of_prompts_by_hash_and_a_larger_one_keeps_the_smaller() -> None:
    prompts = [f"Question {i}?" for i in range(1_000)]
    whole = {
        share: {
            row["id"]
            for row in (
                {"id": i, **row}
                for i, row in enumerate(made(prompts, Streams(4), share=share, tokens=8))
            )
            if row["prefix_kind"] == "full"
        }
        for share in (0.0, 0.1, 0.3, 1.0)
    }
    assert len(whole[0.0]) == 0
    assert len(whole[1.0]) == 1_000
    assert whole[0.1] < whole[0.3]
    for share in (0.1, 0.3):  # five standard deviations of the binomial
        assert abs(len(whole[share]) - 1_000 * share) < 5 * (1_000 * share * (1 - share)) ** 0.5


def test_rows_of_one_prompt_share_its_sample_whatever_stands_beside_them() -> None:
    found = made(["Same?", "Other?", "Same?"], Streams(), tokens=8, share=0.0)
    assert found[0] == found[2] != found[1]
    alone = made(["Same?"], Streams(), tokens=8, share=0.0)
    assert alone[0] == found[0]
    assert made(["Same?"], Streams(), tokens=8, share=0.0, seed=4)[0] != found[0]


def test_prompts_that_leave_no_room_fail_with_the_numbers() -> None:
    found = made(["word " * 300, "Short?"], Streams(), tokens=8, share=0.0)
    assert found[0]["prefixes_status"].startswith("failed: prompt_too_long: ")
    assert "8 new ones exceed 256" in found[0]["prefixes_status"]
    assert found[1]["prefixes_status"] == "ok"
    with pytest.raises(ConfigError, match="max_new_tokens: 1024 leaves no room"):
        PrefixesStage(PrefixesSettings(), {"student": SMALL}, 0)


def test_model_that_says_nothing_is_a_failed_row() -> None:
    (row,) = made(["Why?"], Streams(ends_at=0), tokens=8, share=0.0)
    assert row["prefixes_status"] == "failed: empty: the model ended at once"


@pytest.mark.parametrize("wrong", [{"tokens": 7}, {"tokens": 129}, {"share": 1.1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tokens|share"):
        PrefixesSettings(**wrong)


def test_unknown_end_of_an_old_cache_is_refused() -> None:
    class Old(Streams):
        async def generate(self, requests: Any, sampling: Sampling) -> list[Completion]:
            return [replace(one, end_id=None) for one in await super().generate(requests, sampling)]

    with pytest.raises(StageError, match="name another"):
        made(["Why?"], Old(ends_at=5), tokens=8, share=0.0)
    assert made(["Why?"], Old(), tokens=8, share=0.0)[0]["prefixes_status"] == "ok"


class Model:
    """The student behind the engine's interface."""

    def __init__(self) -> None:
        from stages.engines.generator import TransformersGenerator

        self.inner = TransformersGenerator(SMALL)

    async def generate(self, requests: Any, sampling: Sampling) -> list[Completion]:
        return self.inner.generate(requests, sampling)


def test_what_a_real_model_drew_ends_with_the_end_that_it_drew(
    student_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may name several ends; the ids are all that were drawn, the end included."""
    model, prompts = Model(), ["Name three colours."]
    (row,) = made(prompts, model, tokens=16, share=0.0, temperature=0.0)
    stream = row["prefix_ids"]
    assert len(stream) == 16
    place = next(i for i in range(3, 16) if stream[i] not in stream[:i])
    ends = [student_tokenizer.eos_token_id, stream[place]]
    monkeypatch.setattr(model.inner._model.generation_config, "eos_token_id", ends)
    for share in (0.0, 1.0):
        (row,) = made(prompts, model, tokens=16, share=share, temperature=0.0)
        assert row["prefix_ids"] == stream[: place + 1]
        assert row["prefix_sampled_tokens"] == place


def test_real_prefix_begins_the_whole_solution_of_the_same_prompt() -> None:
    """A prefix is r_{<t} of a sample r of p(. | x): cutting the sampler short changes nothing."""
    model, prompts = Model(), ["Name three colours.", "What is 3 plus 4?"]
    short = made(prompts, model, tokens=8, share=0.0)
    long = made(prompts, model, tokens=24, share=0.0)
    for one, other in zip(short, long, strict=True):
        assert len(one["prefix_ids"]) == 8
        assert other["prefix_ids"][:8] == one["prefix_ids"]
