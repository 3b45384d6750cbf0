"""`tamis explain`: the latents that made a row similar, and where a latent is active."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.flow import Flow, flow_of
from pipeline.report import config_of
from pipeline.rundir import opened_run, parts, read_columns, read_manifest
from pipeline.why import found_row
from stages.engines.local import opened
from stages.errors import ConfigError
from stages.explanation.settings import ExplanationSettings
from stages.rows import key_hash
from stages.selection.activation_coverage import ACTIVE
from stages.selection.stage import KEPT
from stages.storage import Store

if TYPE_CHECKING:
    from stages.explanation.explainer import Explainer, Place

_MOST_DIGITS = 7
"""A number of no more digits is a latent's; a row's first digits must be more."""


def explanation(url: str, what: str, rows: int) -> str:
    """A row's or a latent's explanation, as text; reads rows again with the student.

    Args:
        url: the run directory, its features complete.
        what: a row's id (or enough of its first digits), or the number of a latent.
        rows: rows to read at most in search of a latent.

    Raises:
        ConfigError: no such run, row or latent, or the run has no features.
    """
    run = opened_run(url)
    config = config_of(run)
    if config.features is None or read_manifest(run, "features") is None:
        raise ConfigError(f"{url} has no complete stage features, which is what this explains")
    flow = flow_of(config)
    if what.isdecimal() and len(what) <= _MOST_DIGITS:
        return asyncio.run(_latent(run, config, flow, int(what), rows))
    return asyncio.run(_row(run, config, flow, what))


async def _row(run: Store, config: Config, flow: Flow, row: str) -> str:
    hit = found_row(run, row)
    if hit is None:
        raise ConfigError(f"{run.url} holds no row whose id begins with {row}")
    part, place, record = hit
    names = ("effective_messages", "similarity", "nearest_task", "features_status")
    found = read_columns(run, part, names, flow.home_of("selection")).slice(place, 1).to_pylist()[0]
    if found["similarity"] is None:
        raise ConfigError(f"row {record['id']} has no similarity: {found['features_status']}")
    task = str(found["nearest_task"])
    explainer = _explainer(run, config, ExplanationSettings(latents=10, places=3))
    with opened("reader", _student(config)) as (reader, _):
        latents = await explainer.row(found["effective_messages"], task, reader)
    lines = [
        f"row        {record['id']} of {record['source']}{_decision(run, record['id'])}",
        f"similarity {found['similarity']:.4g}, nearest task {task}",
        "",
        "What it shares with that task, by latent; [token] where the latent is strongest:",
    ]
    for one in latents:
        lines.append(
            f"latent {one.latent}: {one.share:.1%} of what they share "
            f"(row {one.row:.4g}, task {one.prototype:.4g})"
        )
        lines += _shown(one.places)
    return "\n".join(lines)


def _decision(run: Store, row: str) -> str:
    """What selection said of a row; nothing where it isn't complete."""
    if read_manifest(run, "selection") is None:
        return ""
    decisions = run.read_table("selection/decisions.parquet", ["id", "reason"])
    (reason,) = decisions.filter(pc.equal(decisions["id"], row))["reason"].to_pylist()
    return f": {reason}" if reason.startswith(KEPT) else f": dropped, {reason}"


async def _latent(run: Store, config: Config, flow: Flow, latent: int, rows: int) -> str:
    explainer = _explainer(run, config, ExplanationSettings(places=3))
    width = explainer.prototypes.codes.shape[1]
    if latent >= width:
        raise ConfigError(f"there is no latent {latent}: the dictionary has {width}, from 0")
    candidates, how = _candidates(run, config, flow, latent, rows)
    with opened("reader", _student(config)) as (reader, _):
        (found,) = await explainer.latents(
            [latent], [row["effective_messages"] for row in candidates], reader
        )
    lines = [f"latent {latent} of {width}"]
    pairs = zip(explainer.prototypes.tasks, explainer.prototypes.codes[:, latent], strict=True)
    lines += [f"prototype of {task}: {value:.4g}" for task, value in pairs]
    frequencies = explainer.prototypes.frequencies
    if frequencies is not None:
        lines.append(
            f"active at {frequencies.token_share[latent]:.2%} of the tokens and in "
            f"{frequencies.row_share[latent]:.1%} of {frequencies.rows} sampled rows"
        )
    lines += ["", f"Active in {len(found)} of {len(candidates)} rows read ({how}):"]
    for one in found[:10]:
        row = candidates[one.number]
        lines.append(f"row {row['id']} of {row['source']}: up to {one.peak:.4g}")
        lines += _shown(one.places)
    return "\n".join(lines)


def _candidates(
    run: Store, config: Config, flow: Flow, latent: int, most: int
) -> tuple[list[dict[str, Any]], str]:
    """Rows to read in search of a latent, and in words how they were chosen."""
    homes = flow.home_of("selection")
    kept: pa.Array | None = None
    if read_manifest(run, "selection") is not None:
        decisions = run.read_table("selection/decisions.parquet", ["id", "keep"])
        kept = decisions.filter(decisions["keep"])["id"].combine_chunks()
    listed = (ACTIVE,) if ACTIVE in homes else ()
    names = ("id", "source", "effective_messages", "features_status", *listed)
    chosen: list[tuple[int, str, dict[str, Any]]] = []
    for part in parts(run, "ingest"):
        table = read_columns(run, part, names, homes)
        table = table.filter(pc.equal(table["features_status"].cast(pa.string()), "ok"))
        if kept is not None:
            table = table.filter(pc.is_in(table["id"], value_set=kept))
        for row in table.to_pylist():
            if not listed or latent in row[ACTIVE]:
                chosen.append((key_hash(f"explain:{row['id']}", config.seed), row["id"], row))
        chosen = heapq.nsmallest(most, chosen)
    which = "of those selected" if kept is not None else "of all"
    with_it = f", whose {ACTIVE} name it" if listed else ""
    return [row for _, _, row in chosen], f"at most {most}, drawn by hash {which}{with_it}"


def _shown(places: Sequence[Place]) -> list[str]:
    return [
        f"    {place.activation:8.4g}  {_line(place.before)}[{_line(place.token)}]"
        f"{_line(place.after)}"
        for place in places
    ]


def _line(text: str) -> str:
    return text.replace("\n", "⏎")


def _explainer(run: Store, config: Config, settings: ExplanationSettings) -> Explainer:
    from stages.explanation.explainer import Explainer

    assert config.features is not None
    assert config.dictionary is not None
    layer = config.dictionary.layer
    return Explainer(
        settings,
        config.features,
        layer,
        _student(config),
        run.child("dictionary"),
        run.child("prototypes"),
    )


def _student(config: Config) -> Any:
    assert config.features is not None
    return config.models[config.features.student]
