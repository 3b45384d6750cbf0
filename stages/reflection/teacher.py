"""Asking the teacher: prompts of many rows in one engine call, and what its replies hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.engines import Completion, GenerationRequest, Sampling, TextGenerator
from stages.engines.settings import ModelSettings
from stages.engines.tokens import chat_tokens
from stages.errors import RowError
from stages.reflection.parsing import (
    ParseFailure,
    Rewrite,
    parse_instruction_reply,
    parse_response_reply,
    parse_whole_answer,
    parse_whole_instruction,
)
from stages.reflection.prompts import Prompts, Purpose
from stages.reflection.record import ReflectedRow
from stages.reflection.settings import ReflectionSettings
from stages.rows import Message, key_hash, with_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Teacher:
    """Asks for rewrites; every prompt of one purpose goes in one call."""

    def __init__(
        self,
        engine: TextGenerator,
        tokenizer: PreTrainedTokenizerBase,
        model: ModelSettings,
        settings: ReflectionSettings,
        prompts: Prompts,
        seed: int,
    ) -> None:
        """Keep the engine, and how it is asked."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._window = model.max_length
        self._reply = settings.reply
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
        """One completion a row, or why it can't be asked for."""
        requests = [
            self._request(row, prompt, purpose) for row, prompt in zip(rows, prompts, strict=True)
        ]
        asked = [request for request in requests if isinstance(request, GenerationRequest)]
        replies = iter(await self._engine.generate(asked, self._sampling) if asked else [])
        answered: list[Completion | ParseFailure] = []
        for row, request in zip(rows, requests, strict=True):
            if isinstance(request, ParseFailure):
                answered.append(request)
                continue
            done = next(replies)
            row.teacher_prompt_tokens += len(request.prompt)
            row.teacher_tokens += len(done.token_ids)
            answered.append(done)
        return answered

    def _request(
        self, row: ReflectedRow, prompt: Sequence[Message], purpose: Purpose
    ) -> GenerationRequest | ParseFailure:
        try:
            ids = chat_tokens(self._tokenizer, prompt, open_turn=True).ids
        except RowError as error:
            return ParseFailure("chat_template", str(error))
        new = self._sampling.max_new_tokens
        if len(ids) + new > self._window:
            return ParseFailure(
                "prompt_too_long", f"{len(ids)} tokens and {new} new ones exceed {self._window}"
            )
        return GenerationRequest(ids, key_hash(f"{row.id}:{purpose}", self._seed))
