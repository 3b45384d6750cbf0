"""What the operator and the hook say, without a cluster or a scheduler."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from airflow.sdk import Connection
from airflow.sdk.exceptions import AirflowException, AirflowFailException

import tamis_ray_hook as hook
from tamis_ray_operator import (
    TamisOperator,
    job_id_of,
    lacking_after,
    last_json,
)


@pytest.fixture
def page() -> Iterator[str]:
    """A server of pages, at its address."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def slow_head() -> Iterator[tuple[str, list[str]]]:
    """A dashboard that kills its caller while it takes a job; and all that it was asked."""
    asked: list[str] = []

    class Head(BaseHTTPRequestHandler):
        def answer(self, status: int, value: object) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def do_GET(self) -> None:
            self.answer(404, "no such job")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            if self.path == "/api/jobs/":
                os.kill(os.getpid(), signal.SIGTERM)
                # Answered when the signal's handler has had its say.
                handled.wait(30)
                asked.append("taken")
            else:
                handled.set()
            self.answer(200, {})

        def log_message(self, *_: object) -> None:
            pass

    handled = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Head)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def jobs_at(host: str) -> hook.RayJobs:
    return hook.RayJobs(Connection(conn_id="ray_odd", conn_type="generic", host=host))


def test_stages_that_a_recipe_lacks_are_skipped_up_to_the_next_that_it_has() -> None:
    stages = ["ingest", "difficulty", "features", "selection", "mixture", "emission"]
    named = ["ingest", "selection", "emission"]
    assert lacking_after("plan", named, stages) == []
    assert lacking_after("plan", named[1:], stages) == ["ingest", "difficulty", "features"]
    assert lacking_after("ingest", named, stages) == ["difficulty", "features"]
    assert lacking_after("selection", named, stages) == ["mixture"]
    assert lacking_after("emission", named, stages) == []
    with pytest.raises(AirflowFailException, match="no task for: brevity, other;"):
        lacking_after("plan", ["ingest", "brevity", "emission", "other"], stages)


def test_job_is_another_where_the_command_or_the_try_is() -> None:
    ti = SimpleNamespace(dag_id="curate", run_id="r", task_id="plan", map_index=-1, try_number=2)
    second = job_id_of(ti, ["plan", "a.yaml"])
    assert second == job_id_of(ti, ["plan", "a.yaml"], 2)
    assert second != job_id_of(ti, ["plan", "b.yaml"])
    assert second != job_id_of(ti, ["plan", "a.yaml"], 1)


def test_lines_that_only_look_like_json_are_passed_over() -> None:
    assert last_json('{"rows": 3}\n{braces}\n{"cut": }\nend') == {"rows": 3}
    with pytest.raises(AirflowException, match=r"no JSON .* end with: {braces}"):
        last_json("{braces}")


def test_airflows_own_timeout_is_refused() -> None:
    with pytest.raises(AirflowException, match="job_timeout"):
        TamisOperator(task_id="x", command=[], execution_timeout=timedelta(hours=1))


def test_what_is_no_dashboard_is_refused(page: str) -> None:
    with pytest.raises(hook.Refused, match="ray_odd is no URL"):
        asyncio.run(jobs_at("http://head:abc").job("x"))
    with pytest.raises(hook.Refused, match="is no Ray dashboard"):
        asyncio.run(jobs_at(page).job("x"))
    with pytest.raises(hook.Refused, match="is no Ray dashboard"):
        asyncio.run(jobs_at(page).submit("x", "true", {}, {}))


def test_head_that_takes_no_job_in_time_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def starting(*_: object) -> object:
        raise hook.Unanswered("500, No available agent to submit job")

    monkeypatch.setattr(hook, "_STARTING_S", 0.05)
    jobs = jobs_at("http://head:8265")
    monkeypatch.setattr(jobs, "_asked", starting)
    with pytest.raises(hook.Unanswered, match="takes no job"):
        asyncio.run(jobs.submit("x", "true", {}, {}))


def test_task_that_is_killed_while_it_submits_leaves_no_job(
    slow_head: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = slow_head
    connection = json.dumps({"conn_type": "generic", "host": address})
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", connection)
    task = TamisOperator(task_id="x", command=["plan"])
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="x", map_index=-1, try_number=1)
    # As Airflow's own handler of the signal does.
    before = signal.signal(signal.SIGTERM, lambda *_: task.on_kill())
    try:
        with pytest.raises(AirflowException, match="its task was killed"):
            task.execute({"ti": ti})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked[-1] == f"/api/jobs/{job_id_of(ti, ['plan'])}/stop"
    assert asked.index("taken") < len(asked) - 1
