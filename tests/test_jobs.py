"""Jobs on a real Ray cluster: submitting, finding again, stopping, going on; and SIGTERM."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_head import fake_head
from ray_cluster import free_ports, ray_cluster
from typer.testing import CliRunner

from pipeline.cli import app

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TOKEN = hashlib.sha256(b"a cluster of these tests").hexdigest()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *arguments]


def environment(**given: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, "COLUMNS": "200", **given}


def tamis(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment(**env),
    )


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """A cluster that asks for the token."""
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with ray_cluster(BIN, env) as address:
        yield address


def test_package_holds_the_two_packages_and_the_recipe_in_equal_bytes() -> None:
    from pipeline.jobs.package import RECIPE, code_files, package

    files = {**code_files(), RECIPE: b"name: x\n"}
    name, data = package(files)
    assert (name, data) == package(dict(reversed(files.items())))
    assert package({**files, RECIPE: b"name: y\n"})[0] != name
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert archive.read("pipeline/cli.py") == (ROOT / "pipeline/cli.py").read_bytes()
    assert {entry.split("/")[0] for entry in names} == {"pipeline", "stages", RECIPE}
    assert {"stages/emission/report.css", "stages/reflection/prompts.yaml"} <= set(names)
    tracked = {
        str(file.relative_to(ROOT))
        for package_ in ("pipeline", "stages")
        for file in (ROOT / package_).rglob("*.py")
    }
    assert tracked == {entry for entry in names if entry.endswith(".py")}


def test_submission_is_known_by_what_it_does_and_not_by_where_it_was_said(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.config import Config, read_config
    from pipeline.jobs.submission import submission_of

    recipe.value["execution"]["run"] = "runs/here"
    recipe.save()
    monkeypatch.chdir(tmp_path)
    here = submission_of("recipe.yaml", [], None, None)
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    run = [f"execution.run={tmp_path}/runs/here"]
    assert submission_of("../recipe.yaml", run, None, None).id == here.id
    others = [
        submission_of("../recipe.yaml", [], None, None),
        submission_of("../recipe.yaml", [*run, "seed=6"], None, None),
        submission_of("../recipe.yaml", run, "ingest", None),
        submission_of("../recipe.yaml", run, None, "ingest"),
    ]
    assert len({here.id, *(other.id for other in others)}) == 5
    carried = tmp_path / "carried.yaml"
    carried.write_text(here.recipe_yaml)
    read = read_config(str(carried))
    assert isinstance(read, Config)
    assert read == here.config
    assert read.sources[0].path == str(tmp_path / "apples.jsonl")
    assert read.execution.run == str(tmp_path / "runs/here")


def test_cache_that_nobody_named_is_in_the_home_of_who_runs_the_job(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.config import read_config
    from pipeline.jobs.submission import submission_of

    carried = tmp_path / "carried.yaml"

    def there(*overrides: str) -> str:
        monkeypatch.setenv("HOME", "/home/here")
        carried.write_text(submission_of(recipe.save(), overrides, None, None).recipe_yaml)
        monkeypatch.setenv("HOME", "/home/there")
        return read_config(str(carried)).execution.cache

    assert there() == str(tmp_path / "cache")
    assert there("execution.cache=~/mine") == "/home/here/mine"
    del recipe.value["execution"]["cache"]
    assert os.path.expanduser(there()) == "/home/there/.cache/tamis/generations"


def test_token_is_found_as_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.jobs.client import auth_token
    from stages.errors import ConfigError

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert auth_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from home\n")
    assert auth_token() == "from home"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH"):
        auth_token()
    (tmp_path / "gone").write_text("from a file")
    assert auth_token() == "from a file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from the environment")
    assert auth_token() == "from the environment"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert auth_token() is None


def test_nobody_answers_and_wrong_options(recipe: Any) -> None:
    (port,) = free_ports(1)
    for arguments, code, expected in (
        (["submit", recipe.save(), "--address", f"http://127.0.0.1:{port}"], 1, "no Ray dashboard"),
        (["submit", recipe.save(), "--address", "head:8265"], 2, "such as http://head:8265"),
        (["submit", recipe.save(), "--address", "http://127.0.0.1:9", "--stage", "polish"], 2,
         "the stages are ingest"),
        (["submit", "nowhere.yaml", "--address", "http://127.0.0.1:9"], 2, "no recipe at"),
    ):  # fmt: skip
        done = tamis(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


BUSY = """
import hashlib, os, signal, sys
from pipeline.rundir import RunLock
from pipeline.sigterm import end_at_sigterm
from stages.storage import Store
end_at_sigterm()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
child = os.fork()
if child == 0:
    signal.pause()
os.kill(child, signal.SIGTERM)
assert os.waitpid(child, 0)[1] == signal.SIGTERM
with RunLock(Store(sys.argv[1])):
    print("locked", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_sigterm_reaches_a_process_that_is_deep_in_a_library(tmp_path: Path) -> None:
    """Whoever has put a handler of its own in place since, as Ray does; a child's is its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "locked\n"
    before = psutil.Process(process.pid).cpu_times().user
    wait_for(lambda: psutil.Process(process.pid).cpu_times().user > before + 0.2)
    assert (tmp_path / "lock.json").exists()
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert time.monotonic() - asked < 2
    assert not (tmp_path / "lock.json").exists()
    assert "goes on from here" in process.stderr.read()


def test_sigterm_ends_a_process_whose_output_nobody_reads(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=write,
        text=True,
    )
    os.close(write)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    before = psutil.Process(process.pid).cpu_times().user
    wait_for(lambda: psutil.Process(process.pid).cpu_times().user > before + 0.2)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(5) == 128 + signal.SIGTERM
    finally:
        process.kill()
        os.close(read)
    assert not (tmp_path / "lock.json").exists()


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def ready(recipe: Any) -> Any:
    for section in ("reflection", "dictionary", "features", "embedding", "mixture"):
        recipe.value.pop(section)
    recipe.value["models"] = {"student": recipe.value["models"]["student"]}
    recipe.value["models"]["student"]["max_length"] = 512
    recipe.value["selection"] = {"score": "ifd", "share": 0.8}
    recipe.value["execution"]["shards_in_flight"] = 1
    recipe.save()
    return recipe


@pytest.mark.slow
def test_job_is_found_again_stopped_gone_on_with_and_done(guarded: str, recipe: Any) -> None:
    ready(recipe).value["execution"]["backend"] = "ray"
    recipe.save()
    # Many shards: the driver has most of them before it when it is stopped.
    recipe.write_rows("apples", 0, 400)
    address = ("--address", guarded)
    wrong = tamis("submit", str(recipe.path), *address, RAY_AUTH_TOKEN="f" * 64)
    assert wrong.returncode == 2, wrong.stderr
    assert "refuses the token" in wrong.stderr

    known = {"RAY_AUTH_TOKEN": TOKEN}
    client = subprocess.Popen(
        command("submit", str(recipe.path), *address),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(**known),
    )
    assert client.stdout is not None
    first = client.stdout.readline()
    found = re.match(r"job (\S+): submitted", first)
    assert found, first + client.stdout.read()
    job = found.group(1)
    client.kill()
    client.wait()
    again = tamis("submit", str(recipe.path), "--detach", *address, **known)
    assert again.stdout == f"job {job}: already under way\n"

    part = recipe.run_folder / "difficulty" / "part-00000.parquet"
    wait_for(part.exists)
    stop = tamis("job", "stop", job, *address, **known)
    assert stop.stdout.startswith(f"job {job}: stopped"), stop.stderr
    assert not stop.stderr
    assert not (recipe.run_folder / "lock.json").exists()
    assert not (recipe.run_folder / "difficulty" / "manifest.json").exists()
    assert "stopped" in tamis("job", "status", job, *address, **known).stdout
    committed = part.stat().st_mtime_ns

    done = tamis("submit", str(recipe.path), *address, **known)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.startswith(f"job {job}: submitted")
    assert "already there" in done.stdout
    assert part.stat().st_mtime_ns == committed
    kept = tamis("submit", str(recipe.path), *address, **known)
    assert "nothing to do" in kept.stdout
    assert kept.returncode == 0
    (recipe.run_folder / "dataset" / "manifest.json").unlink()
    assert tamis("submit", str(recipe.path), *address, **known).returncode == 0
    assert (recipe.run_folder / "dataset" / "manifest.json").exists()
    assert "data set:" in tamis("job", "logs", job, *address, **known).stdout
    recipe.write_rows("apples", 0, 402)
    more = tamis("submit", str(recipe.path), *address, **known)
    assert more.stdout.startswith(f"job {job}: submitted")
    manifest = json.loads((recipe.run_folder / "ingest" / "manifest.json").read_text())
    assert manifest["rows"] == 411


@pytest.mark.slow
def test_driver_that_finds_the_recipe_wrong_passes_its_exit_status_on(
    guarded: str, recipe: Any
) -> None:
    ready(recipe)
    done = tamis(
        "submit", str(recipe.path), "--stage", "selection", "--address", guarded,
        RAY_AUTH_TOKEN=TOKEN,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "stage selection needs ingest" in done.stdout
    assert "exit status 2" in done.stderr
    unknown = tamis("job", "status", "nobody", "--address", guarded, RAY_AUTH_TOKEN=TOKEN)
    assert unknown.returncode == 2
    assert "knows no job nobody" in unknown.stderr


@pytest.mark.slow
def test_clients_that_meet_an_ended_job_at_once_submit_it_once(
    guarded: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.jobs.client import JobsClient
    from pipeline.jobs.submission import submission_of, submitted

    ready(recipe)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    submission = submission_of(str(recipe.path), [], "selection", None)
    with JobsClient(guarded) as client:
        client.submit(submission.id, "false", {}, {})
        wait_for(lambda: client.job(submission.id).status == "FAILED")

        def meet(_: int) -> str:
            with JobsClient(guarded) as other:
                return submitted(other, submission).state

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(meet, range(4))) == ["attached"] * 3 + ["submitted"]
        # One that was slow to delete what it had found to have ended.
        client.delete(submission.id)
        assert not client.job(submission.id).is_over
        client.stop(submission.id)


@pytest.mark.slow
def test_without_a_token_by_rays_own_client_and_by_ours(recipe: Any) -> None:
    ready(recipe)
    del recipe.value["models"], recipe.value["difficulty"], recipe.value["selection"]
    del recipe.value["targets"]
    recipe.save()
    with ray_cluster(BIN, {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}) as address:
        off = {"RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(
            [str(BIN / "ray"), "job", "submit", "--address", address, "--",
             "python", "-m", "pipeline", "run", str(recipe.path)],
            capture_output=True, text=True, check=False, cwd=ROOT, env=environment(**off),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        manifest = json.loads((recipe.run_folder / "dataset" / "manifest.json").read_text())
        assert manifest["report"]["rows"] == 8
        ours = tamis("submit", str(recipe.path), "--installed", "--address", address, **off)
        assert ours.returncode == 0, ours.stdout + ours.stderr
        assert "nothing to do" in ours.stdout


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_sigterm_ends_within_two_seconds_with_finished_shards_committed(
    recipe: Any, backend: str
) -> None:
    ready(recipe)
    arguments = ["run", str(recipe.path), "-v", "--set", f"execution.backend={backend}"]
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("difficulty: 1/"):
            break
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert time.monotonic() - asked < 2
    assert "goes on from here" in process.stderr.read()
    assert not (recipe.run_folder / "lock.json").exists()
    part = recipe.run_folder / "difficulty" / "part-00000.parquet"
    committed = part.stat().st_mtime_ns
    again = tamis("stage", "difficulty", *arguments[1:])
    assert again.returncode == 0, again.stderr
    assert "1 already there" in again.stderr
    assert part.stat().st_mtime_ns == committed


@contextlib.contextmanager
def jobs_interface(job: str, meanwhile: Callable[[dict[str, str]], None]) -> Iterator[str]:
    """An address with Ray's answers about one job that failed; no driver runs.

    Args:
        job: its id.
        meanwhile: called once before a job is deleted, with statuses by id, which it may change.
    """
    statuses, others = {job: "FAILED"}, [meanwhile]

    class Interface(BaseHTTPRequestHandler):
        def answer(self, status: int, value: Any) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.end_headers()
            self.wfile.write((value if isinstance(value, str) else json.dumps(value)).encode())

        def do_GET(self) -> None:
            if self.path.startswith("/api/packages/"):
                self.answer(200, {})
            elif job in statuses:
                self.answer(200, {"submission_id": job, "status": statuses[job]})
            else:
                self.answer(404, "not found")

        def do_DELETE(self) -> None:
            while others:
                others.pop()(statuses)
            # As Ray 2.60 says it.
            if statuses.get(job, "FAILED") == "FAILED":
                self.answer(200 if statuses.pop(job, None) else 404, {})
            else:
                state = f"but it is in a non-terminal state {statuses[job]}."
                self.answer(500, f"RuntimeError: Attempted to delete job '{job}', {state}")

        def do_POST(self) -> None:
            if job in statuses:
                self.answer(500, f"ValueError: Job with submission_id {job} already exists.")
            else:
                statuses[job] = "PENDING"
                self.answer(200, {"submission_id": job})

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Interface)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("other", "state"),
    [("nothing", "submitted"), ("deleted", "submitted"), ("submitted", "attached")],
)
def test_two_clients_after_a_failed_job_submit_it_once(recipe: Any, other: str, state: str) -> None:
    from pipeline.jobs.client import JobsClient
    from pipeline.jobs.submission import submission_of, submitted

    submission = submission_of(str(recipe.save()), [], None, None)

    def meanwhile(statuses: dict[str, str]) -> None:
        if other != "nothing":
            del statuses[submission.id]
        if other == "submitted":
            statuses[submission.id] = "RUNNING"

    with jobs_interface(submission.id, meanwhile) as address, JobsClient(address) as client:
        assert submitted(client, submission, installed=True) == (submission.id, state)
        job = client.job(submission.id)
        assert job is not None
        assert not job.is_over


def test_what_is_no_dashboard_is_said_in_one_line() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for address, said in (
            ("http://head:abc", "is no URL"),
            (f"http://127.0.0.1:{server.server_port}", "is no Ray dashboard"),
        ):
            done = CliRunner().invoke(app, ["job", "status", "x", "--address", address])
            assert done.exit_code == 2
            assert said in done.stderr
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "exit_status"), [("SUCCEEDED", 0), ("FAILED", 75)])
def test_job_is_followed_to_its_end_though_its_output_is_no_text(
    monkeypatch: pytest.MonkeyPatch, status: str, exit_status: int
) -> None:
    monkeypatch.setattr("pipeline.jobs.submission._POLL_S", 0.01)
    monkeypatch.setattr("pipeline.jobs.submission._SILENCE_S", 0.0)
    with fake_head() as head:
        head.put("j", "RUNNING")
        head.logs["j"] = b"one\n"
        head.at_each_look(
            "j",
            lambda: None,
            lambda: head.logs.update(j=b"one\ntwo\n\xff\n"),
            lambda: None,
            lambda: head.put("j", status, exit_status),
        )
        done = CliRunner().invoke(app, ["job", "logs", "-f", "j", "--address", head.address])
    assert done.exit_code == exit_status
    assert done.stdout == "one\n"
    told, *ended = done.stderr.splitlines()
    assert "can't be read" in told
    assert "UnicodeDecodeError" in told
    assert len(ended) == (exit_status != 0)
