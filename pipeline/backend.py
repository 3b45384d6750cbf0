"""Backends: where shards are computed. `local` is this process; `ray` is `pipeline.ray_backend`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipeline.config import Placement
from pipeline.rundir import RunColumns
from pipeline.shard import ShardReport, ShardTask, compute_shard
from stages.base import Artifact, EngineSpec, FitStage
from stages.engines.local import handle_of, make_engine
from stages.engines.settings import ModelSettings
from stages.storage import Store

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class FitTask:
    """What a worker needs to know to fit an artifact."""

    stage: FitStage
    columns: RunColumns
    targets: RunColumns
    artifacts: Mapping[str, str]

    async def artifact(self, engines: Mapping[str, Any]) -> Artifact:
        """Fit it with these engines, by role."""
        stores = {name: Store(url) for name, url in self.artifacts.items()}
        return await self.stage.fit(self.columns, self.targets, engines, stores)


class Backend(Protocol):
    """Opens engines and computes with them."""

    async def open(
        self, engines: Mapping[str, EngineSpec], placements: Mapping[str, Placement]
    ) -> None:
        """Have these engines ready, by role; others are closed."""
        ...

    async def shard(self, task: ShardTask) -> ShardReport:
        """Compute and commit one shard with the open engines."""
        ...

    async def fit(self, task: FitTask) -> Artifact:
        """Fit an artifact with the open engines."""
        ...

    def map(self, fn: Callable[[T], R], tasks: Iterable[T], /, *, gpus: float = 0) -> Iterable[R]:
        """Answers of a function for tasks that need no engine, in order; each has some GPU."""
        ...

    async def close(self) -> None:
        """Close every engine, and what this backend itself started."""
        ...


class LocalBackend:
    """Everything in this process; an engine takes one call at a time, vLLM several."""

    def __init__(self, make: Callable[[str, ModelSettings], Any] = make_engine) -> None:
        """Keep how engines are made."""
        self._make = make
        self._engines: dict[tuple[str, str], Any] = {}
        self._roles: dict[str, Any] = {}

    async def open(
        self, engines: Mapping[str, EngineSpec], placements: Mapping[str, Placement]
    ) -> None:
        """Load what is missing and close what isn't needed."""
        wanted = {(spec.kind, spec.model): spec for spec in engines.values()}
        for key in [key for key in self._engines if key not in wanted]:
            self._engines.pop(key).close()
        for key, spec in wanted.items():
            if key not in self._engines:
                self._engines[key] = self._make(spec.kind, spec.settings)
        # One handle an engine, also where two roles share it: a handle is what bounds its calls.
        handles = {
            key: handle_of(
                self._engines[key],
                spec.settings,
                placements.get(spec.model, Placement()).chunks_in_flight,
            )
            for key, spec in wanted.items()
        }
        self._roles = {role: handles[spec.kind, spec.model] for role, spec in engines.items()}

    async def shard(self, task: ShardTask) -> ShardReport:
        """Compute and commit one shard."""
        return await compute_shard(task, self._roles)

    async def fit(self, task: FitTask) -> Artifact:
        """Fit an artifact."""
        return await task.artifact(self._roles)

    def map(self, fn: Callable[[T], R], tasks: Iterable[T], /, *, gpus: float = 0) -> Iterable[R]:
        """Answers in order, one task after another, with what GPU this process has."""
        return map(fn, tasks)

    async def close(self) -> None:
        """Close every engine."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
