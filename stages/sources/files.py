"""Which files a source names, and what a person would call them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stages.errors import ConfigError
from stages.sources.readers import SUFFIXES, file_type
from stages.sources.settings import Source
from stages.storage import Store, expand

_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    Attributes:
        url: where it is read.
        name: what rows and rejects call it: the file's own name, or its path below the folder or
            the fixed part of the glob; where a source has several paths, with the folder above it.
            So bytes don't depend on where a project lies.
    """

    url: str
    name: str


def files_of(source: Source) -> list[SourceFile]:
    """Files of a source: paths in the order of the recipe, the files of each sorted.

    Raises:
        ConfigError: a path names nothing, or a file of an unknown type.
    """
    several = len(source.paths) > 1
    return [file for path in source.paths for file in _files(source.name, path, several)]


def _files(source: str, path: str, several: bool) -> list[SourceFile]:
    try:
        urls = expand(path, SUFFIXES)
    except ConfigError as error:
        raise ConfigError(f"source {source}: {error}") from error
    except Exception as error:
        # Each filesystem has its own errors: an unreachable hub raises its HTTP client's.
        raise ConfigError(f"source {source}: cannot read {path}: {error}") from error
    unknown = [url for url in urls if file_type(url) is None]
    if unknown:
        raise ConfigError(
            f"{source}: {unknown[0]} is of no known type; "
            f"readable are {', '.join(t for t in SUFFIXES if t.count('.') == 1)}, each also "
            "compressed (.gz, .bz2, .xz, .zst)"
        )
    root = _root(path)
    folder = Store(root or ".").path("").rstrip("/")
    if not _MAGIC.search(path) and Store(urls[0]).path("") == folder:
        return [SourceFile(urls[0], "/".join(folder.split("/")[-2 if several else -1 :]))]
    # Two folders may hold files of one name, which the folder as written then tells apart.
    prefix = f"{folder.rpartition('/')[2]}/" if several and root else ""
    return [
        SourceFile(url, prefix + Store(url).path("").removeprefix(f"{folder}/")) for url in urls
    ]


def _root(path: str) -> str:
    magic = _MAGIC.search(path)
    return path[: magic.start()].rpartition("/")[0] if magic else path
