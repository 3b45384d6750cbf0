"""Storage: files appear whole or not at all, on any filesystem, with reproducible bytes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from stages.errors import ConfigError, StageError
from stages.storage import Store, content_identity, expand, iter_lines, parquet_bytes


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")


def test_written_tables_and_metadata_come_back(store: Store) -> None:
    table = pa.table({"a": [1, None, 3], "b": ["x", "y", None]})
    store.write_table("folder/t.parquet", table, {"k": "v"})
    assert store.read_table("folder/t.parquet").equals(table)
    assert store.read_table("folder/t.parquet", ["b"]).column_names == ["b"]
    assert store.table_metadata("folder/t.parquet") == {"k": "v"}
    assert store.names("folder") == ["t.parquet"]
    assert store.names("absent") == []


def test_arrow_files_come_back(store: Store) -> None:
    table = pa.table({"a": [1, None, 3], "b": ["x", "y", None], "c": [[1], [], [2, 3]]})
    labels = pa.array(["u", "v", "u"]).dictionary_encode()
    table = table.append_column("d", labels)
    halves = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    store.write_arrow("folder/t.arrow", halves)
    assert store.read_arrow("folder/t.arrow").equals(table)
    assert store.read_arrow("folder/t.arrow", ["b", "d"]).equals(table.select(["b", "d"]))


def test_names_size_rename_and_remove(store: Store) -> None:
    store.write_bytes("b", b"12")
    store.write_bytes("a/c", b"345")
    assert store.names() == ["a", "b"]
    assert store.size("a/c") == 3
    store.rename("b", "d")
    assert not store.exists("b")
    assert store.read_bytes("d") == b"12"
    store.remove("a")
    assert store.names() == ["d"]
    store.remove("never there")


def test_create_takes_a_name_once(store: Store) -> None:
    assert store.create("lock", b"1")
    assert not store.create("lock", b"2")
    assert store.read_bytes("lock") == b"1"


@pytest.fixture
def refusing_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server like S3 that refuses everybody, and no credentials but those that a test sets."""
    s3fs = pytest.importorskip("s3fs")

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            text = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else text)

        do_HEAD = do_PUT = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("known", [False, True])
def test_object_store_that_refuses_says_what_to_do(
    refusing_store: None, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if known:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    url = f"s3://bucket-{known}/run"
    store = Store(url)
    for call in (
        lambda: store.read_bytes("a"),
        lambda: store.create("lock.json", b"1"),
        lambda: store.write_bytes("a", b"1"),
        lambda: store.names(),
        lambda: list(iter_lines(f"{url}/a.jsonl")),
        lambda: expand(f"{url}/*.jsonl", (".jsonl",)),
        lambda: content_identity(f"{url}/a.jsonl"),
    ):
        with pytest.raises(ConfigError, match=rf"{url}.*access is refused.*AWS_PROFILE"):
            call()


def test_object_store_that_does_not_answer_is_no_mistake_in_the_recipe(
    refusing_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(StageError, match=r"s3://silent/run.*doesn't answer"):
            Store("s3://silent/run").read_bytes("a")


def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("f", b"old")

    def power_cut(descriptor: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        store.write_bytes("f", b"new and longer")
    assert store.read_bytes("f") == b"old"


def test_parquet_bytes_depend_on_rows_and_metadata_alone() -> None:
    rows = pa.table({"a": list(range(100)), "s": [str(i) for i in range(100)]})
    pieces = pa.concat_tables([rows.slice(0, 37), rows.slice(37)])
    assert parquet_bytes(pieces, {"x": "1", "y": "2"}) == parquet_bytes(rows, {"y": "2", "x": "1"})
    assert parquet_bytes(rows, {"x": "1"}) != parquet_bytes(rows, {"x": "2"})
    assert parquet_bytes(rows.slice(1)) != parquet_bytes(rows)


def test_parquet_bytes_are_those_of_the_table_read_back(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("x", pa.list_(pa.float32())), ("y", pa.string())]))
    made = pa.table({"a": pa.array([[{"x": [1.0], "y": None}], None, []], kind)})
    store = Store(str(tmp_path))
    store.write_table("t.parquet", made)
    assert parquet_bytes(store.read_table("t.parquet")) == store.read_bytes("t.parquet")


def test_lines_are_split_at_newline_bytes_only(tmp_path: Path) -> None:
    text = "one\u2028still one\u0085still\ntwo\x0c\n"
    (tmp_path / "f.jsonl").write_text(text, newline="")
    assert [line.decode() for line in iter_lines(str(tmp_path / "f.jsonl"))] == [
        "one\u2028still one\u0085still\n",
        "two\x0c\n",
    ]


def test_missing_and_empty_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.jsonl doesn't exist"):
        expand(str(tmp_path / "absent.jsonl"), (".jsonl",))
    with pytest.raises(ConfigError, match="holds no data file"):
        expand(str(tmp_path), (".jsonl",))
    with pytest.raises(ConfigError, match="cannot open"):
        expand("nonsense://x", (".jsonl",))


def test_content_identity_follows_content_not_name(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    same, other, different = (content_identity(str(tmp_path / name)) for name in "abc")
    assert same == other != different
