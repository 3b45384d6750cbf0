"""What the manifests of earlier stages say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.storage import Store

FLOW = (
    "ingest",
    "difficulty",
    "reflection",
    "dictionary",
    "features",
    "embedding",
    "selection",
    "mixture",
)


@dataclass(frozen=True)
class StageRecord:
    """One stage of the run; what its manifest doesn't say is None or empty.

    Attributes:
        name: of the stage.
        version: of the stage's code.
        fingerprint: identity of what it computed.
        seconds: wall time. It differs between runs: reports only.
        rows_computed: rows computed in this run.
        rows_reused: rows taken from earlier work.
        counts: named counts (tokens and the like); with a resume they differ: reports only.
        report: the stage's own numbers.
    """

    name: str
    version: Any = None
    fingerprint: str | None = None
    seconds: float | None = None
    rows_computed: int | None = None
    rows_reused: int | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


def read_records(artifacts: Mapping[str, Store]) -> list[StageRecord]:
    """The stages' records in the order of the flow, other stages before selection, by name."""
    other = sorted(set(artifacts) - set(FLOW))
    order = [*FLOW[:-2], *other, *FLOW[-2:]]
    return [_record(name, artifacts[name]) for name in order if name in artifacts]


def _record(name: str, store: Store) -> StageRecord:
    if not store.exists("manifest.json"):
        return StageRecord(name)
    manifest = store.read_json("manifest.json")
    return StageRecord(
        name=name,
        version=manifest.get("version"),
        fingerprint=manifest.get("fingerprint"),
        seconds=manifest.get("seconds"),
        rows_computed=manifest.get("rows_computed"),
        rows_reused=manifest.get("rows_reused"),
        counts=manifest.get("counts") or {},
        report=manifest.get("report") or {},
    )
