"""How long stages take, measured on a few real rows with the recipe's own models.

Every stage that asks a model runs on the rows as it would in a run, in this process, one model of
each after another. Loading is timed apart, then one row to warm up, then two halves of the rows:
their rates give a range. Tokens are counted where they reach a model.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.flow import flow_of
from pipeline.survey import Survey, row_lengths
from stages.base import UNSEEN, FitStage, RowSettings, RowStage
from stages.engines import GenerationRequest, MaskedSequence, ScoreRequest
from stages.engines.local import make_engine
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, StageError
from stages.session.results import Fitted
from stages.session.session import Session
from stages.storage import Store

PROBE_STEPS = 10
_LEAST_ROWS = 3
_WIDER = 1.25
"""Halves of a few rows differ less than a run does from them."""


@dataclass(frozen=True)
class Range:
    """A number that is known within bounds."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        """The range of the sum."""
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Range:
        """The range of the product."""
        return Range(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Measured:
    """What a stage takes; `why` says instead that it wasn't measured.

    Attributes:
        work_s: seconds for all rows.
        read: tokens that its models read, over all rows.
        written: tokens that its models generate, over all rows.
    """

    work_s: Range = Range(0, 0)
    read: float = 0.0
    written: float = 0.0
    why: str = ""


@dataclass
class Meter:
    """Tokens that engines read and wrote, and the seconds that they took.

    Attributes:
        read: tokens.
        written: tokens.
        seconds: in calls.
        loads: seconds to load each engine.
    """

    read: int = 0
    written: int = 0
    seconds: float = 0.0
    loads: dict[tuple[str, ModelSettings], float] = field(default_factory=dict)

    def engine(self, kind: str, settings: ModelSettings) -> Any:
        """An engine whose calls are counted here."""
        started = time.monotonic()
        made = _MeteredEngine(make_engine(kind, settings), self)
        self.loads[kind, settings] = time.monotonic() - started
        return made

    def since(self, before: Meter) -> Meter:
        """What was counted after a copy was taken."""
        return Meter(
            self.read - before.read, self.written - before.written, self.seconds - before.seconds
        )

    def copy(self) -> Meter:
        """The numbers as they are now."""
        return Meter(self.read, self.written, self.seconds)


class _MeteredEngine:
    def __init__(self, engine: Any, meter: Meter) -> None:
        self._engine, self._meter = engine, meter

    def __getattr__(self, method: str) -> Any:
        found = getattr(self._engine, method)
        if method == "close" or not callable(found):
            return found
        if inspect.iscoroutinefunction(found):

            async def later(requests: Sequence[Any], *others: Any, **named: Any) -> Any:
                started = time.monotonic()
                return self._noted(requests, await found(requests, *others, **named), started)

            return later

        def now(requests: Sequence[Any], *others: Any, **named: Any) -> Any:
            started = time.monotonic()
            return self._noted(requests, found(requests, *others, **named), started)

        return now

    def _noted(self, requests: Sequence[Any], answer: Any, started: float) -> Any:
        self._meter.seconds += time.monotonic() - started
        self._meter.read += sum(map(_tokens, requests))
        if isinstance(answer, list):
            self._meter.written += sum(len(getattr(one, "token_ids", ())) for one in answer)
        return answer


def _tokens(request: Any) -> int:
    """Tokens of one request to an engine; texts, which only an encoder takes, count none."""
    if isinstance(request, ScoreRequest):
        return len(request.prompt) + len(request.target)
    if isinstance(request, GenerationRequest):
        return len(request.prompt)
    if isinstance(request, MaskedSequence):
        return len(request.ids)
    return 0 if isinstance(request, str) else len(request)


@dataclass
class Probe:
    """A probe of one recipe.

    Args:
        config: the recipe.
        survey: its rows; the sample is what is measured.
        ingested: the folder that they were ingested into.
    """

    config: Config
    survey: Survey
    ingested: Store
    measured: dict[str, Measured] = field(default_factory=dict)
    loads: dict[tuple[str, ModelSettings], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build the stages as the recipe wants them."""
        self._asked = flow_of(self.config)

    def run(self) -> dict[str, Measured]:
        """What every stage takes that asks a model, by name; `loads` has what its engines do.

        Raises:
            EngineError: a model can't be loaded.
        """
        flow = flow_of(_small(self.config))
        meter = Meter()
        rows, targets = self.survey.sample, self.survey.targets
        goals = targets.slice(0, max(1, rows.num_rows))
        made: dict[str, Fitted] = {}
        step = max(1, rows.num_rows)
        with (
            tempfile.TemporaryDirectory(prefix="tamis-") as scratch,
            Session(rows_per_step=step, progress=False, make=meter.engine) as session,
        ):
            stores = {
                UNSEEN: self.ingested.child(UNSEEN),
                "selection": _all_kept(Store(scratch), rows),
            }
            for name in flow.names:
                stage: Any = flow.rows.get(name) or flow.fits.get(name)
                if stage is None or name in ("allocation", "rollouts"):
                    continue
                if any(spec.settings.endpoint for spec in stage.engines().values()):
                    self.measured[name] = Measured(why="asks an endpoint")
                    continue
                missing = [one for one in stage.artifacts() if one not in stores]
                if missing:
                    self.measured[name] = Measured(why=f"reads what {missing[0]} makes")
                    continue
                try:
                    session.load_models(stage)
                    if name in flow.fits:
                        made[name], found = self._fit(
                            session, stage, rows, goals, made, stores, meter
                        )
                        stores[name] = made[name].store
                    else:
                        rows, found = self._rows(session, stage, rows, stores, meter)
                        if stage.on_targets:
                            goals = session.with_columns(stage, goals, stores)
                    measured = Measured(*found)
                except (ConfigError, StageError) as error:
                    measured = Measured(why=f"can't be measured on a few rows: {error}")
                if stage.engines():
                    self.measured[name] = measured
        self.loads = meter.loads
        if "rollouts" in flow.rows:
            self.measured["rollouts"] = self._further_rollouts(self.measured["pass_rate"])
        return self.measured

    def _further_rollouts(self, pilot: Measured) -> Measured:
        """What the rollouts beyond the pilot's take: each as long as one of these."""
        allocation, settings = self.config.allocation, self.config.pass_rate
        assert allocation is not None
        assert settings is not None
        asked, _ = self._amounts_of(settings)
        share = allocation.total / (settings.rollouts * max(1, asked))
        work, read = pilot.work_s.times(share), pilot.read * share
        return Measured(work, read, pilot.written * share, pilot.why)

    def _rows(
        self,
        session: Session,
        stage: RowStage,
        rows: pa.Table,
        stores: Mapping[str, Store],
        meter: Meter,
    ) -> tuple[pa.Table, tuple[Range, float, float]]:
        if rows.num_rows < _LEAST_ROWS:
            raise StageError(f"there are {rows.num_rows}", stage=stage.name)
        # Not measured again below: what was generated for it is cached.
        done = [session.with_columns(stage, rows.slice(0, 1), stores)]
        rates: list[float] = []
        totals = Meter()
        half = (rows.num_rows + 1) // 2
        generates = any(spec.kind == "generator" for spec in stage.engines().values())
        for part in (rows.slice(1, half - 1), rows.slice(half)):
            before, started = meter.copy(), time.monotonic()
            done.append(session.with_columns(stage, part, stores))
            seconds, spent = time.monotonic() - started, meter.since(before)
            rates.append(seconds / (part.num_rows if generates else sum(row_lengths(part))))
            totals = Meter(totals.read + spent.read, totals.written + spent.written)
        asked, whole = self._amounts(stage)
        amount = asked if generates else whole
        per_row = asked / (rows.num_rows - 1)
        work = Range(min(rates) / _WIDER, max(rates) * _WIDER).times(amount)
        found = work, totals.read * per_row, totals.written * per_row
        return pa.concat_tables(done).unify_dictionaries(), found

    def _amounts(self, stage: RowStage) -> tuple[int, float]:
        """Rows, and characters, that a stage will read, at most."""
        rows, characters = self._amounts_of(self._asked.rows[stage.name].settings)
        if stage.on_targets:
            lengths = self.survey.target_lengths
            return rows + len(lengths), characters + sum(lengths)
        return rows, characters

    def _amounts_of(self, settings: RowSettings) -> tuple[int, float]:
        every = self.survey.rows
        rows = every if settings.limit is None else min(settings.limit, every)
        return rows, sum(self.survey.lengths) * rows / max(1, every)

    def _fit(
        self,
        session: Session,
        stage: FitStage,
        rows: pa.Table,
        goals: pa.Table,
        made: Mapping[str, Fitted],
        stores: Mapping[str, Store],
        meter: Meter,
    ) -> tuple[Fitted, tuple[Range, float, float]]:
        before, started = meter.copy(), time.monotonic()
        artifacts = {name: made[name] for name in stage.artifacts() if name in made}
        others = {name: stores[name] for name in stage.artifacts() if name in stores}
        fitted = session.fitted(stage, rows, goals, artifacts, others)
        seconds, spent = time.monotonic() - started, meter.since(before)
        if stage.name in ("prototypes", "baseline_targets"):
            factor = sum(self.survey.target_lengths) / max(1, sum(row_lengths(goals)))
            read, rest = spent.seconds * factor, (seconds - spent.seconds) * factor
        elif stage.name == "explanation" and self.config.explanation is not None:
            asked = min(self.config.explanation.rows, self.survey.rows)
            factor = asked / max(1, min(asked, rows.num_rows))
            read, rest = spent.seconds * factor, (seconds - spent.seconds) * factor
        elif stage.name == "dictionary" and self.config.dictionary is not None:
            settings = self.config.dictionary
            share = min(1, settings.rows / max(1, self.survey.rows))
            factor = share * sum(self.survey.lengths) / max(1, sum(row_lengths(rows)))
            steps = 1 if settings.path else settings.steps / PROBE_STEPS
            read, rest = spent.seconds * factor, (seconds - spent.seconds) * steps
        else:
            # The probe of reply forms asks about a few rows, however many there are.
            factor, read, rest = 1.0, spent.seconds, seconds - spent.seconds
        work = Range((read + rest) / _WIDER, (read + rest) * _WIDER)
        return fitted, (work, spent.read * factor, spent.written * factor)


def _all_kept(folder: Store, rows: pa.Table) -> Store:
    """A folder as selection leaves it where it drops no row."""
    decisions = rows.select(["id"]).append_column("keep", pa.array([True] * rows.num_rows))
    folder.write_table("decisions.parquet", decisions)
    return folder


def _small(config: Config) -> Config:
    """The recipe with every row asked for, and little training."""
    update: dict[str, Any] = {}
    for name in type(config).model_fields:
        section = getattr(config, name)
        if hasattr(section, "where") and hasattr(section, "limit"):
            update[name] = section.model_copy(update={"where": None, "limit": None})
    update["stages"] = {
        name: {key: value for key, value in section.items() if key not in ("where", "limit")}
        for name, section in config.stages.items()
    }
    if config.dictionary is not None and config.dictionary.path is None:
        update["dictionary"] = config.dictionary.model_copy(update={"steps": PROBE_STEPS})
    return config.model_copy(update=update)
