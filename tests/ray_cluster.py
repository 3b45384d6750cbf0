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
from contextlib import ExitStack, contextmanager, suppress
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

    def started() -> subprocess.Popen[bytes]:
        with log.open("w") as out:
            return subprocess.Popen(
                command,
                # Where it stands is where its drivers import from first.
                cwd=Path(__file__).resolve().parents[1],
                env={**inherited, "PATH": path, **env},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    head = started()
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(4):
            if _answers(address, head, log):
                break
            head = started()
        else:
            raise RuntimeError(f"the machine is too busy for Ray: {log.read_text()[-2000:]}")
        yield address
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def _answers(address: str, head: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait for the cluster; False where its head gave up because the machine is busy."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        if head.poll() is not None:
            said = log.read_text()
            # Ray gives a node 30 s.
            if "timed out during startup" in said:
                with suppress(ProcessLookupError):
                    os.killpg(head.pid, signal.SIGKILL)
                return False
            raise RuntimeError(f"ray start ended: {said[-2000:]}")
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                answers = True
        except urllib.error.HTTPError as error:
            answers = error.code in (401, 403)
        except OSError:
            answers = False
        # The dashboard answers before the node is known, and also where it never will be.
        if answers and "Ray runtime started" in log.read_text():
            return True
        time.sleep(0.5)
    raise RuntimeError(f"no cluster after 180 s: {log.read_text()[-2000:]}")
