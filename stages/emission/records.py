"""What the identities and manifests of earlier stages say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.storage import Store


@dataclass(frozen=True)
class StageRecord:
    """One stage of the run; what its files don't say is None or empty.

    Attributes:
        name: of the stage.
        version: of the stage's code.
        fingerprint: identity of what it computed.
        models: settings and weights of its models, by role.
        seconds: wall time. It differs between runs: reports only.
        rows_computed: rows computed in this run.
        rows_reused: rows taken from earlier work.
        statuses: rows by status.
        report: the stage's own numbers.
        cost: what the last execution paid to endpoints, None where no price is known.
    """

    name: str
    version: Any = None
    fingerprint: str | None = None
    models: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    rows_computed: int | None = None
    rows_reused: int | None = None
    statuses: Mapping[str, int] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    cost: float | None = None

    @property
    def asked(self) -> int:
        """Rows that a row stage was asked for."""
        return sum(count for status, count in self.statuses.items() if status != "not_requested")


def read_records(artifacts: Mapping[str, Store]) -> list[StageRecord]:
    """The stages' records, in the order given."""
    return [_record(name, store) for name, store in artifacts.items()]


def _record(name: str, store: Store) -> StageRecord:
    manifest = _json(store, "manifest.json")
    identity = _json(store, "identity.json")
    spent = (manifest.get("endpoints") or {}).values()
    prices = [float(role["cost"]) for role in spent if "cost" in role]
    return StageRecord(
        name=name,
        version=identity.get("version"),
        fingerprint=manifest.get("fingerprint"),
        models=identity.get("models") or {},
        seconds=manifest.get("seconds"),
        rows_computed=manifest.get("rows_computed"),
        rows_reused=manifest.get("rows_reused"),
        statuses=manifest.get("counts") or {},
        report=manifest.get("report") or {},
        cost=sum(prices) if prices else None,
    )


def _json(store: Store, name: str) -> dict[str, Any]:
    value: dict[str, Any] = store.read_json(name) if store.exists(name) else {}
    return value
