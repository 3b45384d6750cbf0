"""What analyses read: columns of a finished stage, and the model that it asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.flow import folder_of
from pipeline.rundir import opened_run, parts, read_columns, read_manifest
from stages.errors import ConfigError, StageError
from stages.rows import ROWS

PASS_RATE = "pass_rate"


@dataclass(frozen=True)
class ScoredRun:
    """Pass rates of one model.

    Attributes:
        url: the run directory.
        model: the model's reference in the recipe.
        name: what tables call it: the end of the reference, with the run where that isn't unique.
        table: one row a row of the run, with the columns that were asked for.
    """

    url: str
    model: str
    name: str
    table: pa.Table


def scored_runs(urls: Sequence[str], columns: Sequence[str]) -> list[ScoredRun]:
    """Runs with a complete pass_rate stage, in the order given.

    Args:
        urls: run directories.
        columns: of ingest and pass_rate.

    Raises:
        ConfigError: a run isn't there, has no pass rates, or is named twice.
        StageError: a run's shards don't belong together.
    """
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise ConfigError(f"{twice[0]} is named twice; give each run once")
    tables = [stage_table(url, PASS_RATE, columns) for url in urls]
    models = [_model(url) for url in urls]
    names = model_names(models, urls)
    return [ScoredRun(*each) for each in zip(urls, models, names, tables, strict=True)]


def stage_table(url: str, stage: str, columns: Sequence[str]) -> pa.Table:
    """Columns of ingest and of one row stage, of all rows of a run.

    Raises:
        ConfigError: no run is there, or the stage isn't complete in it.
        StageError: the stage's shards belong to other rows than those of ingest.
    """
    run = opened_run(url)
    if read_manifest(run, stage) is None:
        raise ConfigError(
            f"{url} has no complete stage {stage}; add a section {stage} to its recipe and run it"
        )
    names = parts(run, "ingest")
    if names != parts(run, folder_of(stage)):
        raise StageError(
            f"{url}: {stage} has other shards than ingest, which has changed since; "
            "run the recipe again",
            stage=stage,
        )
    homes = {name: "ingest" if name in ROWS.names else stage for name in columns}
    return pa.concat_tables(read_columns(run, name, columns, homes) for name in names)


def model_names(models: Sequence[str], urls: Sequence[str]) -> list[str]:
    """Short names, one a run: the last part of the model's reference, told apart by the run.

    Args:
        models: references of models, one a run.
        urls: run directories, all different.
    """
    short = [model.rstrip("/").rsplit("/", 1)[-1] for model in models]
    folders = [url.rstrip("/").rsplit("/", 1)[-1] for url in urls]
    for places in (folders, list(urls)):
        named = [
            f"{name} ({place})" if short.count(name) > 1 else name
            for name, place in zip(short, places, strict=True)
        ]
        if len(set(named)) == len(named):
            break
    return named


def floats(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """A column of numbers as float64 [rows], NaN for null."""
    values: npt.NDArray[np.float64] = pc.fill_null(
        column.cast(pa.float64()), float("nan")
    ).to_numpy()
    return values


def integers(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A column of whole numbers without nulls as int64 [rows]."""
    values: npt.NDArray[np.int64] = column.cast(pa.int64()).to_numpy()
    return values


def _model(url: str) -> str:
    models = (read_manifest(opened_run(url), PASS_RATE) or {})["models"]
    return str(models["model"])
