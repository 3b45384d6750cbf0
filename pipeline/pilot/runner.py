"""Pilots, from a recipe to forecasts: prepare, train, measure, fit, project, write.

Every training is committed by itself, under a name that its mixture, rows and start make. So an
interrupted run goes on, and a larger design, another budget or another way to forecast reuse what
is there.
"""

from __future__ import annotations

import asyncio
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import numpy as np

from pipeline.config import changed_fields
from pipeline.pilot.config import PilotConfig
from pipeline.pilot.curve import forecast_curve
from pipeline.pilot.forecasts import (
    Bounds,
    Measured,
    autoscaled,
    compared_forms,
    least_forecast,
    projection_alone,
    projection_report,
    rank_correlations,
    recommended_form,
)
from pipeline.pilot.prepare import Make, clouds, prepared_pool
from pipeline.pilot.trials import Trial, TrialJob, run_trial, trials_of
from pipeline.rundir import IDENTITY, MANIFEST, RunLock
from stages.base import Each, in_turn
from stages.engines.local import make_engine
from stages.engines.model_files import model_identity
from stages.errors import ConfigError, StageError
from stages.forecast.forecaster import Forecaster
from stages.forecast.projection import Projection
from stages.forecast.transport_value import MixtureTransport
from stages.ingest.parse import content_of
from stages.mixture.simplex import FloatArray, Mixture, checked_bounds
from stages.mixture.transport import TransportNotSolved
from stages.pilots.design import mixture_design, random_mixtures
from stages.storage import Store

VERSION = 1
"""Goes up when the same recipe comes to give other losses."""

REPORT, CURVE = "report.json", "forecast.svg"
_FORECAST_ONLY = ("name", "design", "transport", "forecast")
"""Sections that bear on no single training."""


@dataclass(frozen=True)
class Progress:
    """Where trainings stand.

    Attributes:
        done: trainings that are committed.
        of: all.
        rows: that they were trained on.
        rows_of: of all.
        rows_per_second: since this process began.
        loss: of the last one, nats per token.
    """

    done: int
    of: int
    rows: int
    rows_of: int
    rows_per_second: float
    loss: float


Say = Callable[[str], None]
Show = Callable[[Progress], None]


def run_pilots(
    config: PilotConfig, say: Say, show: Show, make: Make = make_engine
) -> dict[str, Any]:
    """Train what is missing, then forecast.

    Args:
        config: the recipe.
        say: told what goes on, a line a step.
        show: told where trainings stand, after each.
        make: makes the encoder.

    Returns:
        The report.

    Raises:
        ConfigError: something that the recipe names is missing or can't be used, or the folder
            holds trainings of another recipe.
        StageError: a training diverged, or the forecasts can't be fitted.
        RunBusy: another process works in the folder.
    """
    return _Pilots(config, say, show, make).run()


class _Pilots:
    def __init__(self, config: PilotConfig, say: Say, show: Show, make: Make) -> None:
        self._config, self._say, self._show, self._make = config, say, show, make
        self._store = Store(config.execution.run)
        self._sources = tuple(source.name for source in config.sources)

    def run(self) -> dict[str, Any]:
        config, store = self._config, self._store
        identity = self._identity()
        with RunLock(store):
            self._begin(identity)
            design = mixture_design(len(self._sources), config.design.mixtures, config.seed)
            held_out = random_mixtures(len(self._sources), config.design.held_out, config.seed + 1)
            at_scales = [
                trial
                for scale in config.design.scales
                for trial in trials_of(np.vstack([design, held_out]), scale, config.training.seeds)
            ]
            at_budget = trials_of(
                held_out[: config.design.budget_mixtures],
                config.design.budget,
                config.training.seeds,
            )
            trials = [*at_scales, *at_budget]
            self._say("reading the sources")
            survey = prepared_pool(config, store, self._wanted(trials))
            vectors = None
            if config.transport:
                self._say("embedding rows and targets")
                vectors = clouds(config, store, self._make)
            records = self._trained(trials)
            self._say("fitting forecasts")
            try:
                transport = vectors.transport(config) if vectors else None
                measured = []
                for mixtures in (design, held_out):
                    none = np.zeros(len(mixtures))
                    measured.append(
                        Measured(
                            mixtures,
                            self._losses(records, mixtures),
                            transport.values(mixtures) if transport else none,
                            vectors.energies(config, mixtures) if vectors else none,
                        )
                    )
                report = self._report(survey, records, measured[0], measured[1], transport)
            except (ValueError, TransportNotSolved) as error:
                raise StageError(f"no forecast can be made: {error}", stage="pilot") from error
            self._write(report, identity)
            return report

    def _begin(self, identity: dict[str, Any]) -> None:
        if self._store.exists(IDENTITY):
            changed = changed_fields(self._store.read_json(IDENTITY), identity)
            if changed:
                raise ConfigError(
                    f"{self._store.url} holds other trainings: {'; '.join(changed)}; give another "
                    "execution.run, or remove the folder"
                )
        self._store.remove(MANIFEST)
        self._store.write_json(IDENTITY, identity)

    def _wanted(self, trials: Iterable[Trial]) -> dict[str, int]:
        """Rows of each source that the trial which takes most of it takes."""
        wanted = dict.fromkeys(self._sources, 0)
        for trial in trials:
            for name, count in trial.counts(self._sources).items():
                wanted[name] = max(wanted[name], count)
        return wanted

    def _trained(self, trials: list[Trial]) -> dict[Trial, dict[str, Any]]:
        """Records of all trials; those that are missing are trained."""
        config = self._config
        jobs = [
            TrialJob(
                self._store.url,
                trial,
                self._sources,
                config.proxy,
                config.training,
                config.student,
                config.seed,
            )
            for trial in trials
        ]
        there = [job for job in jobs if self._store.exists(job.trial.file)]
        missing = [job for job in jobs if not self._store.exists(job.trial.file)]
        if there and missing:
            self._say(f"going on: {len(there)} of {len(jobs)} trainings are there")
        records = {job.trial: self._store.read_json(job.trial.file) for job in there}
        rows_of = sum(trial.rows for trial in trials)
        already = sum(trial.rows for trial in records)
        rows, began = already, time.monotonic()
        with self._each() as each:
            for job, record in zip(missing, each(run_trial, missing), strict=True):
                records[job.trial] = record
                rows += job.trial.rows
                speed = (rows - already) / (time.monotonic() - began)
                self._show(Progress(len(records), len(jobs), rows, rows_of, speed, record["loss"]))
        return records

    @contextmanager
    def _each(self) -> Iterator[Each]:
        """What runs trials: this process, several, or Ray."""
        execution = self._config.execution
        if execution.backend == "ray":
            from pipeline.ray_backend import RayBackend

            backend = RayBackend(execution.place_timeout_s, 1)
            try:
                yield backend.map
            finally:
                asyncio.run(backend.close())
        elif execution.workers == 1:
            yield in_turn
        else:
            # Spawned, not forked: torch may hold threads here already.
            with ProcessPoolExecutor(execution.workers, get_context("spawn")) as pool:
                yield pool.map

    def _losses(self, records: dict[Trial, dict[str, Any]], mixtures: FloatArray) -> FloatArray:
        """Losses at both scales, means over starts; float64 [n, 2]."""
        columns = [
            self._mean_losses(records, mixtures, scale) for scale in self._config.design.scales
        ]
        return np.column_stack(columns)

    def _mean_losses(
        self, records: dict[Trial, dict[str, Any]], mixtures: FloatArray, rows: int
    ) -> FloatArray:
        starts = self._config.training.seeds
        losses = [records[trial]["loss"] for trial in trials_of(mixtures, rows, starts)]
        table = np.array(losses, np.float64).reshape(len(mixtures), starts)
        return np.asarray(table.mean(axis=1), np.float64)

    def _report(
        self,
        survey: dict[str, dict[str, int]],
        records: dict[Trial, dict[str, Any]],
        design: Measured,
        held_out: Measured,
        transport: MixtureTransport | None,
    ) -> dict[str, Any]:
        config = self._config
        projection = Projection(
            *config.design.scales, config.design.budget, config.forecast.project
        )
        count = config.design.budget_mixtures
        reached = (
            self._mean_losses(records, held_out.mixtures[:count], config.design.budget).tolist()
            if count
            else []
        )
        at_budget = dict(enumerate(reached))
        made, rows = compared_forms(design, held_out, at_budget, projection, transport is not None)
        place, judged_by = recommended_form(rows)
        bounds = self._bounds(survey)
        minima = [
            least_forecast(one, transport, design, bounds, config.forecast, config.seed)
            for one in made
        ]
        for row, least in zip(rows, minima, strict=True):
            row["weights"] = self._named(least.weights)
            row["loss"] = least.value
        chosen = made[place]
        scaled = autoscaled(chosen, transport, design, bounds, config.forecast, config.seed)
        some = next(iter(records.values()))
        return {
            "name": config.name,
            "sources": list(self._sources),
            "tasks": sorted(some["loss_by_task"]),
            "pool": survey,
            "trainings": len(records),
            "parameters": some["parameters"],
            "projection": projection_report(projection),
            "design": self._measured_rows(design, chosen, {}),
            "held_out": self._measured_rows(held_out, chosen, at_budget),
            "forms": rows,
            "projection_alone": projection_alone(held_out, at_budget, projection)
            if at_budget
            else None,
            "rank_correlation": {
                what: rank_correlations(design, held_out, what) for what in ("transport", "energy")
            }
            if transport
            else None,
            "recommended": {
                "form": chosen.form.name,
                "judged_by": judged_by,
                "weights": self._named(minima[place].weights),
                "loss": minima[place].value,
                "interval": list(chosen.interval(minima[place].value, config.forecast.interval)),
                "coverage": config.forecast.interval,
                "caps": self._named(bounds.upper),
            },
            "autoscale": {
                "weights": self._named(scaled),
                "loss": self._forecast(chosen, scaled, transport),
            },
            "curve": self._curve(chosen, minima[place], transport),
        }

    def _bounds(self, survey: dict[str, dict[str, int]]) -> Bounds:
        """What the recipe and the sources' rows allow.

        Raises:
            ConfigError: no mixture is allowed.
        """
        config = self._config
        lower = [config.forecast.floors.get(name, 0.0) for name in self._sources]
        upper = []
        for source in config.sources:
            usable = survey[source.name]["read"] - survey[source.name]["unusable"]
            supply = usable * source.repeats / config.design.budget
            upper.append(min(1.0, supply, config.forecast.caps.get(source.name, 1.0)))
        try:
            return Bounds(*checked_bounds(lower, upper))
        except ValueError as error:
            raise ConfigError(
                f"forecast: no mixture of {config.design.budget} rows meets floors, caps and what "
                f"the sources hold: {error}"
            ) from error

    def _named(self, weights: FloatArray) -> dict[str, float]:
        return dict(zip(self._sources, weights.tolist(), strict=True))

    def _measured_rows(
        self, measured: Measured, chosen: Forecaster, at_budget: dict[int, float]
    ) -> list[dict[str, Any]]:
        """A record a mixture, the recommended form's forecast with it."""
        forecast = chosen.losses(measured.mixtures, measured.transport).tolist()
        coverage = self._config.forecast.interval
        return [
            {
                "weights": self._named(measured.mixtures[i]),
                "losses": measured.losses[i].tolist(),
                "transport": float(measured.transport[i]),
                "energy": float(measured.energy[i]),
                "forecast": forecast[i],
                "interval": list(chosen.interval(forecast[i], coverage)),
                **({"budget_loss": at_budget[i]} if i in at_budget else {}),
            }
            for i in range(len(measured.mixtures))
        ]

    def _forecast(
        self, one: Forecaster, p: FloatArray, transport: MixtureTransport | None
    ) -> float:
        return one.value_and_slopes(p, transport)[0]

    def _curve(
        self, chosen: Forecaster, least: Mixture, transport: MixtureTransport | None
    ) -> list[dict[str, Any]]:
        """Forecasts along each source's weight, the others in the recommended proportion."""
        curves = []
        for k, name in enumerate(self._sources):
            rest = np.delete(least.weights, k)
            rest = rest / rest.sum() if rest.sum() > 0 else np.full(len(rest), 1 / len(rest))
            points = []
            for weight in np.linspace(0.0, 1.0, 21).tolist():
                p = np.insert((1.0 - weight) * rest, k, weight)
                loss = self._forecast(chosen, p, transport)
                low, high = chosen.interval(loss, self._config.forecast.interval)
                points.append([weight, loss, low, high])
            curves.append({"source": name, "weight": float(least.weights[k]), "points": points})
        return curves

    def _identity(self) -> dict[str, Any]:
        """What a training's loss is a function of, beside its mixture, rows and start."""
        import torch

        config = self._config
        recipe = config.portable_recipe
        named = config.proxy.model
        recipe["models"] = {named: recipe["models"][named]} if named else {}
        return {
            "version": VERSION,
            "recipe": {k: v for k, v in recipe.items() if k not in _FORECAST_ONLY},
            "student": model_identity(config.student.model) if config.student else None,
            "numerics": {
                **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
                "machine": platform.machine(),
                "device": "cuda" if torch.cuda.is_available() else "cpu",
            },
            "sources": {name: dict(files) for name, files in content_of(config.sources).items()},
            "targets": {name: dict(files) for name, files in content_of(config.targets).items()},
        }

    def _write(self, report: dict[str, Any], identity: dict[str, Any]) -> None:
        """Write the report and its picture, the manifest last."""
        self._store.write_json(REPORT, report)
        self._store.write_bytes(CURVE, forecast_curve(report).encode())
        files = [
            {"path": name, "bytes": self._store.size(name), "sha256": self._store.sha256(name)}
            for name in (REPORT, CURVE)
        ]
        recipe = json.loads(json.dumps(self._config.portable_recipe))
        self._store.write_json(MANIFEST, {"identity": identity, "recipe": recipe, "files": files})
