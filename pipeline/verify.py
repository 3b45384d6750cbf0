"""Check a run against its manifests."""

from __future__ import annotations

from pipeline.flow import folder_of
from pipeline.rundir import opened_run, read_manifest, stages_of
from stages.errors import StageError


def verified_files(url: str) -> int:
    """How many files were hashed and counted again and found as their manifests say.

    Raises:
        ConfigError: no run is there.
        StageError: a file is missing, changed, or holds another number of rows; or rows were lost.
    """
    run = opened_run(url)
    wrong: list[str] = []
    checked = 0
    for stage in stages_of(run):
        manifest = read_manifest(run, stage)
        if manifest is None:
            continue
        folder = run.child(folder_of(stage))
        for entry in manifest["files"]:
            name = f"{folder_of(stage)}/{entry['path']}"
            if not folder.exists(entry["path"]):
                wrong.append(f"{name} is missing")
            elif folder.sha256(entry["path"]) != entry["sha256"]:
                wrong.append(f"{name} has changed")
            elif "rows" in entry and folder.read_table(entry["path"], []).num_rows != entry["rows"]:
                wrong.append(f"{name} doesn't hold {entry['rows']} rows")
            checked += 1
        if stage == "ingest":
            wrong += _lost_rows(manifest["report"]["sources"])
    if wrong:
        raise StageError(
            f"{url}: {'; '.join(wrong)}; remove that stage's manifest.json and run again"
        )
    return checked


def _lost_rows(sources: dict[str, dict[str, object]]) -> list[str]:
    lost = []
    for name, counts in sources.items():
        rejected = counts["rejected"]
        total = sum(rejected.values()) if isinstance(rejected, dict) else 0
        if counts["in"] != int(str(counts["kept"])) + total:
            lost.append(
                f"source {name}: {counts['in']} in, {counts['kept']} kept, {total} rejected"
            )
    return lost
