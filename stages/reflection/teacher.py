"""Asking the teacher: prompts of many rows in one engine call, and what its replies hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stages.engines import Completion, Sampling
from stages.engines.chat import UNANSWERED, ChatRequest, chat_generator
from stages.engines.settings import ModelSettings
from stages.errors import RowError
from stages.reflection.parsing import (
    ParseFailure,
    Rewrite,
    parse_instruction_reply,
    parse_response_reply,
    parse_whole_answer,
    parse_whole_instruction,
)
from stages.reflection.prompts import INSTRUCTION_TAG, RESPONSE_TAG, Prompts, Purpose
from stages.reflection.record import ReflectedRow
from stages.reflection.settings import Form, ReflectionSettings
from stages.rows import Message, key_hash, with_turns


class Teacher:
    """Asks for rewrites; every prompt of one purpose goes in one call."""

    def __init__(
        self,
        engine: Any,
        model: ModelSettings,
        settings: ReflectionSettings,
        form: Form,
        prompts: Prompts,
        seed: int,
    ) -> None:
        """Keep the engine, and how it is asked; `form` is that of the replies."""
        self._chat = chat_generator(engine, model)
        self._takes_schema = model.takes_schema
        self._reply = form
        self._prompts = prompts
        self._sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
        self._seed = seed

    async def instructions(self, rows: Sequence[ReflectedRow]) -> list[Rewrite | ParseFailure]:
        """Phase 1: a new instruction with its response for every row, both or neither."""
        reply = self._reply
        prompts = [self._prompts.instruction_prompt(row.messages, reply) for row in rows]
        replies = await self._ask(rows, prompts, "instruction")
        if reply == "whole":
            return await self._answered(rows, replies)
        return [
            done
            if isinstance(done, ParseFailure)
            else parse_instruction_reply(
                done.text, done.finish_reason, reply, row.exchange, self._prompts
            )
            for row, done in zip(rows, replies, strict=True)
        ]

    async def responses(self, rows: Sequence[ReflectedRow]) -> list[str | ParseFailure]:
        """Phase 2: a new response for every row."""
        prompts = [self._prompts.response_prompt(row.messages, self._reply) for row in rows]
        replies = await self._ask(rows, prompts, "response")
        return [
            done
            if isinstance(done, ParseFailure)
            else parse_response_reply(
                done.text, done.finish_reason, self._reply, row.exchange, self._prompts
            )
            for row, done in zip(rows, replies, strict=True)
        ]

    async def _answered(
        self, rows: Sequence[ReflectedRow], replies: Sequence[Completion | ParseFailure]
    ) -> list[Rewrite | ParseFailure]:
        """`whole` replies hold the instruction alone: ask for the answer of each usable one."""
        new: list[Rewrite | ParseFailure] = []
        asking: list[tuple[int, str]] = []
        for place, (row, done) in enumerate(zip(rows, replies, strict=True)):
            text = (
                done
                if isinstance(done, ParseFailure)
                else parse_whole_instruction(
                    done.text, done.finish_reason, row.exchange, self._prompts
                )
            )
            if isinstance(text, ParseFailure):
                new.append(text)
            else:
                new.append(Rewrite(text, ""))
                asking.append((place, text))
        asked = [rows[place] for place, _ in asking]
        prompts = [
            self._prompts.answer_prompt(with_turns(rows[place].messages, instruction=text))
            for place, text in asking
        ]
        answers = await self._ask(asked, prompts, "answer")
        for (place, text), done in zip(asking, answers, strict=True):
            answer = (
                done
                if isinstance(done, ParseFailure)
                else parse_whole_answer(done.text, done.finish_reason, text, self._prompts)
            )
            new[place] = answer if isinstance(answer, ParseFailure) else Rewrite(text, answer)
        return new

    async def _ask(
        self,
        rows: Sequence[ReflectedRow],
        prompts: Sequence[Sequence[Message]],
        purpose: Purpose,
    ) -> list[Completion | ParseFailure]:
        """One completion a row, or why there is none; a row that got no reply has failed."""
        requests = [
            ChatRequest(prompt, key_hash(f"{row.id}:{purpose}", self._seed))
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        sampling = replace(self._sampling, schema=self._schema(purpose))
        answered: list[Completion | ParseFailure] = []
        for row, done in zip(rows, await self._chat.chat(requests, sampling), strict=True):
            if isinstance(done, Completion):
                row.count(done.usage)
                answered.append(done)
                continue
            if done.code in UNANSWERED:
                row.unanswered = RowError(str(done))
            answered.append(ParseFailure(*done))
        return answered

    def _schema(self, purpose: Purpose) -> str | None:
        """What a reply as JSON has to look like, where the engine can hold it to that."""
        if not self._takes_schema or self._reply != "json":
            return None
        parts = {"instruction": (INSTRUCTION_TAG, RESPONSE_TAG), "response": (RESPONSE_TAG,)}
        names = ["critique", *parts[purpose]]
        return json.dumps(
            {
                "type": "object",
                "properties": {name: {"type": "string"} for name in names},
                "required": names,
                "additionalProperties": False,
            }
        )
