"""Emission ended while it writes: what is there is no data set, and the next run makes it whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

APART = ("report.html", "manifest.json")
"""Files that tell times."""
RENAME = os.replace


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


def end_at(monkeypatch: pytest.MonkeyPatch, folder: Path, write: int | None) -> list[str]:
    """Let the process end before a file of a folder gets its name; the names of those that did."""
    named: list[str] = []

    def replace(old: str, new: str) -> None:
        if folder in Path(new).parents:
            if len(named) == write:
                raise Killed
            named.append(str(Path(new).relative_to(folder)))
        RENAME(old, new)

    monkeypatch.setattr(os, "replace", replace)
    return named


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return {name: data for name, data in found.items() if name not in APART}


def manifest(folder: Path) -> Any:
    value = json.loads((folder / "manifest.json").read_text())
    of_report = {"bytes", "sha256"}
    files = [
        {
            key: part
            for key, part in file.items()
            if file["path"] != APART[0] or key not in of_report
        }
        for file in value.pop("files")
    ]
    return {"files": files} | {
        key: value[key] for key in ("stage", "fingerprint", "inputs", "report")
    }


def test_killed_at_a_write_and_run_again_gives_the_same_files(
    recipe: Any, execute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(recipe.run_folder) / "dataset"
    recipe.value["prefixes"] = {"tokens": 8, "share": 0.3, "max_new_tokens": 16}
    wanted_settings = {"budget_rows": 8, "shard_bytes": 2_000}
    # What an earlier recipe leaves has other names: more shards, and a split.
    earlier_settings = {"budget_rows": 8, "shard_bytes": 800, "validation": 0.5}

    recipe.value["emission"] = wanted_settings
    written = end_at(monkeypatch, folder, None)
    execute()
    wanted, wanted_manifest = contents(folder), manifest(folder)
    assert written[0] == "identity.json"
    assert written[-1] == "manifest.json"
    assert set(written) == {*wanted, *APART}

    places = [written.index(name) for name in ("emitted.parquet", "README.md", "manifest.json")]
    for place in [0, 1, *places[1:-1], len(written) // 2, places[-1]]:
        recipe.value["emission"] = earlier_settings
        end_at(monkeypatch, folder, None)
        execute(restart_from="emission")
        assert set(contents(folder)) - set(wanted)

        recipe.value["emission"] = wanted_settings
        named = end_at(monkeypatch, folder, place)
        with pytest.raises(Killed):
            execute(restart_from="emission")
        assert named == written[:place]
        assert not (folder / "manifest.json").exists()

        end_at(monkeypatch, folder, None)
        done = execute(restart_from="emission")
        assert done.kinds("emission") == ["start", "done"]
        assert done.kinds("mixture") == ["kept"]
        assert contents(folder) == wanted
        assert manifest(folder) == wanted_manifest
