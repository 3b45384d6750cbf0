"""A real Ray cluster of one node on loopback, with its dashboard, in processes of its own.

Only the standard library: the tests of the DAGs, which have no Ray, use it too.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextmanager
def ray_cluster(bin_folder: Path, env: Mapping[str, str]) -> Iterator[str]:
    """The dashboard's address; the cluster ends with the context.

    Args:
        bin_folder: where `ray` and the drivers' `python` are.
        env: added to the environment of the cluster.
    """
    gcs, dashboard, agent, agent_grpc, client = free_ports(5)
    # Short: it holds sockets, whose paths may have some 100 characters.
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    command = [
        str(bin_folder / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address", "127.0.0.1", "--port", str(gcs),
        "--include-dashboard", "true", "--dashboard-host", "127.0.0.1",
        "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent),
        "--dashboard-agent-grpc-port", str(agent_grpc), "--ray-client-server-port", str(client),
        "--num-cpus", "4", "--object-store-memory", str(200 << 20), "--temp-dir", temporary,
    ]  # fmt: skip
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_"))}
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    log = Path(temporary) / "start.log"
    with log.open("w") as out:
        head = subprocess.Popen(
            command,
            env={**inherited, "PATH": path, **env},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait(address, head, log)
        yield address
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def _wait(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        if head.poll() is not None:
            raise RuntimeError(f"ray start ended: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"no dashboard after 90 s: {log.read_text()[-2000:]}")
