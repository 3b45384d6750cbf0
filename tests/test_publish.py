"""`tamis push` against a local server that answers as the Hub does, and `tamis report`."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.why import story

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
                    value = entry["value"]
                    if entry["key"] == "file":
                        seen.files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "deletedFile":
                        del seen.files[value["path"]]
                self._answer(200, {"commitUrl": f"{self._base}/commit/abc", "commitOid": "abc"})
            else:
                self._answer(200, {})

        def do_GET(self) -> None:
            seen.requests += 1
            if "/tree/" in self.path:
                files = [
                    {"type": "file", "path": name, "oid": "abc", "size": len(data)}
                    for name, data in seen.files.items()
                ]
                self._answer(200, files)
            else:
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
    recipe.value["emission"] = {"budget_rows": 8, "validation": 0.25}
    recipe.value["prefixes"] = {"tokens": 8, "share": 0.3, "max_new_tokens": 16}
    recipe.value["sources"][0]["license"] = "mit"
    if _FINISHED:
        shutil.copytree(_FINISHED[0], folder)
        return folder
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
        "validation/validation-00000-of-00001.parquet", "prefix/train-00000-of-00001.parquet",
        "prefix/validation-00000-of-00001.parquet",
    }  # fmt: skip
    assert set(hub.files) == expected == listed(done.stdout)
    for name, data in hub.files.items():
        assert data == (run / "dataset" / name).read_bytes()
    assert "warning: " in done.stderr
    assert "state no licence (of pears)" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_second_push_leaves_no_file_of_the_first_and_all_of_others(
    run: Path, recipe: Any, execute: Any, hub: Hub, tmp_path: Path
) -> None:
    import datasets

    others = {".gitattributes": b"x", "data/notes.csv": b"a", "data/train-1.parquet": b"b"}
    hub.files |= others
    for shard_bytes, report in ((1_000, ["--with-report"]), (1_000_000, [])):
        recipe.value["emission"] = {"budget_rows": 8, "shard_bytes": shard_bytes}
        if shard_bytes == 1_000:
            recipe.value["emission"]["validation"] = 0.25
        execute(restart_from="emission")
        done = tamis("push", str(run), "--repo", "org/set", *report, port=hub.port)
        assert done.returncode == 0, done.stderr
        pushed = {name: data for name, data in hub.files.items() if name not in others}
        assert set(pushed) == listed(done.stdout)
        shards = [name for name in pushed if name.startswith("data/")]
        assert (len(shards) > 1) == (shard_bytes == 1_000)
    assert hub.files == others | pushed
    for name, data in pushed.items():
        path = tmp_path / "cloned" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    loaded = datasets.load_dataset(
        str(tmp_path / "cloned"), split="train", cache_dir=str(tmp_path / "datasets")
    )
    assert sorted(loaded["id"]) == sorted(set(loaded["id"]))
    assert len(loaded) == 8


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


def test_why_tells_what_became_of_every_row(run: Path) -> None:
    """Of kept, undrawn and dropped rows alike; what it says is looked up in the files."""
    decisions = pq.read_table(run / "selection" / "decisions.parquet").to_pylist()
    emitted = set(pq.read_table(run / "dataset" / "emitted.parquet")["id"].to_pylist())
    reflected = {
        row["id"]: row["messages_reflected"]
        for part in sorted((run / "reflection").glob("part-*.parquet"))
        for row in pq.read_table(part, columns=["id", "messages_reflected"]).to_pylist()
    }
    told = {row["id"]: story(str(run), row["id"], full=True) for row in decisions}
    fates = set()
    for row in decisions:
        text = told[row["id"]]
        lines = {line[:12].strip(): line[12:] for line in text.splitlines() if line[:12].strip()}
        for stage in ("difficulty", "reflection", "prefixes", "features", "embedding"):
            assert lines[stage].startswith(("ok", "failed"))
        if row["keep"]:
            assert lines["selection"].startswith("kept")
            assert "has the weight" in lines["mixture"]
        else:
            assert lines["selection"].startswith(f"dropped: {row['reason']}")
            assert "emission" not in lines
        if row["id"] in emitted:
            fates.add("emitted")
            for name in ("emission", "prefix"):
                match = re.search(r"(\S+\.parquet), line (\d+)", lines[name])
                assert match
                file, line = run / "dataset" / match[1], int(match[2])
                assert pq.read_table(file)["id"][line].as_py() == row["id"]
        elif row["keep"]:
            fates.add("not drawn")
            assert lines["emission"].startswith("not drawn: ")
        else:
            fates.add("dropped")
        assert ("changes" in lines) == (reflected[row["id"]] is not None)
        if reflected[row["id"]]:
            fates.add("rewritten")
            new = reflected[row["id"]][-1]["content"]
            assert lines["rewritten"].endswith(new)
            after = re.sub(r"\[-.*?-\]", "", lines["changes"]).replace("{+", "").replace("+}", "")
            assert after.endswith(new)
    assert fates == {"emitted", "not drawn", "dropped", "rewritten"}


def test_license_policy_holds_from_record_to_data_set(recipe: Any, execute: Any) -> None:
    recipe.value["sources"][0]["license"] = "MIT"
    recipe.value["license_policy"] = {"allow": ["mit"]}
    recipe.value["models"]["teacher"]["terms"] = "unrestricted"
    recipe.value["emission"] = {"budget_rows": 4}
    execute()
    folder = recipe.run_folder
    decisions = pq.read_table(folder / "selection" / "decisions.parquet").to_pylist()
    for row in decisions:
        assert (row["reason"] == "license: not stated") == (row["source"] == "pears")
    lineage = json.loads((folder / "dataset" / "lineage.json").read_text())
    assert lineage["licenses"] == {"apples": {"mit": 4}}
    assert lineage["warnings"] == []
    card = (folder / "dataset" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "Rows of other licences than mit were blocked: 9." in card
