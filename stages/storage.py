"""All input and output on sources, runs and caches, by fsspec URL.

A `Store` is a folder on any fsspec filesystem (`/data/run`, `s3://bucket/run`, `memory://run`).
Files appear whole or not at all: on a local disk they are written to a temporary name, flushed and
renamed; object stores commit an object when it is complete. Parquet bytes are a function of the
table, so that equal rows give equal files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import IO, Any, Concatenate, ParamSpec, TypeVar, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from stages.errors import ConfigError, StageError

P = ParamSpec("P")
T = TypeVar("T")

_REFUSALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "SSOError",
)
_SILENCES = ("ConnectionError", "HTTPClientError")
"""Errors of `botocore.exceptions`, which is loaded where a store of S3 is, and is no OSError's."""


def _of_botocore(names: tuple[str, ...]) -> tuple[type[BaseException], ...]:
    module = sys.modules.get("botocore.exceptions")
    return tuple(getattr(module, name) for name in names) if module else ()


def _refusals() -> tuple[type[BaseException], ...]:
    return PermissionError, *_of_botocore(_REFUSALS)


@contextmanager
def _access(url: str) -> Iterator[None]:
    """Say what a person can do where a store lets nobody in, or doesn't answer."""
    try:
        yield
    except _refusals() as error:
        remedy = (
            "give this process credentials for it (for s3:// AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)"
            if "://" in url
            else "check the permissions of the file and its folders"
        )
        raise ConfigError(f"{url}: access is refused ({error}); {remedy}") from error
    except _of_botocore(_SILENCES) as error:
        raise StageError(
            f"{url}: the store doesn't answer ({error}); check the address and the network, and "
            "try again"
        ) from error


def _reporting(
    method: Callable[Concatenate[Store, P], T],
) -> Callable[Concatenate[Store, P], T]:
    """A method of a store whose refusals are told as `_access` does."""

    @wraps(method)
    def called(store: Store, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with _access(store.url):
            return method(store, *args, **kwargs)

    return called


@dataclass(frozen=True)
class Store:
    """A folder on an fsspec filesystem; paths given to its methods are relative to it.

    Raises:
        ConfigError: the URL names a protocol whose filesystem isn't installed, or the store refuses
            access.
        StageError: the store doesn't answer.
    """

    url: str

    @property
    def _located(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return _filesystem(self.url)

    def path(self, name: str) -> str:
        """The filesystem's own path of `name`."""
        _, root = self._located
        return f"{root.rstrip('/')}/{name}" if name else root

    @property
    def local_folder(self) -> str | None:
        """The folder's path on this machine's disk; None where it is elsewhere."""
        fs, root = self._located
        return root if _is_local(fs) else None

    def child(self, name: str) -> Store:
        """The store of a folder inside this one."""
        return Store(f"{self.url.rstrip('/')}/{name}")

    @_reporting
    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        fs, _ = self._located
        return bool(fs.exists(self.path(name)))

    @_reporting
    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders in `folder`, sorted; none where it is absent."""
        fs, _ = self._located
        path = self.path(folder) if folder else self._located[1]
        if not fs.isdir(path):
            return []
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)})

    @_reporting
    def size(self, name: str) -> int:
        """Bytes in a file."""
        fs, _ = self._located
        return int(fs.size(self.path(name)))

    @_reporting
    def sha256(self, name: str) -> str:
        """SHA-256 of a file's bytes, in hex, read in pieces."""
        fs, _ = self._located
        digest = hashlib.sha256()
        with fs.open(self.path(name), "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()

    @_reporting
    def read_bytes(self, name: str) -> bytes:
        """All bytes of a file."""
        fs, _ = self._located
        return cast(bytes, fs.cat_file(self.path(name)))

    @_reporting
    def open(self, name: str) -> IO[bytes]:
        """A file to read pieces of; whoever asks closes it."""
        fs, _ = self._located
        return cast("IO[bytes]", fs.open(self.path(name), "rb"))

    @_reporting
    def write_bytes(self, name: str, data: bytes, *, lasting: bool = True) -> None:
        """Write a file so that it appears whole or not at all.

        Args:
            name: relative to the folder.
            data: what it holds.
            lasting: wait until it would outlive a crash of the machine.
        """
        fs, _ = self._located
        path = self.path(name)
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if not _is_local(fs):
            fs.pipe_file(path, data)
            return
        temporary = f"{path}.tmp-{uuid.uuid4().hex[:12]}"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(temporary, path)

    @_reporting
    def create(self, name: str, data: bytes) -> bool:
        """Write a file only where none of that name exists; False where one does."""
        fs, _ = self._located
        path = self.path(name)
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if _is_local(fs):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            return True
        if fs.exists(path):
            return False
        fs.pipe_file(path, data)
        return True

    def read_json(self, name: str) -> Any:
        """The value in a JSON file."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: object) -> None:
        """Write a value as readable JSON."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_bytes(name, (text + "\n").encode())

    @_reporting
    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as a table, all columns or the named ones."""
        fs, _ = self._located
        with fs.open(self.path(name), "rb") as file:
            return pq.ParquetFile(file).read(columns=columns)

    @_reporting
    def table_rows(self, name: str) -> int:
        """Rows of a Parquet file, by its footer."""
        fs, _ = self._located
        with fs.open(self.path(name), "rb") as file:
            return int(pq.ParquetFile(file).metadata.num_rows)

    @_reporting
    def table_metadata(self, name: str) -> dict[str, str]:
        """The key-value metadata in a Parquet file's footer."""
        fs, _ = self._located
        with fs.open(self.path(name), "rb") as file:
            pairs = pq.ParquetFile(file).schema_arrow.metadata or {}
        return {key.decode(): value.decode() for key, value in pairs.items()}

    def write_table(
        self, name: str, table: pa.Table, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a Parquet file whose bytes depend on the table and metadata alone."""
        self.write_bytes(name, parquet_bytes(table, metadata))

    def write_arrow(self, name: str, table: pa.Table) -> None:
        """Write an Arrow file: larger than Parquet and quicker, for what is soon removed again."""
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table.combine_chunks())
        self.write_bytes(name, sink.getvalue(), lasting=False)

    @_reporting
    def read_arrow(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """An Arrow file as a table, all columns or the named ones in the file's order."""
        fs, _ = self._located
        with fs.open(self.path(name), "rb") as file:
            schema = pa.ipc.open_file(file).schema
            wanted = [schema.get_field_index(column) for column in columns or schema.names]
            options = pa.ipc.IpcReadOptions(included_fields=wanted)
            return pa.ipc.open_file(file, options=options).read_all()

    @_reporting
    def remove(self, name: str) -> None:
        """Delete a file or a folder with all that is in it; nothing where it is absent."""
        fs, _ = self._located
        if fs.exists(self.path(name)):
            fs.rm(self.path(name), recursive=True)

    @_reporting
    def rename(self, old: str, new: str) -> None:
        """Give a file another name (object stores copy and delete)."""
        fs, _ = self._located
        if _is_local(fs):
            os.replace(self.path(old), self.path(new))
        else:
            fs.mv(self.path(old), self.path(new))


def parquet_bytes(
    table: pa.Table,
    metadata: Mapping[str, str] | None = None,
    *,
    group_rows: int = 10_000,
    content_pages: bool = False,
) -> bytes:
    """A table as zstd Parquet; equal arguments give equal bytes.

    Args:
        table: any table; its own schema metadata is replaced.
        metadata: written to the footer, in sorted order.
        group_rows: rows of a row group.
        content_pages: end pages where the content says, so that equal rows make equal pages.
    """
    pairs = dict(sorted((metadata or {}).items()))
    # Arrow calls a list's child "item", Parquet "element"; a table that was read and one that was
    # made would otherwise differ in their footers.
    schema = pa.schema([field.with_type(_as_read(field.type)) for field in table.schema])
    sink = io.BytesIO()
    pq.write_table(
        table.combine_chunks().cast(schema).replace_schema_metadata(pairs),
        sink,
        compression="zstd",
        write_page_index=True,
        row_group_size=group_rows,
        use_content_defined_chunking=content_pages,
    )
    return sink.getvalue()


def _as_read(kind: pa.DataType) -> pa.DataType:
    """The type that a column of this type has after a round through Parquet."""
    if pa.types.is_list(kind):
        return pa.list_(pa.field("element", _as_read(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_read(field.type)) for field in kind])
    return kind


def iter_lines(url: str) -> Iterator[bytes]:
    """Lines of a (possibly compressed) text file, split at newline bytes only.

    `str.splitlines` also splits at U+2028 and its like, which are legal inside JSON strings.
    """
    with _access(url), fsspec.open(url, "rb", compression="infer") as file:
        yield from file


def read_file(url: str) -> bytes:
    """All bytes of a (possibly compressed) file."""
    with _access(url), fsspec.open(url, "rb", compression="infer") as file:
        return cast(bytes, file.read())


def expand(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a path, glob or folder names, sorted; folders are searched for `suffixes`.

    Raises:
        ConfigError: nothing is there, or the folder holds no file of a known type.
    """
    fs, path = _filesystem(url)
    with _access(url):
        is_folder = fs.isdir(path)
        if any(character in path for character in "*?["):
            found = [str(name) for name in fs.glob(path)]
        elif is_folder:
            found = [str(name) for name in fs.find(path) if str(name).endswith(suffixes)]
        else:
            found = [path] if fs.exists(path) else []
    if not found and is_folder:
        kinds = ", ".join(suffix for suffix in suffixes if suffix.count(".") == 1)
        raise ConfigError(f"{url} holds no data file; readable are {kinds} (compressed or not)")
    if not found:
        raise ConfigError(f"{url} doesn't exist; check the path")
    return [str(fs.unstrip_protocol(name)) for name in sorted(found)]


def content_identity(url: str) -> str:
    """What identifies a file's content: SHA-256 if local or in memory, else ETag or size+time."""
    fs, path = _filesystem(url)
    if _is_local(fs) or "memory" in fs.protocol:
        folder, _, name = path.rpartition("/")
        return "sha256:" + Store(str(fs.unstrip_protocol(folder))).sha256(name)
    with _access(url):
        info = fs.info(path)
    for key in ("ETag", "etag", "md5Hash", "blob_id"):
        if info.get(key):
            return f"{key.lower()}:{info[key]}"
    return f"stat:{info.get('size')}:{info.get('LastModified') or info.get('mtime')}"


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        fs, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot open {url}: {error}") from error
    return fs, str(path)


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
