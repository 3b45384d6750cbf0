"""The Jobs interface of a Ray head, answering as Ray 2.60 does; it runs no driver."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Head:
    """What a head knows, and what it was asked.

    Attributes:
        address: of its dashboard.
        jobs: by id, as it tells of them.
        logs: by job id, what drivers have written.
        asked: the requests, such as `POST /api/jobs/x/stop`.
        bodies: of the jobs that were taken.
        before: done once before a request, by its text, is answered.
        token: what it asks for; None for nothing.
        failing: how often a request fails yet, by its text, as `asked` has it.
        cut: whether it fails by ending the connection, and not by status 500.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.before: dict[str, Callable[[], None]] = {}
        self.failing: dict[str, int] = {}
        self.cut = False
        self.token: str | None = None

    def put(self, job_id: str, status: str, exit_status: int | None = None, age: float = 0) -> None:
        self.jobs[job_id] = {
            "submission_id": job_id, "status": status, "message": "said by Ray",
            "driver_exit_code": exit_status, "driver_node_id": "node",
            "start_time": int(1000 * (time.time() - age)),
        }  # fmt: skip

    def at_each_look(self, job_id: str, *steps: Callable[[], None]) -> None:
        """Do one thing before each answer about a job."""
        left = iter(steps)

        def act() -> None:
            if (step := next(left, None)) is not None:
                self.before[f"GET /api/jobs/{job_id}"] = act
                step()

        self.before[f"GET /api/jobs/{job_id}"] = act

    def answered(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        url = urlsplit(path)
        self.asked.append(f"{method} {url.path}")
        if (act := self.before.pop(self.asked[-1], None)) is not None:
            act()
        if self.failing.get(self.asked[-1], 0) > 0:
            self.failing[self.asked[-1]] -= 1
            return 500, "RuntimeError: out of order"
        if url.path == "/api/v0/logs/file":
            asked = {key: values[0] for key, values in parse_qs(url.query).items()}
            log = self.logs[asked["submission_id"]]
            end = len(log) - log.endswith(b"\n")
            start = end
            for _ in range(int(asked["lines"])):
                start = log.rfind(b"\n", 0, max(start, 0))
            return 200, log[start + 1 :]
        name, what = [*url.path.split("/")[3:], "", ""][:2]
        if method == "POST" and not name:
            told = json.loads(body)
            name = told["submission_id"]
            if name in self.jobs:
                return 500, f"ValueError: Job with submission_id {name} already exists."
            self.bodies.append(told)
            self.put(name, "RUNNING")
            return 200, {"submission_id": name}
        if name not in self.jobs:
            return 404, f"Job {name} does not exist"
        if what == "logs":
            try:
                return 200, {"logs": self.logs.get(name, b"").decode()}
            except UnicodeDecodeError as error:
                return 500, f"UnicodeDecodeError: {error}"
        if what == "stop":
            runs = self.jobs[name]["status"] not in ENDED
            if runs:
                self.jobs[name]["status"] = "STOPPED"
            return 200, {"stopped": runs}
        if method == "DELETE":
            if self.jobs[name]["status"] not in ENDED:
                return 500, "RuntimeError: it is in a non-terminal state RUNNING."
            del self.jobs[name]
            return 200, {}
        return 200, self.jobs[name]


@contextmanager
def fake_head() -> Iterator[Head]:
    class Interface(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = head.answered(self.command, self.path, body)
            if head.token and self.headers.get("Authorization") != f"Bearer {head.token}":
                status, value = 401, "Unauthorized: Invalid or missing authentication token"
            if status == 500 and head.cut:
                return
            text = value if isinstance(value, str | bytes) else json.dumps(value)
            data = text if isinstance(text, bytes) else text.encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Interface)
    head = Head(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield head
    finally:
        server.shutdown()
        server.server_close()
