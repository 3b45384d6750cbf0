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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import ray
from ray.exceptions import (
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from pipeline.backend import FitTask
from pipeline.config import Placement
from pipeline.shard import ShardReport, ShardTask, compute_shard
from stages.base import Artifact, EngineSpec
from stages.engines.local import LocalHandle, make_engine, takes_calls_together
from stages.errors import EngineError, StageError, TamisError

if TYPE_CHECKING:
    from ray.actor import ActorClass

T = TypeVar("T")
R = TypeVar("R")

_RESTARTS = 3
_AT_HAND = 2
"""Calls that an engine which takes one at a time is sent: that one, and the next."""

_SECONDS_TO_END = 60
"""For tasks under way after another failed."""


class Pool(NamedTuple):
    """Engine actors of a role, and how they are asked.

    Attributes:
        actors: the replicas.
        calls: how many one replica is sent at once.
        in_turn: whether a call waits until no other engine takes the cores.
    """

    actors: list[Any]
    calls: int
    in_turn: bool


Pools = dict[str, Pool]
"""By role."""


@ray.remote(max_restarts=_RESTARTS, max_task_retries=_RESTARTS)
class EngineActor:
    """Holds one model."""

    def __init__(self, spec: EngineSpec, placement: Placement) -> None:
        """Keep what to load: a restarted actor loads it again at its next call."""
        self._spec = spec
        self._placement = placement
        self._loading = asyncio.Lock()
        self._engine: Any = None
        self._handle: Any = None

    async def load(self) -> int:
        """Load the model; the process id."""
        async with self._loading:
            if self._engine is None:
                self._engine = await asyncio.to_thread(
                    make_engine,
                    self._spec.kind,
                    self._spec.settings,
                    self._placement.tensor_parallel,
                )
                self._handle = LocalHandle(self._engine, self._placement.chunks_in_flight)
        return os.getpid()

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method of the engine."""
        await self.load()
        return await getattr(self._handle, method)(*args)

    async def close(self) -> None:
        """Release the model and end what it started."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class PoolHandle:
    """A pool of engine actors behind awaitable methods; calls go to the least busy actor."""

    def __init__(self, pool: Pool, turn: asyncio.Lock) -> None:
        """Keep the actors, and the lock of the engines that share the cores."""
        self._actors = pool.actors
        self._busy = [0] * len(pool.actors)
        # A call waits here until an actor has room: sent at once, it would wait at one of them.
        self._room = turn if pool.in_turn else asyncio.Semaphore(pool.calls * len(pool.actors))

    def __getattr__(self, method: str) -> Any:
        """The engines' method."""
        if method.startswith("__"):
            raise AttributeError(method)

        async def call(*args: Any) -> Any:
            async with self._room:
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

    def __init__(self, endpoints: Mapping[str, EngineSpec]) -> None:
        """Keep how endpoints are asked.

        Args:
            endpoints: what is asked over HTTP, by role: with no model to hold, it is asked from
                here, and its connections end with this process.
        """
        self._turn = asyncio.Lock()
        self._endpoints = endpoints
        self._handles: dict[str, Any] = {}

    async def shard(self, task: ShardTask, pools: Pools) -> ShardReport:
        """Compute and commit one shard."""
        return await compute_shard(task, self._of(pools))

    async def fit(self, task: FitTask, pools: Pools) -> Artifact:
        """Fit an artifact."""
        return await task.artifact(self._of(pools))

    def _of(self, pools: Pools) -> dict[str, Any]:
        # Pools come with each call, not with the constructor: a restarted worker must find them.
        if not self._handles:
            models = {spec.model: spec for spec in self._endpoints.values()}
            asked = {name: make_engine(spec.kind, spec.settings) for name, spec in models.items()}
            endpoints = {role: asked[spec.model] for role, spec in self._endpoints.items()}
            placed = {role: PoolHandle(pool, self._turn) for role, pool in pools.items()}
            self._handles = {**placed, **endpoints}
        return self._handles


@ray.remote(max_retries=_RESTARTS, num_cpus=1)
def _answered(fn: Callable[[Any], Any], task: Any) -> Any:
    return fn(task)


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
        endpoints = {role: spec for role, spec in engines.items() if spec.settings.endpoint}
        placed = {role: spec for role, spec in engines.items() if role not in endpoints}
        wanted = {(spec.kind, spec.model): spec for spec in placed.values()}
        for key in [key for key in self._pools if key not in wanted]:
            self._close_pool(key)
        for key, spec in wanted.items():
            if key not in self._pools:
                await self._open_pool(key, spec, placements.get(spec.model, Placement()))
        if self._worker is not None:
            ray.kill(self._worker)
        self._roles = self._pools_of(placed, placements)
        worker_class = cast("ActorClass[ShardWorker]", ShardWorker)
        concurrency = max(2, self._in_flight)
        self._worker = worker_class.options(max_concurrency=concurrency).remote(endpoints)

    async def shard(self, task: ShardTask) -> ShardReport:
        """Compute and commit one shard."""
        reference = self._worker.shard.remote(task, self._roles)
        return cast(ShardReport, await self._answer(reference, task.stage.name))

    async def fit(self, task: FitTask) -> Artifact:
        """Fit an artifact."""
        reference = self._worker.fit.remote(task, self._roles)
        return cast(Artifact, await self._answer(reference, task.stage.name))

    def map(self, fn: Callable[[T], R], tasks: Iterable[T], /, *, gpus: float = 0) -> Iterator[R]:
        """Answers in order; as many tasks are under way as the cluster has cores.

        Raises:
            StageError: a task failed, its worker died again and again, or there is no such GPU.
        """
        resources = cast(Callable[[], dict[str, float]], ray.cluster_resources)()
        if gpus > resources.get("GPU", 0):
            raise StageError(
                f"a task over shards is to have {gpus:g} of a GPU, and the cluster has none; set "
                "execution.pass_gpus to 0, or join a cluster with GPUs (RAY_ADDRESS)"
            )
        answered = _answered.options(num_gpus=gpus)
        shared = ray.put(cast(Callable[[Any], Any], fn))
        rest = iter(tasks)
        cores = int(resources.get("CPU", 1))
        waiting: deque[Any] = deque()
        try:
            waiting.extend(answered.remote(shared, task) for task in islice(rest, cores))
            while waiting:
                try:
                    answer: R = ray.get(waiting.popleft())
                except (RayTaskError, WorkerCrashedError, OutOfMemoryError) as error:
                    raise _failure(error, "a task over shards") from error
                waiting.extend(answered.remote(shared, task) for task in islice(rest, 1))
                yield answer
        finally:
            # Whoever cleans up after an error must not meet a task that still writes.
            if waiting:
                ray.wait(list(waiting), num_returns=len(waiting), timeout=_SECONDS_TO_END)

    async def close(self) -> None:
        """Close the pools; shut down the cluster where this backend started it."""
        for key in list(self._pools):
            self._close_pool(key)
        if self._worker is not None:
            ray.kill(self._worker)
        if self._started:
            ray.shutdown()

    def _pools_of(
        self, engines: Mapping[str, EngineSpec], placements: Mapping[str, Placement]
    ) -> Pools:
        placed = {spec.model: placements.get(spec.model, Placement()) for spec in engines.values()}
        share_cores = all(place.gpus == 0 and place.cpus is None for place in placed.values())
        pools = {}
        for role, spec in engines.items():
            together = takes_calls_together(spec.kind, spec.settings)
            pools[role] = Pool(
                self._pools[spec.kind, spec.model],
                calls=placed[spec.model].chunks_in_flight if together else _AT_HAND,
                in_turn=share_cores and not together,
            )
        return pools

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
        except (RayTaskError, RayActorError) as error:
            raise _failure(error, f"stage {stage}", stage) from error

    async def _open_pool(
        self, key: tuple[str, str], spec: EngineSpec, placement: Placement
    ) -> None:
        # One actor holds all GPUs of a replica, so that they are on one node without a group.
        actor_class = cast("ActorClass[EngineActor]", EngineActor).options(
            num_cpus=placement.cpus or 0, num_gpus=placement.gpus
        )
        actors: list[Any] = [actor_class.remote(spec, placement) for _ in range(placement.replicas)]
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


def _failure(error: RayError, what: str, stage: str | None = None) -> TamisError:
    """The error that a worker raised, or one that says that it died."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, TamisError):
            return error.cause
        return StageError(f"{what} failed in a worker: {error}", stage=stage)
    return StageError(
        f"{what}: a worker or engine died {_RESTARTS + 1} times; the last time: {error}; most "
        "often it ran out of memory: lower batch_tokens or the replicas",
        stage=stage,
    )


def _have_token() -> None:
    """Ray protects local clusters by a token; where there is none, make one for this run."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    kept = Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_MODE") == "disabled" or named or kept.exists():
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
