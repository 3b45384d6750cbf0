"""ChatGenerator on any OpenAI-compatible endpoint, by HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

from stages.engines import Completion, Sampling
from stages.engines.chat import RETRIED, ChatCode, ChatFailure, ChatRequest
from stages.engines.endpoint_reply import (
    Words,
    completion_of,
    is_filtered,
    is_spent_account,
    is_unknown_model,
    refused_prompt,
    words_of,
)
from stages.engines.settings import EndpointSettings
from stages.engines.traffic import Traffic, backoff_wait_s, retry_after_s
from stages.errors import EngineError
from stages.rows import canonical_json

_CONNECT_S = 10.0
_SAID = 300
"""Characters of an endpoint's own words that are passed on."""


class EndpointChat:
    """Asks a model behind an endpoint, within the limits that its settings draw.

    It has an event loop of its own in a thread, so that it can be asked from any loop, and closed
    from where there is none. The key is in the client's headers and nowhere else; what is passed on
    of the endpoint's errors has it cut out.
    """

    def __init__(self, model: str, settings: EndpointSettings) -> None:
        """Take the key from the environment; nothing is sent yet.

        Args:
            model: the name that is sent.
            settings: of the endpoint.

        Raises:
            ConfigError: the key isn't in the environment.
        """
        self._model = model
        self._settings = settings
        self._key = settings.api_key()
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(settings.timeout_s, connect=min(_CONNECT_S, settings.timeout_s)),
            limits=httpx.Limits(
                max_connections=settings.concurrency,
                max_keepalive_connections=settings.concurrency,
            ),
        )
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._traffic = Traffic(settings.requests_per_minute, settings.tokens_per_minute)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"endpoint {model}", daemon=True
        )
        self._thread.start()

    async def chat(
        self, requests: Sequence[ChatRequest], sampling: Sampling
    ) -> list[Completion | ChatFailure]:
        """One reply a request, or why there is none after the last try, in input order.

        Raises:
            EngineError: the endpoint refuses the key or doesn't know the model, so that no request
                can be answered.
        """
        asked = asyncio.run_coroutine_threadsafe(self._replies(requests, sampling), self._loop)
        replies = await asyncio.wrap_future(asked)
        if isinstance(replies, EngineError):
            raise replies
        return replies

    def close(self) -> None:
        """Drop what is being asked and end the connections; a second call does nothing."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _replies(
        self, requests: Sequence[ChatRequest], sampling: Sampling
    ) -> list[Completion | ChatFailure] | EngineError:
        """Replies, or what stops all: raised here, it would be logged where nobody waits for it."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._reply(one, sampling)) for one in requests]
        except ExceptionGroup as failures:
            # The first failure cancels the rest; theirs say nothing more.
            first = failures.exceptions[0]
            if isinstance(first, EngineError):
                return first
            raise first from None
        return [task.result() for task in tasks]

    async def _reply(self, request: ChatRequest, sampling: Sampling) -> Completion | ChatFailure:
        body = request_body(self._model, self._settings, request, sampling)
        tries = 0
        while True:
            async with self._slots:
                await self._traffic.turn()
                answer = await self._attempt(body)
            tries += 1
            result = answer.result
            if isinstance(result, Completion) or result.code not in RETRIED:
                return result
            if tries > self._settings.max_retries:
                times = "once" if tries == 1 else f"{tries} times"
                return result._replace(detail=f"{result.detail}; tried {times}")
            longest = self._settings.max_retry_wait_s
            asked_for = min(answer.retry_after_s or 0.0, longest)
            if asked_for:
                self._traffic.pause(asked_for)
            await asyncio.sleep(max(asked_for, backoff_wait_s(request.seed, tries, longest)))

    async def _attempt(self, body: bytes) -> _Answer:
        url = f"{self._settings.base_url}/chat/completions"
        try:
            async with (
                # httpx limits each read; a reply that trickles in would never end.
                asyncio.timeout(self._settings.timeout_s),
                self._client.stream("POST", url, content=body) as response,
            ):
                raw = await _bytes_of(response, self._settings.max_reply_bytes)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            return _Answer(self._failure("endpoint_down", f"nothing answers ({_named(error)})"))
        except (TimeoutError, httpx.TimeoutException):
            waited = f"no whole reply within {self._settings.timeout_s:g} s"
            return _Answer(self._failure("timeout", waited))
        except httpx.HTTPError as error:
            return _Answer(self._failure("connection_lost", _named(error)))
        return self._answer(response, raw, len(body))

    def _answer(self, response: httpx.Response, raw: bytes | None, asked_bytes: int) -> _Answer:
        if raw is None:
            limit = f"the reply exceeds max_reply_bytes={self._settings.max_reply_bytes}"
            return _Answer(self._failure("reply_too_large", limit))
        status = response.status_code
        if 200 <= status < 300:
            result = completion_of(raw)
            if isinstance(result, ChatFailure):
                return _Answer(self._failure(result.code, result.detail))
            tokens = sum(result.usage) if result.usage else (asked_bytes + len(raw)) / 4
            self._traffic.spend_tokens(tokens)
            return _Answer(result)
        words = words_of(raw)
        if status == 429 and not is_spent_account(words):
            failure = self._failure("rate_limited", words.message or "status 429")
        elif status == 408:
            failure = self._failure("timeout", words.message or "status 408")
        elif status >= 500:
            failure = self._failure("server_error", f"status {status} {words.message}".strip())
        elif status < 400 or is_unknown_model(words) or _stops_all(status, words):
            raise self._useless(response, words)
        else:
            refused = refused_prompt(status, words)
            failure = self._failure(refused.code, refused.detail)
        wait = retry_after_s(response.headers.get("Retry-After"), time.time())
        return _Answer(failure, wait)

    def _useless(self, response: httpx.Response, words: Words) -> EngineError:
        """Why no request at all can be answered."""
        status, url = response.status_code, self._settings.base_url
        said = f": {self._passed_on(words.message)}" if words.message else ""
        ends = f" (status {status}{said})"
        named = self._settings.api_key_env
        key = f"the key in {named}" if named else "a request without a key (api_key_env is unset)"
        if status in (401, 403):
            return EngineError(f"{url} refuses {key}{ends}; set the right key and run again")
        if status in (402, 429):
            return EngineError(
                f"{url} says that the account of {key} has nothing left{ends}; top it up and run "
                "again"
            )
        if status < 400:
            elsewhere = self._passed_on(response.headers.get("Location") or "elsewhere")
            return EngineError(
                f"{url} sends requests on to {elsewhere}{ends}; set base_url to where the "
                "endpoint is"
            )
        return EngineError(
            f"{url} has no model {self._model!r}, or isn't the address of an OpenAI-compatible "
            f"endpoint{ends}; correct the model's name or base_url (it often ends in /v1)"
        )

    def _failure(self, code: ChatCode, detail: str) -> ChatFailure:
        return ChatFailure(code, f"{self._settings.base_url}: {self._passed_on(detail)}")

    def _passed_on(self, text: str) -> str:
        """An endpoint's words on one line, shortened, without the key."""
        if self._key:
            text = text.replace(self._key.get_secret_value(), "***")
        line = " ".join(text.encode(errors="replace").decode().split())
        return line if len(line) <= _SAID else line[:_SAID] + "…"


class _Answer(NamedTuple):
    """What came of one try, and the wait that the endpoint asks for before another."""

    result: Completion | ChatFailure
    retry_after_s: float | None = None


def request_body(
    model: str, settings: EndpointSettings, request: ChatRequest, sampling: Sampling
) -> bytes:
    """One request as JSON.

    Args:
        model: the name that is sent.
        settings: of the endpoint.
        request: what is asked; of every message its role and content are sent.
        sampling: how the reply is drawn.
    """
    value: dict[str, Any] = {
        **settings.body,
        "model": model,
        "messages": [
            {"role": turn["role"], "content": turn["content"]} for turn in request.messages
        ],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        settings.limit_field: sampling.max_new_tokens,
        "seed": request_seed(request.seed),
    }
    if sampling.schema is not None:
        schema = {"name": "reply", "strict": True, "schema": json.loads(sampling.schema)}
        value["response_format"] = {"type": "json_schema", "json_schema": schema}
    return canonical_json(value).encode()


def request_seed(seed: int) -> int:
    """A 64-bit seed folded into 31 bits, which every server takes."""
    return (seed ^ (seed >> 31) ^ (seed >> 62)) & (2**31 - 1)


def _stops_all(status: int, words: Words) -> bool:
    """Whether a status of 4xx is about the key, the account or the address, not the prompt."""
    return status in (401, 402, 404, 429) or (status == 403 and not is_filtered(words))


async def _bytes_of(response: httpx.Response, at_most: int) -> bytes | None:
    """The body; None where it is longer than allowed, and not read to its end."""
    found = bytearray()
    async for piece in response.aiter_bytes():
        found += piece
        if len(found) > at_most:
            return None
    return bytes(found)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
