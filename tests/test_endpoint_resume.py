"""SIGKILL while an endpoint is being asked, on both backends, with a real model as the student.

The server counts: what was answered and committed is never asked again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from endpoint_server import Answer, Asked, EndpointServer, reply

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-test-0123456789abcdef"
ROWS, CONCURRENCY, CHUNK, SHARDS = 19, 3, 2, 2
ANSWERED = 8


def started(recipe: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", recipe.save()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "TEACHER_KEY": KEY},
    )


def finished(recipe: Any) -> None:
    process = started(recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert KEY not in output


def killed(process: subprocess.Popen[str]) -> None:
    """End the run at once, and wait until what it started is gone too."""
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any(name in " ".join(child.cmdline()) for name in ("EngineActor", "ShardWorker"))
    ]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_killed_run_asks_again_only_what_was_in_flight(
    recipe: Any, tmp_path: Path, backend: str
) -> None:
    stuck = asyncio.Event()

    def script(asked: Asked, times: int) -> Answer:
        done = reply(f"In full: {asked.value['messages'][0]['content']} That is the answer.")
        late = len(server) > ANSWERED
        return Answer(body=done.body, held=stuck if late else None)

    with EndpointServer(script) as server:
        for section in ("difficulty", "dictionary", "features", "embedding", "mixture"):
            del recipe.value[section]
        recipe.value["selection"] = {}
        recipe.value["reflection"] |= {"phases": "response"}
        recipe.value["execution"] |= {"backend": backend, "shards_in_flight": SHARDS}
        recipe.value["models"]["teacher"] = {
            "model": "big",
            "engine": "openai",
            "generation_chunk": CHUNK,
            "endpoint": {
                "base_url": server.url,
                "api_key_env": "TEACHER_KEY",
                "concurrency": CONCURRENCY,
            },
        }
        process = started(recipe)
        server.wait_for(lambda: len(server) == ANSWERED + CONCURRENCY, timeout_s=200)
        killed(process)
        assert not (recipe.run_folder / "reflection" / "manifest.json").exists()
        server.set(stuck)
        server.wait_for(lambda: server.connections == 0)
        assert len(server) == ANSWERED + CONCURRENCY

        finished(recipe)
        times = server.prompts()
        assert len(times) == ROWS
        again = sum(times.values()) - ROWS
        # In flight at the kill, and replies of each shard that had not filled a chunk.
        assert CONCURRENCY <= again <= CONCURRENCY + SHARDS * (CHUNK - 1)
        assert server.most_at_once == CONCURRENCY
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
