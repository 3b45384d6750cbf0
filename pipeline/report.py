"""The report of a finished run, rendered again from what is there: no model, no decision."""

from __future__ import annotations

import hashlib

import yaml
from pydantic import ValidationError

from pipeline.config import Config
from pipeline.flow import flow_of, folder_of
from pipeline.rundir import (
    MANIFEST,
    RunLock,
    opened_run,
    read_manifest,
    run_columns,
    target_columns,
)
from stages.emission.stage import EmissionStage
from stages.errors import ConfigError
from stages.storage import Store

REPORT = "report.html"


def rendered_report(url: str) -> str:
    """Render a run's report, put it in its place, and give its URL.

    The manifest's entry of the file is brought up to date, so that `tamis verify` still holds.

    Raises:
        ConfigError: no run is there, it has no data set yet, or its recipe is of another version.
        StageError: another version of the emission stage wrote the data set.
    """
    run = opened_run(url)
    manifest = read_manifest(run, "emission")
    if manifest is None:
        raise ConfigError(f"{url} has no data set yet; `tamis run` its recipe first")
    config = config_of(run)
    flow = flow_of(config)
    stage = flow.sets["emission"]
    assert isinstance(stage, EmissionStage)
    homes = flow.home_of("emission")
    earlier = [name for name in flow.names if name != "emission"]
    dataset = run.child(folder_of("emission"))
    with RunLock(run):
        page = stage.report(
            run_columns(run, homes),
            target_columns(run, homes),
            {name: run.child(folder_of(name)) for name in earlier},
            dataset,
        )
        dataset.write_bytes(REPORT, page)
        for entry in manifest["files"]:
            if entry["path"] == REPORT:
                entry |= {"bytes": len(page), "sha256": hashlib.sha256(page).hexdigest()}
        hashes = "".join(str(entry["sha256"]) for entry in manifest["files"])
        manifest["digest"] = hashlib.sha256(hashes.encode()).hexdigest()
        dataset.write_json(MANIFEST, manifest)
    return f"{dataset.url}/{REPORT}"


def config_of(run: Store) -> Config:
    """The recipe that a run was made with, as it lies there.

    Raises:
        ConfigError: it is of another version of tamis.
    """
    recipe = yaml.safe_load(run.read_bytes("recipe.yaml"))
    try:
        return Config.model_validate({**recipe, "execution": {"run": run.url}})
    except ValidationError as error:
        raise ConfigError(
            f"{run.url}/recipe.yaml is of another version of tamis ({error.error_count()} fields "
            "differ); run its recipe again with --restart-from emission"
        ) from error
