"""Source weights by transport over many rows: value, time and true gap, beside three other ways.

The rows are synthetic: K sources around centres in a few latent dimensions, targets drawn from
three of them. Ways:

* tamis: the mixture stage's certified transport (sample, bound over all rows, fresh estimates);
* POT: the exact optimum by cutting planes over POT's solver on all rows, where it fits;
* mirror descent: exponentiated gradient on the transport of the same subsample;
* frozen dual: the step of Projektor's published code, which takes duals and value once at equal
  weights and descends that linearisation with decaying steps.

All weights are then valued by the same exact transport on the same rows: on all of them where
`--exact` allows, else on a large fresh sample. First it is asserted that bound <= exact <= estimate
on a problem small enough for one linear programme.

    python benchmarks/mixture.py --check
    python benchmarks/mixture.py --rows 125000 --pass-only      (1M rows, the certificate pass)
"""

from __future__ import annotations

import argparse
import atexit
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, reduce
from pathlib import Path
from typing import Any

# One thread a process: shards are taken by as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa

from stages.mixture.bundle import optimal_mixture
from stages.mixture.certified import Problem, certified_mixture, sums_over_all_rows
from stages.mixture.cost import cost_matrix
from stages.mixture.joint_lp import optimal_mixture_by_lp
from stages.mixture.simplex import nearest_mixture, row_weights
from stages.mixture.space import Space
from stages.mixture.transport import Transport, c_transform, mean_potential_per_source, transport

SHARD = 10_000
SHARES = (0.5, 0.3, 0.2)
LATENT = 16


class Shards:
    """Vectors in shards, made again from a seed by whoever reads them; tasks go to processes."""

    def __init__(self, sources: int, rows: int, dimensions: int, seed: int, workers: int) -> None:
        self.sources, self.rows, self.dimensions, self.seed = sources, rows, dimensions, seed
        self.workers = workers

    @property
    def n_rows(self) -> int:
        return self.sources * self.rows

    def draw(self, source: np.ndarray, stream: int) -> np.ndarray:
        """Unit vectors around the sources' centres, float32 [n, d]."""
        fixed = np.random.default_rng([self.seed, 0])
        basis = fixed.normal(size=(LATENT, self.dimensions)) / self.dimensions**0.5
        centres = fixed.normal(size=(self.sources, LATENT))
        own = np.random.default_rng([self.seed, 1, stream])
        latent = centres[source] + own.normal(size=(len(source), LATENT))
        vectors = latent @ basis + 0.01 * own.normal(size=(len(source), self.dimensions))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def source_of(self, start: int, stop: int) -> np.ndarray:
        """Rows of the sources in turn, so that every shard holds all of them."""
        return np.arange(start, stop) % self.sources

    def shard(self, number: int) -> pa.Table:
        start, stop = number * SHARD, min((number + 1) * SHARD, self.n_rows)
        vectors = self.draw(self.source_of(start, stop), 1 + number)
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.dimensions)
        ids = [f"{i:032x}" for i in range(start, stop)]
        return pa.table({"id": ids, "embedding": flat.cast(pa.list_(pa.float32()))})

    def iter(self, names: Sequence[str]) -> Iterator[pa.Table]:
        for number in range(-(-self.n_rows // SHARD)):
            yield self.shard(number).select(list(names))

    def map(self, names: Sequence[str], fn: Any, merge: Any, *, beside: pa.Table) -> Any:
        starts = range(0, self.n_rows, SHARD)
        rows = (pa.array(range(start, min(start + SHARD, self.n_rows))) for start in starts)
        tasks = [(self, number, fn, beside.take(mine)) for number, mine in enumerate(rows)]
        answers = _pool(self.workers).map(_answer, tasks)
        return reduce(merge, (WORK.counted(*answer) for answer in answers))


class Work:
    """What the worker processes used."""

    seconds, peak = 0.0, 0.0

    def counted(self, value: Any, seconds: float, peak: float) -> Any:
        self.seconds += seconds
        self.peak = max(self.peak, peak)
        return value


WORK = Work()


@cache
def _pool(workers: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    atexit.register(pool.shutdown)
    return pool


def _answer(task: Any) -> Any:
    shards, number, fn, beside = task
    start = time.process_time()
    value = fn(shards.shard(number), beside)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return value, time.process_time() - start, peak


def problem_of(shards: Shards, targets: int) -> Problem:
    names = [f"s{k}" for k in range(shards.sources)]
    drawn = np.random.default_rng([shards.seed, 2]).choice(len(SHARES), targets, p=SHARES)
    y = shards.draw(drawn, 0).astype(np.float64)
    decisions = pa.table(
        {
            "id": [f"{i:032x}" for i in range(shards.n_rows)],
            "source": [names[k] for k in shards.source_of(0, shards.n_rows).tolist()],
            "keep": np.ones(shards.n_rows, dtype=bool),
            "reason": ["kept"] * shards.n_rows,
        }
    )
    k = shards.sources
    free = np.zeros(k), np.ones(k)
    mass = np.full(targets, 1 / targets)
    return Problem(shards, decisions, names, y, mass, Space("euclidean"), np.eye(k), *free, seed=0)


def everything(shards: Shards) -> tuple[np.ndarray, np.ndarray]:
    """All vectors and their sources."""
    tables = [shards.shard(number) for number in range(-(-shards.n_rows // SHARD))]
    flat = [table["embedding"].combine_chunks().flatten().to_numpy() for table in tables]
    vectors = np.concatenate(flat).reshape(-1, shards.dimensions)
    return vectors, shards.source_of(0, shards.n_rows)


def value_of(
    weights: np.ndarray, x: np.ndarray, source: np.ndarray, problem: Problem, start: np.ndarray
) -> float:
    """The exact transport of weights on given rows."""
    mass = row_weights(weights, source)
    used = mass > 0
    cost = cost_matrix(x[used], problem.y, "euclidean")
    warm = Transport(0.0, c_transform(cost, start), start)
    return transport(cost, mass[used], problem.b, warm).value


def mirror_descent(
    cost: np.ndarray, source: np.ndarray, b: np.ndarray, n_sources: int, steps: int
) -> np.ndarray:
    """Weights of least value along p <- p exp(-eta h / sqrt t) / Z on one subsample."""
    p = np.full(n_sources, 1 / n_sources)
    best, least, last = p, np.inf, None
    for step in range(1, steps + 1):
        last = transport(cost, row_weights(p, source), b, last)
        if last.value < least:
            best, least = p, last.value
        slope = mean_potential_per_source(last.source_potential, source, n_sources)
        scale = 2.0 / max(float(np.ptp(slope)), 1e-12)
        p = p * np.exp(-scale / step**0.5 * (slope - slope.min()))
        p = p / p.sum()
    return best


def frozen_dual(
    cost: np.ndarray,
    source: np.ndarray,
    b: np.ndarray,
    n_sources: int,
    rate: float = 5e-4,
    decay: float = 0.9,
    steps: int = 100,
) -> np.ndarray:
    r"""Projected steps along the calibrated gradient at equal weights, which is never taken again.

    d_k = (h_k - sum_l p_l h_l) / (1 - p_k), with rate, decay and steps as published.
    """
    p = np.full(n_sources, 1 / n_sources)
    solved = transport(cost, row_weights(p, source), b)
    h = mean_potential_per_source(solved.source_potential, source, n_sources)
    slope = (h - p @ h) / (1 - p)
    for step in range(steps):
        p = nearest_mixture(p - rate * decay**step * slope, np.zeros(n_sources), np.ones(n_sources))
    return p


def assert_bounds_hold() -> dict[str, float]:
    """Bound <= joint linear programme <= estimate, on 3 x 300 rows and 60 targets."""
    shards = Shards(3, 300, 24, 7, 1)
    problem = problem_of(shards, 60)
    found = certified_mixture(problem, 60, 60, 1e-9, 1e-6)
    x, source = everything(shards)
    exact = optimal_mixture_by_lp(
        cost_matrix(x, problem.y, "euclidean"), source, problem.b, problem.lower, problem.upper
    ).value
    assert found.lower_bound <= exact * (1 + 1e-9), (found.lower_bound, exact)
    assert exact <= found.estimate.value * (1 + 1e-9), (exact, found.estimate.value)
    return {"bound": found.lower_bound, "exact": exact, "estimate": found.estimate.value}


def timed(fn: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, seconds of processor time of this process and its workers, and the value."""
    wall, spent = time.perf_counter(), _processor_seconds()
    value = fn()
    return time.perf_counter() - wall, _processor_seconds() - spent, value


def _processor_seconds() -> float:
    return time.process_time() + WORK.seconds


def peak_megabytes() -> dict[str, float]:
    """Peak resident memory of this process, and of the largest worker."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"driver": own, "worker": WORK.peak}


def certificate_pass(chosen: argparse.Namespace, workers: int) -> dict[str, Any]:
    """The potentials of a solved sample over every row, once."""
    shards = Shards(chosen.sources, chosen.rows, chosen.dimensions, 0, workers)
    problem = problem_of(shards, chosen.targets)
    source = np.repeat(np.arange(shards.sources), 200)
    x = shards.draw(source, 10**6)
    bundle = optimal_mixture(
        cost_matrix(x, problem.y, "euclidean"),
        source, problem.b, problem.lower, problem.upper, 1e-4,
    )  # fmt: skip
    wall, spent, sums = timed(lambda: sums_over_all_rows(problem, bundle.potentials))
    assert int(sums.count.sum()) == shards.n_rows
    return {
        "rows": shards.n_rows,
        "cuts": len(bundle.potentials),
        "seconds": wall,
        "processor_seconds": spent,
        "peak_megabytes": peak_megabytes(),
    }


def comparison(chosen: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Every way on the same rows."""
    shards = Shards(chosen.sources, chosen.rows, chosen.dimensions, 0, workers)
    problem = problem_of(shards, chosen.targets)
    k = shards.sources
    wall, spent, found = timed(
        lambda: certified_mixture(problem, 400, 6400, chosen.tolerance, 1e-3)
    )
    start = found.potentials[-1]
    size = min(chosen.subsample, chosen.rows)
    source = np.repeat(np.arange(k), size)
    x = shards.draw(source, 10**6)
    cost = cost_matrix(x, problem.y, "euclidean")
    ways: dict[str, dict[str, Any]] = {
        "tamis": {"weights": found.bundle.weights, "seconds": wall, "processor_seconds": spent}
    }
    descents: dict[str, Callable[[], np.ndarray]] = {
        "mirror descent": lambda: mirror_descent(cost, source, problem.b, k, chosen.steps),
        "frozen dual": lambda: frozen_dual(cost, source, problem.b, k),
    }
    for name, way in descents.items():
        wall, spent, weights = timed(way)
        ways[name] = {"weights": weights, "seconds": wall, "processor_seconds": spent}
    exact = shards.n_rows <= chosen.exact
    if exact:
        rows, of = everything(shards)
        wall, spent, best = timed(
            lambda: optimal_mixture(
                cost_matrix(rows, problem.y, "euclidean"),
                of, problem.b, problem.lower, problem.upper, 1e-5,
            )
        )  # fmt: skip
        ways["POT, all rows"] = {
            "weights": best.weights, "seconds": wall, "processor_seconds": spent,
        }  # fmt: skip
        floor = best.lower_bound
    else:
        of = np.repeat(np.arange(k), chosen.fresh)
        rows, floor = shards.draw(of, 10**6 + 1), found.lower_bound
    for way in ways.values():
        way["value"] = value_of(way["weights"], rows, of, problem, start)
        way["gap"] = way["value"] / floor - 1
        way["weights"] = way["weights"].tolist()
    if exact:
        # The estimate's own claim, against the optimum that was never told to it.
        assert found.lower_bound <= best.value * (1 + 1e-9)
        assert ways["POT, all rows"]["value"] <= ways["tamis"]["value"] * (1 + 1e-4)
    half = found.estimate.half_width
    return {
        "sources": k,
        "rows_per_source": chosen.rows,
        "dimensions": chosen.dimensions,
        "targets": chosen.targets,
        "valued_on": "all rows" if exact else f"{chosen.fresh} fresh rows a source",
        "gap_to": "exact optimum" if exact else "certified bound",
        "lower_bound": found.lower_bound,
        "upper_estimate": found.estimate.value,
        "upper_interval": [found.estimate.value - half, found.estimate.value + half],
        "certified_gap": found.estimate.value / found.lower_bound - 1,
        "stopped": found.stopped,
        "trace": found.trace,
        "ways": ways,
        "peak_megabytes": peak_megabytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--rows", type=int, default=20_000, help="of each source")
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--subsample", type=int, default=400, help="rows a source of the descents")
    parser.add_argument("--steps", type=int, default=100, help="of mirror descent")
    parser.add_argument("--fresh", type=int, default=4000, help="rows a source to value on")
    parser.add_argument("--exact", type=int, default=20_000, help="rows up to which POT solves all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pass-only", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    small = assert_bounds_hold()
    report: dict[str, Any] = {
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {chosen.workers} workers",
        "load_average": os.getloadavg()[0],
        "small_problem": small,
    }
    if chosen.pass_only:
        found = certificate_pass(chosen, chosen.workers)
        report["certificate_pass"] = found
        print(
            f"{found['rows']:,} rows, {found['cuts']} cuts: {found['seconds']:.1f} s "
            f"({found['processor_seconds']:.1f} s of processor), peak {found['peak_megabytes']} MB"
        )
        missed = found["seconds"] > 120 or max(found["peak_megabytes"].values()) > 2048
    else:
        found = comparison(chosen, chosen.workers)
        report |= found
        print(
            f"{found['sources']} sources of {found['rows_per_source']:,} rows, "
            f"{found['targets']} targets; bound {found['lower_bound']:.5f}, estimate "
            f"{found['upper_estimate']:.5f}, gap {found['certified_gap']:.3%}, {found['stopped']}"
        )
        print(f"values on {found['valued_on']}, gaps to the {found['gap_to']}")
        print(f"{'way':16} {'value':>9} {'gap':>8} {'seconds':>8} {'processor':>9}")
        for name, way in found["ways"].items():
            print(
                f"{name:16} {way['value']:9.5f} {way['gap']:8.3%} {way['seconds']:8.1f} "
                f"{way['processor_seconds']:9.1f}"
            )
        ours = found["ways"]["tamis"]
        missed = found["certified_gap"] > 0.01 or ours["seconds"] > 360
    _pool(chosen.workers).shutdown()
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(report, indent=1) + "\n")
    if chosen.check and missed:
        sys.exit("outside the figures asked for")


if __name__ == "__main__":
    main()
