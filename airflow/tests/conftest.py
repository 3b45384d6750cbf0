"""A real Ray cluster and a real Airflow beside it, both on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from ray_cluster import free_ports, ray_cluster  # noqa: E402

TOKEN = "a1" * 32
TAMIS_BIN = Path(os.environ.get("TAMIS_BIN", ROOT / ".venv/bin"))
"""Where the cluster's `ray` and `python` are: an environment with tamis installed."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    with ray_cluster(TAMIS_BIN, env) as address:
        yield address


@pytest.fixture(scope="session")
def airflow_env(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of an Airflow whose database is there."""
    home = tmp_path_factory.mktemp("airflow")
    (port, log_port, trigger_port) = free_ports(3)
    connection = {"conn_type": "generic", "host": cluster, "password": TOKEN}
    wrong = {**connection, "password": "b2" * 32}
    (dead,) = free_ports(1)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "PYTEST_"))},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "airflow/dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "airflow/plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(log_port),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(trigger_port),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "AIRFLOW_CONN_RAY_DEFAULT": json.dumps(connection),
        "AIRFLOW_CONN_RAY_WRONG": json.dumps(wrong),
        "AIRFLOW_CONN_RAY_DEAD": json.dumps({**connection, "host": f"http://127.0.0.1:{dead}"}),
        "NO_PROXY": "127.0.0.1",
    }
    for command in (
        ["db", "migrate"],
        ["pools", "set", "tamis_gpu", "1", "one stage at a time", "--include-deferred"],
    ):
        done = subprocess.run(
            ["airflow", *command], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return env


class Api:
    """Airflow's REST interface, as its web page uses it."""

    def __init__(self, base: str) -> None:
        self.base = base
        token = httpx.get(f"{base}/auth/token", timeout=30).json()["access_token"]
        self.http = httpx.Client(
            base_url=f"{base}/api/v2", timeout=60, headers={"Authorization": f"Bearer {token}"}
        )

    def ask(self, method: str, path: str, body: Any = None, **params: Any) -> Any:
        reply = self.http.request(method, path, json=body, params=params)
        assert reply.is_success, reply.text
        return reply.json() if reply.content else None

    def start(self, dag: str, **conf: str) -> str:
        body = {"logical_date": None, "conf": conf}
        return str(self.ask("POST", f"/dags/{dag}/dagRuns", body)["dag_run_id"])

    def tasks(self, dag: str, run: str) -> dict[str, Any]:
        found = self.ask("GET", f"/dags/{dag}/dagRuns/{run}/taskInstances")["task_instances"]
        return {task["task_id"]: task for task in found}

    def state(self, dag: str, run: str) -> str:
        return str(self.ask("GET", f"/dags/{dag}/dagRuns/{run}")["state"])

    def xcom(self, dag: str, run: str, task: str, key: str) -> Any:
        place = f"/dags/{dag}/dagRuns/{run}/taskInstances/{task}/xcomEntries/{key}"
        return self.ask("GET", place)["value"]

    def log(self, dag: str, run: str, task: str, number: int) -> str:
        place = f"/dags/{dag}/dagRuns/{run}/taskInstances/{task}/logs/{number}"
        content = self.ask("GET", place, full_content=True)["content"]
        return "\n".join(str(line.get("event", line)) for line in content)

    def over(self, dag: str, run: str, seconds: float = 600) -> dict[str, Any]:
        """The tasks of a run once it is over."""
        wait_for(lambda: self.state(dag, run) in ("success", "failed"), seconds)
        return self.tasks(dag, run)


def wait_for(condition: Callable[[], Any], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(1)


@pytest.fixture(scope="session")
def api(airflow_env: dict[str, str]) -> Iterator[Api]:
    """`airflow standalone`: scheduler, triggerer, DAG processor and API server."""
    base = airflow_env["AIRFLOW__API__BASE_URL"]
    log = Path(airflow_env["AIRFLOW_HOME"]) / "standalone.out"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["airflow", "standalone"],
            env=airflow_env,
            cwd=airflow_env["AIRFLOW_HOME"],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return httpx.get(f"{base}/api/v2/monitor/health", timeout=5).is_success
        except httpx.TransportError:
            return False

    try:
        wait_for(answers)
        api = Api(base)
        wait_for(lambda: {"curate", "train_sae"} <= {
            dag["dag_id"] for dag in api.ask("GET", "/dags")["dags"]
        })  # fmt: skip
        yield api
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
