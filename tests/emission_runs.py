"""Made-up runs up to emission, for tests of the data set and of what explains it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.base import Outcome
from stages.emission import EmissionSettings, EmissionStage
from stages.rows import LABEL, MESSAGES, REJECTS, row_id
from stages.storage import Store

T = TypeVar("T")

NASTY = "<script>alert('x')</script> & <img src=x onerror=y>"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", LABEL),
        ("messages", MESSAGES),
        ("messages_reflected", MESSAGES),
        ("tools", pa.string()),
        ("answer", pa.string()),
        ("license", pa.string()),
        ("ifd", pa.float32()),
        ("ifd_before", pa.float32()),
        ("ifd_effective", pa.float32()),
        ("similarity", pa.float32()),
        ("reflection_status", LABEL),
        ("reflection_outcome", LABEL),
    ]
)


@dataclass
class Table:
    """Columns held in memory, in shards."""

    shards: list[pa.Table]

    @property
    def n_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    def iter(self, names: Sequence[str]) -> Iterator[pa.Table]:
        for shard in self.shards:
            yield shard.select(list(names))

    def map(
        self, names: Sequence[str], fn: Callable[[pa.Table], T], merge: Callable[[T, T], T]
    ) -> T:
        results = [fn(table) for table in self.iter(names)]
        while len(results) > 1:
            results[:2] = [merge(*results[:2])]
        return results[0]


@dataclass
class Run:
    """A run up to emission."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    mixture: dict[str, Any] | None = None
    present: tuple[str, ...] = tuple(SCHEMA.names)
    schema: pa.Schema = SCHEMA
    recipe: dict[str, Any] = field(default_factory=dict)
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("sums", "sums")

    def add(self, source: str, count: int, **of_source: Any) -> None:
        """Rows of a source; every fifth is dropped, every third of the rest was rewritten."""
        license_ = of_source.get("license")
        self.sources.append({"name": source, "path": f"{source}.jsonl", **of_source})
        for i in range(count):
            text = f"answer {i} of {source} " + "word " * (i % 7)
            messages = [user(f"question {i} of {source}"), assistant(text)]
            rewritten = i % 3 == 1
            self.rows.append(
                {
                    "id": row_id(messages, None),
                    "source": source,
                    "messages": messages,
                    "messages_reflected": [messages[0], assistant("better " + text)]
                    if rewritten
                    else None,
                    "tools": None,
                    "answer": None,
                    "license": license_,
                    "ifd": 0.3 + (i % 11) / 20,
                    "ifd_before": 0.3 + (i % 11) / 20,
                    "ifd_effective": 0.3 + (i % 11) / 20 + 0.1 * rewritten,
                    "similarity": (i % 13) / 13,
                    "reflection_status": "ok",
                    "reflection_outcome": "response rewritten" if rewritten else "unchanged",
                    "keep": i % 5 != 4,
                    "tokens": 10 + i % 7,
                }
            )

    def column(self, name: str, kind: pa.DataType, values: Sequence[Any]) -> None:
        """A further column, one value a row (in turn where there are fewer)."""
        self.schema = self.schema.append(pa.field(name, kind))
        self.present = (*self.present, name)
        for row, value in zip(self.rows, itertools.cycle(values), strict=False):
            row[name] = value

    def table(self, shards: int) -> Table:
        columns = {}
        for item in self.schema:
            if item.name in self.present:
                kind = pa.string() if item.type == LABEL else item.type
                values = pa.array([row[item.name] for row in self.rows], kind)
                columns[item.name] = values.dictionary_encode() if item.type == LABEL else values
        whole = pa.table(columns)
        cuts = np.linspace(0, len(self.rows), shards + 1).astype(int)
        return Table([whole.slice(a, b - a) for a, b in itertools.pairwise(cuts)])

    def artifacts(self, url: str) -> dict[str, Store]:
        rows = self.rows
        decisions = pa.table(
            {
                "id": [row["id"] for row in rows],
                "source": pa.array([row["source"] for row in rows]).dictionary_encode(),
                "keep": [row["keep"] for row in rows],
                "reason": [
                    "kept" if row["keep"] else row.get("reason", f"reason {NASTY}") for row in rows
                ],
                "tokens": pa.array([row["tokens"] for row in rows], pa.int32()),
            }
        )
        counts = Counter(row["source"] for row in rows)
        reports: dict[str, dict[str, Any]] = {
            "ingest": {
                "sources": {
                    name: {
                        "in": count + 3,
                        "kept": count,
                        "rejected": {"empty response": 3},
                        **self.left_out.get(name, {}),
                    }
                    for name, count in counts.items()
                }
            },
            **{name: {} for name in {**self.statuses, **self.identities}},
            "selection": {},
        }
        if self.mixture is not None:
            reports["mixture"] = self.mixture
        stores = {name: Store(f"{url}/{name}") for name in reports}
        for name, report in reports.items():
            manifest = {"fingerprint": name * 3, "seconds": 2.5, "report": report}
            counts_ = self.statuses.get(name, {})
            stores[name].write_json("manifest.json", {**manifest, "counts": counts_})
            identity = {"version": 1, **self.identities.get(name, {})}
            stores[name].write_json("identity.json", identity)
        if self.rejects:
            table = pa.Table.from_pylist(self.rejects, schema=REJECTS)
            stores["ingest"].write_table("rejects/part-00000.parquet", table)
        stores["selection"].write_table("decisions.parquet", decisions)
        return stores

    def stage(self, seed: int = 5, **settings: Any) -> EmissionStage:
        base = {"name": "small", "seed": seed, "sources": self.sources, "models": {}}
        recipe = {**base, **self.recipe}
        return EmissionStage(EmissionSettings(**settings), seed, recipe, self.present)

    def emit(self, url: str, shards: int = 3, seed: int = 5, **settings: Any) -> Outcome:
        stage = self.stage(seed, **settings)
        return stage.decide(self.table(shards), self.targets(), self.artifacts(url))

    def targets(self) -> Table:
        return Table([pa.table({"task": pa.array(self.tasks).dictionary_encode()})])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def written(outcome: Outcome, folder: str) -> Store:
    """The data set on disk."""
    store = Store(folder)
    for name, data in outcome.files.items():
        store.write_bytes(name, data)
    for name, table in outcome.tables.items():
        store.write_table(name, table)
    return store


def read(outcome: Outcome, folder: str = "data") -> list[dict[str, Any]]:
    """Emitted lines in order."""
    lines = []
    for name in sorted(name for name in outcome.files if name.startswith(f"{folder}/")):
        lines += pq.read_table(pa.BufferReader(outcome.files[name])).to_pylist()
    return lines


def two_sources() -> Run:
    """50 rows of `sums` and 80 of `chat`, mixed 1 to 3."""
    made = Run()
    made.add("sums", 50, license="MIT")
    made.add("chat", 80, license="apache-2.0")
    made.mixture = {
        "weights": {"sums": 0.25, "chat": 0.75},
        "value_sample": 0.41,
        "lower_bound": 0.4,
        "upper_estimate": 0.42,
        "upper_interval": [0.41, 0.43],
        "gap": 0.02,
        "ranges": {"sums": [0.2, 0.3], "chat": [0.7, 0.8]},
        "caps": {"chat": 0.9},
    }
    return made
