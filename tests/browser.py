"""A headless Chromium, spoken to by the DevTools protocol over pipes: no port, no driver."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--remote-debugging-pipe",
]  # fmt: skip


class Browser:
    """One page. `events` holds all that the browser reported since it was opened."""

    def __init__(self, command: str, folder: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def as_3_and_4() -> None:
            # By way of high numbers: a pipe's own end may be 3 or 4.
            for end, number in ((to_read, 203), (to_write, 204)):
                os.dup2(end, number)
            for number in (3, 4):
                os.dup2(200 + number, number, inheritable=True)

        self._process = subprocess.Popen(
            [command, *_FLAGS, f"--user-data-dir={folder}", "about:blank"],
            close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=as_3_and_4,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._sent, self._rest, self._session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> Any:
        """A command's result; what is reported meanwhile goes to `events`."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str) -> None:
        """Load a page, to its load event."""
        self.ask("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()

    def value(self, script: str) -> Any:
        """What an expression is in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def reported(self, *methods: str) -> list[dict[str, Any]]:
        """Events of these methods so far."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read, 1 << 16)
            assert piece, "the browser ended"
            self._rest += piece
        line, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message
