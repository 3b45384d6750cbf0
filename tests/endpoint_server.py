"""An OpenAI-compatible server on the loopback interface that does what a script says.

It has an event loop and thread of its own, counts what it is asked, and can do wrong: refuse,
stall, cut a body, send too much, or close the connection without a word.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the server does with one request.

    Attributes:
        status: of the response.
        body: all of it.
        headers: beside Content-Type and Content-Length.
        sent: bytes of the body that are sent before the connection is closed; None: all.
        silent: close the connection without a word.
        held: wait for this before answering.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    sent: int | None = None
    silent: bool = False
    held: asyncio.Event | None = None


@dataclass(frozen=True)
class Asked:
    """One request as it came in: its JSON, headers by lower-case name, path, and when."""

    value: dict[str, Any]
    headers: dict[str, str]
    path: str
    at: float

    @property
    def prompt(self) -> str:
        """The last message."""
        return str(self.value["messages"][-1]["content"])


def reply(text: str | None, finish_reason: str | None = "stop", **message: Any) -> Answer:
    """A good answer; it counts words as tokens."""
    usage = {"prompt_tokens": 10, "completion_tokens": len((text or "").split())}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": finish_reason,
    }
    return json_answer({"object": "chat.completion", "choices": [choice], "usage": usage})


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    """An error in OpenAI's form; header names with _ for -."""
    value = {"error": {"message": message, "type": "error", "code": code}}
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, json.dumps(value).encode(), named)


def json_answer(value: object) -> Answer:
    """Status 200 with this JSON."""
    return Answer(body=json.dumps(value).encode())


Script = Callable[[Asked, int], Answer]
"""What to do with a request that is made for the n-th time, from 1."""


class EndpointServer:
    """Serves from `with` on.

    Attributes:
        asked: every request, in order of arrival.
        most_at_once: the most requests that were being answered at one moment.
        connections: open connections.
        bytes_sent: of bodies, in all.
    """

    def __init__(self, script: Script | None = None) -> None:
        self.script: Script = script or (lambda asked, times: reply(f"About {asked.prompt}."))
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self.connections = 0
        self.bytes_sent = 0
        self._now = 0
        self._happened = asyncio.Event()
        self._times: Counter[str] = Counter()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> EndpointServer:
        self._thread.start()
        started = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = self._in_loop(started)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._in_loop(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def __len__(self) -> int:
        return len(self.asked)

    def prompts(self) -> Counter[str]:
        """How often each whole request was made."""
        return Counter(_key(asked) for asked in self.asked)

    def set(self, event: asyncio.Event) -> None:
        """Let what is held go on."""
        self.loop.call_soon_threadsafe(event.set)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Return once the condition holds; it is looked at whenever something happens here."""

        async def waited() -> None:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._happened.clear()
                    await self._happened.wait()

        self._in_loop(waited())

    def _in_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _stop(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.connections -= 1
            self._happened.set()
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): text for name, text in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        asked = Asked(json.loads(body), headers, first.split(" ")[1], time.monotonic())
        self.asked.append(asked)
        self._times[_key(asked)] += 1
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        self._happened.set()
        try:
            answer = self.script(asked, self._times[_key(asked)])
            if answer.held:
                await answer.held.wait()
        finally:
            self._now -= 1
        if answer.silent:
            return False
        length = {"Content-Type": "application/json", "Content-Length": str(len(answer.body))}
        told = "".join(f"{k}: {v}\r\n" for k, v in {**length, **answer.headers}.items())
        writer.write(f"HTTP/1.1 {answer.status} Scripted\r\n{told}\r\n".encode())
        whole = answer.body[: answer.sent]
        for start in range(0, len(whole), 1 << 16):
            piece = whole[start : start + (1 << 16)]
            writer.write(piece)
            await writer.drain()
            self.bytes_sent += len(piece)
        await writer.drain()
        return answer.sent is None


def _key(asked: Asked) -> str:
    return json.dumps(asked.value, sort_keys=True)
