"""What the operator and the hook say, without a cluster or a scheduler."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from airflow.sdk import Connection
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from conftest import ROOT

sys.path.insert(0, str(ROOT / "airflow/plugins"))

import tamis_ray_hook as hook
from tamis_ray_operator import (
    TamisOperator,
    job_id_of,
    last_json,
    refuse_unknown,
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


def jobs_at(host: str) -> hook.RayJobs:
    return hook.RayJobs(Connection(conn_id="ray_odd", conn_type="generic", host=host))


def test_stage_without_a_task_is_refused_by_name() -> None:
    refuse_unknown(["ingest", "emission"], ["ingest", "selection", "emission"])
    with pytest.raises(AirflowFailException, match="no task for: brevity, other;"):
        refuse_unknown(["ingest", "brevity", "emission", "other"], ["ingest", "emission"])


def test_job_is_another_where_the_command_is() -> None:
    ti = SimpleNamespace(dag_id="curate", run_id="r", task_id="plan", map_index=-1)
    first = job_id_of(ti, ["plan", "a.yaml"])
    assert first == job_id_of(ti, ["plan", "a.yaml"])
    assert first != job_id_of(ti, ["plan", "b.yaml"])


def test_lines_that_only_look_like_json_are_passed_over() -> None:
    assert last_json('{"rows": 3}\n{braces}\n{"cut": }\nend') == {"rows": 3}
    with pytest.raises(AirflowException, match="no line of JSON"):
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
