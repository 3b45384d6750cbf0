"""`tamis push` against a local server that answers as the Hub does, and `tamis report`."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_of_this_test"


@dataclass
class Hub:
    """A server with the routes that an upload uses, and what it was sent."""

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    requests: int = 0
    refuse: int | None = None


@pytest.fixture
def hub() -> Iterator[Hub]:
    seen = Hub()

    class Routes(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.requests += 1
            seen.tokens.add(self.headers.get("authorization"))
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if seen.refuse is not None:
                self._answer(seen.refuse, {"error": "no"})
            elif self.path == "/api/repos/create":
                seen.made.append(json.loads(body))
                self._answer(200, {"url": f"http://127.0.0.1:{seen.port}/datasets/org/set"})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                modes = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in asked
                ]
                self._answer(200, {"files": modes})
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        value = entry["value"]
                        seen.files[value["path"]] = base64.b64decode(value["content"])
                self._answer(200, {"commitUrl": f"{self._base}/commit/abc", "commitOid": "abc"})
            else:
                self._answer(200, {})

        def do_GET(self) -> None:
            seen.requests += 1
            self._answer(200, {"sha": "abc", "siblings": [], "id": "org/set"})

        @property
        def _base(self) -> str:
            return f"http://127.0.0.1:{seen.port}/datasets/org/set"

        def _answer(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Routes)
    seen.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield seen
    server.shutdown()
    thread.join()
    server.server_close()


def tamis(*arguments: str, port: int | None = None, token: str | None = TOKEN) -> Any:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    if token:
        environment["HF_TOKEN"] = token
    environment["HF_HUB_DISABLE_XET"] = "1"
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{port or 9}"
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


def listed(stdout: str) -> set[str]:
    return {line.split()[1] for line in stdout.splitlines() if line.startswith("  ")}


_FINISHED: list[Path] = []


@pytest.fixture
def run(recipe: Any, execute: Any) -> Path:
    """A finished run; made once, and copied for each test."""
    folder = Path(recipe.run_folder)
    if _FINISHED:
        shutil.copytree(_FINISHED[0], folder)
        return folder
    recipe.value["emission"] = {"budget_rows": 8, "validation": 0.25}
    recipe.value["sources"][0]["license"] = "mit"
    execute()
    _FINISHED.append(folder.with_name("finished"))
    shutil.copytree(folder, _FINISHED[0])
    return folder


def test_push_uploads_the_data_set_and_neither_report_nor_run_files(run: Path, hub: Hub) -> None:
    done = tamis("push", str(run), "--repo", "org/set", "--private", port=hub.port)
    assert done.returncode == 0, done.stderr
    assert "/datasets/org/set" in done.stdout
    assert hub.made[0]["visibility"] == "private"
    assert hub.made[0]["type"] == "dataset"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    expected = {
        "README.md", "lineage.json", "croissant.json", "recipe.yaml", "dataset_info.json",
        "trainers/trl_sft.py", "trainers/axolotl.yaml", "data/train-00000-of-00001.parquet",
        "validation/validation-00000-of-00001.parquet",
    }  # fmt: skip
    assert set(hub.files) == expected == listed(done.stdout)
    for name, data in hub.files.items():
        assert data == (run / "dataset" / name).read_bytes()
    assert "warning: " in done.stderr
    assert "state no licence (of pears)" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_dry_run_lists_the_same_files_and_asks_nobody(run: Path, hub: Hub) -> None:
    done = tamis("push", str(run), "--repo", "org/set", "--dry-run", port=hub.port, token=None)
    assert done.returncode == 0, done.stderr
    assert "would go to org/set" in done.stdout
    assert hub.requests == 0
    assert "report.html" not in listed(done.stdout)
    shown = tamis("push", str(run), "--repo", "org/set", "--dry-run", "--with-report")
    assert listed(shown.stdout) - listed(done.stdout) == {"report.html"}


def test_what_cannot_be_pushed_is_refused_in_one_line(run: Path, hub: Hub, tmp_path: Path) -> None:
    hub.refuse = 401
    card = run / "dataset" / "README.md"
    text = card.read_text()
    for arguments, changed, status, expected in (
        (["--repo", "set"], False, 2, "give ORG/NAME"),
        (["--repo", "org/set"], False, 2, "HF_TOKEN"),
        (["--repo", "org/set"], True, 1, "isn't the file that the run wrote"),
    ):
        card.write_text(text + "!" if changed else text)
        done = tamis("push", str(run), *arguments, port=hub.port)
        assert done.returncode == status, done.stderr
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
    card.write_text(text)
    assert tamis("push", str(run), "--repo", "org/set", port=9).returncode == 1
    assert tamis("push", str(tmp_path), "--repo", "org/set").returncode == 2


def test_report_is_rendered_again_equal_and_verified(run: Path) -> None:
    page = run / "dataset" / "report.html"
    before, other = (
        page.read_bytes(),
        {
            file: file.read_bytes()
            for file in (run / "dataset").rglob("*")
            if file.is_file() and file.name not in ("report.html", "manifest.json")
        },
    )
    page.write_text("spoilt")
    assert tamis("verify", str(run)).returncode == 1
    done = tamis("report", str(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(page)
    assert page.read_bytes() == before
    assert {file: file.read_bytes() for file in other} == other
    assert tamis("verify", str(run)).returncode == 0
    lineage = run / "dataset" / "lineage.json"
    lineage.write_text(lineage.read_text().replace('"schema": 2', '"schema": 1'))
    done = tamis("report", str(run))
    assert done.returncode == 1
    assert "--restart-from emission" in done.stderr


def test_report_without_a_data_set_says_so(recipe: Any, execute: Any) -> None:
    execute("ingest")
    done = tamis("report", str(recipe.run_folder))
    assert done.returncode == 2
    assert "no data set yet" in done.stderr
