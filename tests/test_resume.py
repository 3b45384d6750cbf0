"""SIGKILL in the middle of every model stage, on both backends, on real models.

A killed run that is started again must end with the bytes of an undisturbed one, and must not
compute a finished shard again.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("difficulty", "reflection", "dictionary", "features", "embedding")


def command(folder: Path, backend: str) -> list[str]:
    return [
        sys.executable, "-m", "pipeline", "run", "tests/recipes/tiny.yaml", "-v",
        "--set", f"execution.run={folder}/run",
        "--set", f"execution.cache={folder}/cache",
        "--set", f"execution.backend={backend}",
    ]  # fmt: skip


def hashes(run: Path) -> dict[str, str]:
    files = [*run.rglob("*.parquet"), *run.rglob("*.safetensors")]
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
    }


def parts(run: Path, stage: str) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (run / stage).glob("part-*.parquet")}


def kill_in(stage: str, folder: Path, backend: str) -> None:
    """Start the run, and kill it once `stage` has started (a row stage: with a shard committed)."""
    process = subprocess.Popen(
        command(folder, backend),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    waited = f"{stage}: 1/" if stage != "dictionary" else "dictionary"
    for line in process.stderr:
        if line.startswith(waited):
            break
    else:
        pytest.fail(f"the run ended before {stage}: exit status {process.wait()}")
    models = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "EngineActor" in " ".join(child.cmdline())
    ]
    assert bool(models) == (backend == "ray")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # A local Ray cluster dies with the driver that started it (its agents some seconds later).
    assert not psutil.wait_procs(models, timeout=60)[1]
    assert not (folder / "run" / stage / "manifest.json").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(
        command(folder, "local"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return hashes(folder / "run")


@pytest.mark.parametrize(
    ("backend", "stages"),
    [
        ("local", STAGES),
        ("ray", ("reflection", "dictionary")),
        pytest.param("ray", STAGES, marks=pytest.mark.slow),
    ],
)
def test_killed_in_stages_and_run_again_gives_the_same_bytes(
    undisturbed: dict[str, str], tmp_path: Path, backend: str, stages: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    finished: dict[str, dict[str, int]] = {}
    for stage in stages:
        kill_in(stage, tmp_path, backend)
        for earlier, times in finished.items():
            now = parts(run, earlier)
            assert {name: now[name] for name in times} == times, f"{earlier} was computed again"
        finished[stage] = parts(run, stage)
    assert all(finished[stage] for stage in stages if stage != "dictionary")
    done = subprocess.run(
        command(tmp_path, backend), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for stage, times in finished.items():
        now = parts(run, stage)
        assert {name: now[name] for name in times} == times, f"{stage} was computed again"
    assert hashes(run) == undisturbed
