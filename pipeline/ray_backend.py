"""The Ray backend: pools of engine actors, and light workers that compute shards with them.

It joins the cluster that RAY_ADDRESS names and never shuts that down, or starts a local one on the
loopback interface. An actor that dies is restarted by Ray with its model, and only the calls that
it was serving are made again. Ray core, not ray.data: a shard is the unit of work, commit and
resume.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from pipeline.backend import FitTask
from pipeline.config import Placement
from pipeline.shard import ShardReport, ShardTask, compute_shard
from stages.base import Artifact, EngineSpec
from stages.engines.local import make_engine
from stages.errors import EngineError, StageError, TamisError

if TYPE_CHECKING:
    from ray.actor import ActorClass

_RESTARTS = 3

Pools = dict[str, list[Any]]
"""Engine actors by role."""


@ray.remote(max_restarts=_RESTARTS, max_task_retries=_RESTARTS)
class EngineActor:
    """Holds one model."""

    def __init__(self, spec: EngineSpec, tensor_parallel: int) -> None:
        """Keep what to load: a restarted actor loads it again at its next call."""
        self._spec = spec
        self._tensor_parallel = tensor_parallel
        self._engine: Any = None

    def load(self) -> int:
        """Load the model; the process id."""
        if self._engine is None:
            self._engine = make_engine(self._spec.kind, self._spec.settings, self._tensor_parallel)
        return os.getpid()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the engine."""
        self.load()
        return getattr(self._engine, method)(*args)

    def close(self) -> None:
        """Release the model and end what it started."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class PoolHandle:
    """A pool of engine actors behind awaitable methods; calls go to the least busy actor."""

    def __init__(self, actors: list[Any], turn: asyncio.Lock | None) -> None:
        """Keep the actors, and the lock where engines share the cores."""
        self._actors = actors
        self._busy = [0] * len(actors)
        self._turn = turn

    def __getattr__(self, method: str) -> Any:
        """The engines' method."""
        if method.startswith("__"):
            raise AttributeError(method)

        async def call(*args: Any) -> Any:
            if self._turn is None:
                return await self._call(method, args)
            async with self._turn:
                return await self._call(method, args)

        return call

    async def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        place = self._busy.index(min(self._busy))
        self._busy[place] += 1
        try:
            return await self._actors[place].call.remote(method, *args)
        finally:
            self._busy[place] -= 1


@ray.remote(max_restarts=_RESTARTS, max_task_retries=_RESTARTS, num_cpus=0)
class ShardWorker:
    """Reads, computes and commits shards; asks the engine pools for all model work."""

    def __init__(self, in_turn: bool) -> None:
        """`in_turn`: one engine at a time takes the cores."""
        self._turn = asyncio.Lock() if in_turn else None
        self._handles: dict[str, PoolHandle] = {}

    async def shard(self, task: ShardTask, pools: Pools) -> ShardReport:
        """Compute and commit one shard."""
        return await compute_shard(task, self._of(pools))

    async def fit(self, task: FitTask, pools: Pools) -> Artifact:
        """Fit an artifact."""
        return await task.artifact(self._of(pools))

    def _of(self, pools: Pools) -> dict[str, PoolHandle]:
        # Pools come with each call, not with the constructor: a restarted worker must find them.
        if not self._handles:
            self._handles = {role: PoolHandle(found, self._turn) for role, found in pools.items()}
        return self._handles


class RayBackend:
    """Engine pools as Ray actors."""

    def __init__(self, place_timeout_s: float, shards_in_flight: int) -> None:
        """Join or start a cluster.

        Raises:
            StageError: the cluster that RAY_ADDRESS names doesn't answer.
        """
        self._timeout = place_timeout_s
        self._in_flight = shards_in_flight
        self._started = False
        self._pools: dict[tuple[str, str], list[Any]] = {}
        self._worker: Any = None
        self._roles: Pools = {}
        self._connect()

    async def open(
        self, engines: Mapping[str, EngineSpec], placements: Mapping[str, Placement]
    ) -> None:
        """Open full-size pools for these engines, and close the others.

        Raises:
            EngineError: the cluster can't place a pool in time, or a model can't be loaded.
        """
        wanted = {(spec.kind, spec.model): spec for spec in engines.values()}
        for key in [key for key in self._pools if key not in wanted]:
            self._close_pool(key)
        for key, spec in wanted.items():
            if key not in self._pools:
                await self._open_pool(key, spec, placements.get(spec.model, Placement()))
        if self._worker is not None:
            ray.kill(self._worker)
        self._roles = {role: self._pools[spec.kind, spec.model] for role, spec in engines.items()}
        in_turn = all(
            placements.get(spec.model, Placement()).gpus == 0
            and placements.get(spec.model, Placement()).cpus is None
            for spec in engines.values()
        )
        worker_class = cast("ActorClass[ShardWorker]", ShardWorker)
        self._worker = worker_class.options(max_concurrency=max(2, self._in_flight)).remote(in_turn)

    async def shard(self, task: ShardTask) -> ShardReport:
        """Compute and commit one shard."""
        reference = self._worker.shard.remote(task, self._roles)
        return cast(ShardReport, await self._answer(reference, task.stage.name))

    async def fit(self, task: FitTask) -> Artifact:
        """Fit an artifact."""
        reference = self._worker.fit.remote(task, self._roles)
        return cast(Artifact, await self._answer(reference, task.stage.name))

    async def close(self) -> None:
        """Close the pools; shut down the cluster where this backend started it."""
        for key in list(self._pools):
            self._close_pool(key)
        if self._worker is not None:
            ray.kill(self._worker)
        if self._started:
            ray.shutdown()

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
                return
            _have_token()
            ray.init(
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            self._started = True
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"at RAY_ADDRESS={address}" if address else "on this machine"
            raise StageError(f"no Ray cluster {where}: {error}") from error

    async def _answer(self, reference: Any, stage: str) -> Any:
        try:
            return await reference
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, TamisError):
                raise cause from error
            raise StageError(f"stage {stage} failed in a worker: {error}", stage=stage) from error
        except RayActorError as error:
            raise StageError(
                f"stage {stage}: a worker or engine died {_RESTARTS + 1} times; the last time: "
                f"{error}; most often it ran out of memory: lower batch_tokens or the replicas",
                stage=stage,
            ) from error

    async def _open_pool(
        self, key: tuple[str, str], spec: EngineSpec, placement: Placement
    ) -> None:
        # One actor holds all GPUs of a replica, so that they are on one node without a group.
        actor_class = cast("ActorClass[EngineActor]", EngineActor).options(
            num_cpus=placement.cpus or 0, num_gpus=placement.gpus
        )
        actors: list[Any] = [
            actor_class.remote(spec, placement.tensor_parallel) for _ in range(placement.replicas)
        ]
        self._pools[key] = actors
        ready = [actor.__ray_ready__.remote() for actor in actors]
        done, waiting = await asyncio.to_thread(
            ray.wait, ready, num_returns=len(ready), timeout=self._timeout
        )
        if waiting:
            resources = cast(Callable[[], dict[str, float]], ray.cluster_resources)()
            have = ", ".join(
                f"{k}: {v:g}" for k, v in sorted(resources.items()) if k in ("CPU", "GPU")
            )
            for actor in self._pools.pop(key):
                ray.kill(actor)
            raise EngineError(
                f"engine {spec.model}: the cluster placed {len(done)} of {placement.replicas} "
                f"replicas (each gpus: {placement.gpus:g}, cpus: {placement.cpus or 0:g}) within "
                f"{self._timeout:g} s; it has {have}; lower execution.engines.{spec.model} or join "
                "a larger cluster (RAY_ADDRESS)"
            )
        for actor in actors:
            try:
                await actor.load.remote()
            except RayTaskError as error:
                self._close_pool(key)
                if isinstance(error.cause, TamisError):
                    raise error.cause from error
                raise EngineError(f"engine {spec.model} can't be opened: {error}") from error
            except RayActorError as error:
                self._close_pool(key)
                raise EngineError(f"engine {spec.model} died while loading: {error}") from error

    def _close_pool(self, key: tuple[str, str]) -> None:
        for actor in self._pools.pop(key):
            # It is ended by force in any case.
            with contextlib.suppress(RayActorError, RayTaskError, GetTimeoutError):
                ray.get(actor.close.remote(), timeout=30)
            ray.kill(actor)


def _have_token() -> None:
    """Ray protects local clusters by a token; where there is none, make one for this run."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    kept = Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_MODE") == "disabled" or named or kept.exists():
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
