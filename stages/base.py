"""The contract between a stage and whatever runs it.

A *row stage* adds columns to rows, shard by shard, and never changes or drops a row. A *fit stage*
makes an artifact from rows. A *set stage* sees compact columns of all rows and returns tables. A
stage is a function of its rows, settings, models, artifacts and seed: it does no I/O on the run
directory and knows nothing of shards in flight, backends or resume.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, StageError
from stages.storage import Store

T = TypeVar("T")

R = TypeVar("R")


class Each(Protocol):
    """Runs a function over tasks, here or on workers; answers come in the order of the tasks.

    The function, tasks and answers must be picklable.
    """

    def __call__(self, fn: Callable[[T], R], tasks: Iterable[T], /) -> Iterable[R]:
        """The answers."""
        ...


def in_turn(fn: Callable[[T], R], tasks: Iterable[T], /) -> Iterable[R]:
    """The `Each` that runs tasks in this process, one after another."""
    return map(fn, tasks)


EngineKind = Literal["scorer", "generator", "reader", "embedder"]

UNSEEN = "unseen"
"""The artifact that is no fit stage's: ingest's folder of rows that training must not see."""


class Settings(BaseModel):
    """A section of a recipe: every field bears on the bytes produced."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RowSettings(Settings):
    """What every row stage takes."""

    where: str | None = Field(
        default=None, description="Rule over earlier columns; other rows are not_requested."
    )
    limit: int | None = Field(
        default=None, ge=1, description="At most this many rows: those of lowest hash(id, seed)."
    )

    def without_sources(self, names: Collection[str]) -> Self:
        """The same, asked of no row of these sources."""
        if not names:
            return self
        others = f"source not in [{', '.join(map(repr, sorted(names)))}]"
        where = others if self.where is None else f"({self.where}) and {others}"
        return self.model_copy(update={"where": where})


@dataclass(frozen=True)
class Columns:
    """Columns that a stage reads, and those that it adds with their Arrow types.

    `effective_messages` in `needs` stands for coalesce(messages_reflected, messages).
    """

    needs: tuple[str, ...]
    adds: pa.Schema


@dataclass(frozen=True)
class EngineSpec:
    """A model in a role.

    Attributes:
        kind: what it has to do.
        model: its name in the recipe, where execution places it.
        settings: its entry in the recipe.
        asks: what a generator is given; a model behind an endpoint takes messages alone.
    """

    kind: EngineKind
    model: str
    settings: ModelSettings
    asks: Literal["ids", "messages"] = "ids"


def check_endpoints(stage: str, engines: Mapping[str, EngineSpec]) -> None:
    """Refuse a model behind an endpoint where a stage needs more of it than text for messages.

    Raises:
        ConfigError: naming the model.
    """
    for role, spec in engines.items():
        if spec.settings.endpoint is None or spec.asks == "messages":
            continue
        raise ConfigError(
            f"{stage} can't use models.{spec.model} (engine: openai) as its {role}: it works "
            "with token ids, log-probabilities or activations, which endpoints don't give; "
            "name a model with engine: transformers or vllm"
        )


class ShardedColumns(Protocol):
    """Columns of all rows, shard by shard, in a fixed order."""

    @property
    def n_rows(self) -> int:
        """Rows in all shards."""
        ...

    def iter(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """One table a shard, with the named columns."""
        ...

    def map(
        self,
        names: Sequence[str],
        fn: Callable[[pa.Table, pa.Table], T],
        merge: Callable[[T, T], T],
        *,
        beside: pa.Table,
    ) -> T:
        """`fn` of every shard's columns and its rows of `beside`, merged in the shards' order.

        `beside` has a row for each row of all shards. `fn`, `merge` and what they return must be
        picklable, and `merge` associative: shards may be taken on workers.
        """
        ...


class RowStage(Protocol):
    """A stage that adds columns to rows."""

    @property
    def name(self) -> str:
        """What it is called in a recipe."""
        ...

    @property
    def version(self) -> int:
        """Goes up when the same inputs come to give other bytes."""
        ...

    @property
    def settings(self) -> RowSettings:
        """Its section of the recipe."""
        ...

    @property
    def on_targets(self) -> bool:
        """Whether it runs on the rows of targets too."""
        ...

    def columns(self) -> Columns:
        """What it reads and adds."""
        ...

    def engines(self) -> Mapping[str, EngineSpec]:
        """The models it asks, by role."""
        ...

    def artifacts(self) -> tuple[str, ...]:
        """Names of the fit stages whose artifacts it reads; UNSEEN for ingest's."""
        ...

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """The added columns of the same rows in the same order."""
        ...


@runtime_checkable
class Checked(Protocol):
    """A stage that can tell before anything runs that it couldn't."""

    def check(self) -> None:
        """Raise ConfigError; may read a tokenizer or a configuration, loads no model."""
        ...


@runtime_checkable
class ReadsFiles(Protocol):
    """A stage that depends on texts: files that settings name, by content, or wording in code."""

    def file_contents(self) -> Mapping[str, Any]:
        """What identifies each text, by the settings field that names it or by its own name."""
        ...


NO_ARTIFACTS: Mapping[str, Store] = MappingProxyType({})


@dataclass(frozen=True)
class Artifact:
    """What a fit stage makes: files by name, and numbers to report."""

    files: Mapping[str, bytes]
    report: Mapping[str, Any] = field(default_factory=dict)


class FitStage(Protocol):
    """A stage that makes an artifact from rows."""

    @property
    def name(self) -> str:
        """What it is called in a recipe."""
        ...

    @property
    def version(self) -> int:
        """Goes up when the same inputs come to give other bytes."""
        ...

    @property
    def settings(self) -> Settings:
        """Its section of the recipe."""
        ...

    @property
    def on_targets(self) -> bool:
        """Whether it reads the rows of targets: other targets then ask for it again."""
        ...

    def columns(self) -> Columns:
        """What it reads (it adds none)."""
        ...

    def engines(self) -> Mapping[str, EngineSpec]:
        """The models it asks, by role."""
        ...

    def artifacts(self) -> tuple[str, ...]:
        """Names of the earlier fit and set stages whose files it reads."""
        ...

    async def fit(
        self,
        columns: ShardedColumns,
        targets: ShardedColumns,
        engines: Mapping[str, Any],
        artifacts: Mapping[str, Store] = NO_ARTIFACTS,
    ) -> Artifact:
        """The artifact's files."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a set stage decides: tables and other files by name, and numbers to report."""

    tables: Mapping[str, pa.Table]
    report: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


class SetStage(Protocol):
    """A stage that decides over all rows at once."""

    @property
    def name(self) -> str:
        """What it is called in a recipe."""
        ...

    @property
    def version(self) -> int:
        """Goes up when the same inputs come to give other bytes."""
        ...

    @property
    def settings(self) -> Settings:
        """Its section of the recipe."""
        ...

    def columns(self) -> Columns:
        """What it reads (it adds none)."""
        ...

    def decide(
        self, columns: ShardedColumns, targets: ShardedColumns, artifacts: Mapping[str, Store]
    ) -> Outcome:
        """Tables and numbers."""
        ...


def checked_columns(stage: str, rows: int, adds: pa.Schema, table: pa.Table) -> pa.Table:
    """The table in the declared column order and types.

    Raises:
        StageError: rows were lost or added, or columns or types differ from those declared.
    """
    if table.num_rows != rows:
        raise StageError(
            f"stage {stage} was given {rows} rows and returned {table.num_rows}", stage=stage
        )
    missing = set(adds.names) ^ set(table.column_names)
    if missing:
        raise StageError(
            f"stage {stage} declared columns {adds.names} and returned {table.column_names}",
            stage=stage,
        )
    return table.select(adds.names).cast(adds)
