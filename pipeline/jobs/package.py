"""What a job takes along: the recipe, and the code that reads it."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

RECIPE = "recipe.yaml"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def code_files() -> dict[str, bytes]:
    """The files of the packages `pipeline` and `stages` as they are installed here, by path.

    Only these two: what lies beside them in a checkout (`airflow/`, `tests/`) would hide installed
    packages of the same names on the cluster.
    """
    import pipeline
    import stages

    return {
        f"{package.__name__}/{file.relative_to(root).as_posix()}": file.read_bytes()
        for package in (pipeline, stages)
        for root in [Path(str(package.__file__)).parent]
        for file in _package_files(root)
    }


def package(files: Mapping[str, bytes]) -> tuple[str, bytes]:
    """A zip archive whose bytes depend on the files alone, and its name, which depends on those."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])
    data = sink.getvalue()
    return f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:16]}.zip", data


def _package_files(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            yield file
