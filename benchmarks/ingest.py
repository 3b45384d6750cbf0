"""Ingest beside what a person would otherwise run: plain scripts, and Data-Juicer.

    python benchmarks/ingest.py --rows 1000000 --check --json FILE
    python benchmarks/ingest.py --data-juicer /path/to/its/environment/bin/python

Rows are those of real sources, repeated with edits: of every repetition a fifth of the records is
as it was, two fifths have one word of the response replaced, and two fifths a third of all words.
They are written as JSON lines to a temporary folder.

* exact: `ingest` beside a loop over `json.loads`, hashlib, `pa.Table.from_pylist` and
  `pq.write_table`, which knows each source's columns. Both must keep as many rows. `ingest` also
  recognises forms, checks every value, writes rejects with reasons, groups and shards.
* near: what the search for near duplicates adds to `ingest`, two tasks at a time, beside rensa used
  as its guide shows (one `RMinHash` a row, `RMinHashLSH`) over the same responses: shingles,
  signatures, queries and insertion, in memory, in one process, and without verification.

Each side runs in a process of its own, whose peak memory is measured; `ingest`'s workers too.
Ratios are of time on the clock. Those of processor time, workers' included, stand beside them: they
hold on a busy machine too.

Data-Juicer (py-data-juicer 1.6.1) deduplicates 20,000 real rows with its `document_deduplicator`
and `document_minhash_deduplicator`. Loading libraries isn't timed on either side. What both found
is compared row by row, near duplicates with the similarity of all pairs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.ingest import IngestSettings, NearDuplicateSettings, ingest
from stages.sources import Source
from stages.storage import Store

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "shared" / "data" / "sources"
LEFT_OUT = ("new_codealpaca", "messages_kto_demo", "sharegpt_dpo_demo", "lima_history")
"""A copy of another one, preference data, and conversations of several turns."""

PROMPT = ("instruction", "input", "prompt", "question", "problem")
RESPONSE = ("output", "response", "completion", "answer", "solution")
NEAR = NearDuplicateSettings(part="response", threshold=0.8)
BANDS = 16
"""Of the plain script: rensa's guide takes 16 bands of 8 for 128 permutations."""

MOST_EXACT, MOST_NEAR, MOST_BYTES = 2.0, 1.5, 3 << 30
LEAST_DATA_JUICER = 20.0


# Rows


def real_records() -> dict[str, list[dict[str, Any]]]:
    """Records of the real sources, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(SOURCES.iterdir()):
        name = path.name.split(".")[0]
        if name not in LEFT_OUT:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            found[name] = (
                json.loads(data)
                if path.suffix == ".json"
                else [json.loads(line) for line in data.split(b"\n") if line.strip()]
            )
    return found


def edited(record: dict[str, Any], draws: random.Random) -> dict[str, Any]:
    """The record, with one word of its response or a third of all words replaced, or as it is."""
    kind = draws.random()
    if kind < 0.2:
        return record
    response = next(name for name in RESPONSE if name in record and name not in PROMPT)
    share = None if kind < 0.6 else 1 / 3
    names = [response] if share is None else [n for n in (*PROMPT, response) if n in record]
    changed = dict(record)
    for name in names:
        words = str(record[name]).split(" ")
        places = (
            [draws.randrange(len(words))]
            if share is None
            else [i for i in range(len(words)) if draws.random() < share]
        )
        for place in places:
            if words[place]:
                words[place] = f"w{draws.randrange(1 << 30)}"
        changed[name] = " ".join(words)
    return changed


def write_rows(folder: Path, count: int, seed: int) -> int:
    """Write `count` records as JSON lines, a file a source; the bytes written."""
    records = real_records()
    total = sum(map(len, records.values()))
    written = 0
    for name, mine in records.items():
        draws = random.Random(f"{seed}:{name}")
        wanted = round(count * len(mine) / total)
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(wanted):
                record = mine[number % len(mine)]
                if number >= len(mine):
                    record = edited(record, draws)
                written += file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return written


def pairs_of(path: Path) -> Iterator[tuple[str, str]]:
    """Prompt and response of every record, by the columns that the sources have."""
    with path.open("rb") as file:
        for line in file:
            record = json.loads(line)
            prompt = "\n\n".join(record[name] for name in PROMPT if record.get(name))
            response = next(record[name] for name in RESPONSE if name in record)
            yield prompt, response


# Sides, each in a process of its own


def exact_plain(folder: Path, out: Path) -> dict[str, Any]:
    seen: set[bytes] = set()
    total = kept = 0
    for path in sorted(folder.glob("*.jsonl")):
        rows = []
        for prompt, response in pairs_of(path):
            total += 1
            if not prompt.strip() or not response.strip():
                continue
            key = hashlib.blake2b(json.dumps([prompt, response]).encode(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                messages = [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": response},
                ]
                rows.append({"id": key.hex(), "source": path.stem, "messages": messages})
        kept += len(rows)
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, out / f"{path.stem}.parquet", compression="zstd")
    return {"rows": total, "kept": kept}


def near_plain(folder: Path, out: Path) -> dict[str, Any]:
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=NEAR.threshold, num_perm=NEAR.permutations, num_bands=BANDS)
    seen: set[bytes] = set()
    total = dropped = 0
    seconds = cpu = 0.0
    for path in sorted(folder.glob("*.jsonl")):
        for prompt, response in pairs_of(path):
            key = hashlib.blake2b(json.dumps([prompt, response]).encode(), digest_size=16).digest()
            if key in seen or not prompt.strip() or not response.strip():
                continue
            seen.add(key)
            # Reading and exact duplicates aren't timed.
            started, burnt = time.perf_counter(), time.process_time()
            words = response.lower().split()
            n = NEAR.shingle
            grams = [" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]
            sketch = RMinHash(num_perm=NEAR.permutations, seed=1)
            sketch.update(grams)
            if index.query(sketch):
                dropped += 1
            else:
                index.insert(total, sketch)
            total += 1
            seconds += time.perf_counter() - started
            cpu += time.process_time() - burnt
    return {"rows": total, "kept": total - dropped, "seconds": seconds, "cpu_seconds": cpu}


def exact_ours(folder: Path, out: Path) -> dict[str, Any]:
    return _ingested(folder, out, IngestSettings(rows_per_shard=4096, max_reject_rate=1))


def near_ours(folder: Path, out: Path) -> dict[str, Any]:
    wanted = IngestSettings(rows_per_shard=4096, max_reject_rate=1, near_duplicates=NEAR)
    return _ingested(folder, out, wanted)


def _ingested(folder: Path, out: Path, wanted: IngestSettings) -> dict[str, Any]:
    sources = [Source(name=path.stem, path=str(path)) for path in sorted(folder.glob("*.jsonl"))]
    with ProcessPoolExecutor(2, get_context("spawn")) as workers:
        totals = ingest(sources, [], wanted, Store(str(out)), each=workers.map).totals()
    return {"rows": totals["in"], "kept": totals["rows"], "rejected": totals["rejected"]}


SIDES = {side.__name__: side for side in (exact_plain, exact_ours, near_plain, near_ours)}


def measured(side: str, folder: Path) -> dict[str, Any]:
    """What a side found, its seconds, and the peak memory of its largest process."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        done = subprocess.run(
            [sys.executable, __file__, "--side", side, str(folder), out],
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_side(side: str, folder: str, out: str) -> None:
    started = time.perf_counter()
    found = SIDES[side](Path(folder), Path(out))
    found.setdefault("seconds", time.perf_counter() - started)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found.setdefault("cpu_seconds", sum(one.ru_utime + one.ru_stime for one in used))
    print(json.dumps({**found, "peak_bytes": max(one.ru_maxrss for one in used) * 1024}))


# Data-Juicer


def beside_data_juicer(python: str, folder: Path, count: int) -> dict[str, Any]:
    """Seconds of both on the same real rows, and the rows that each drops."""
    sources = folder / "real"
    sources.mkdir()
    write_rows(sources, count, 0)
    pairs = [pair for path in sorted(sources.glob("*.jsonl")) for pair in pairs_of(path)]
    pairs = [pair for pair in pairs if pair[0].strip() and pair[1].strip()]
    # End-of-text markers are stripped by ingest, so that other ones would differ.
    pairs = [(prompt, answer.removesuffix("<|endoftext|>")) for prompt, answer in pairs]
    path, few = folder / "real.jsonl", folder / "few.jsonl"
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs]
    path.write_text("".join(lines))
    few.write_text("".join(lines[:100]))
    done = subprocess.run(
        [python, str(HERE / "ingest_data_juicer.py")],
        input=json.dumps(
            {"pairs": pairs, "threshold": NEAR.threshold, "window": NEAR.shingle,
             "permutations": NEAR.permutations}
        ),
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"Data-Juicer failed:\n{done.stderr[-3000:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    report: dict[str, Any] = {"rows": len(pairs)}
    for kind, wanted in (("exact", None), ("near", NEAR)):
        store = Store(str(folder / kind))
        chosen = IngestSettings(near_duplicates=wanted, max_reject_rate=1)
        ingest([Source(name="few", path=str(few))], [], chosen, Store(str(folder / f"{kind}-few")))
        started = time.perf_counter()
        ingest([Source(name="real", path=str(path))], [], chosen, store)
        seconds = time.perf_counter() - started
        kept = {
            record
            for name in store.names()
            if name.endswith(".parquet")
            for record in store.read_table(name, ["record"])["record"].to_pylist()
        }
        found = set(theirs[kind]["kept"])
        report[kind] = {
            "seconds": seconds,
            "data_juicer_seconds": theirs[kind]["seconds"],
            "times_as_fast": theirs[kind]["seconds"] / seconds,
            "kept": len(kept),
            "data_juicer_kept": len(found),
        }
        if kind == "exact" and kept != found:
            raise SystemExit(f"exact: {len(kept ^ found)} rows are kept by one side alone")
        if kind == "near":
            report[kind] |= judged(pairs, set(theirs["exact"]["kept"]), kept, found)
    return report


def judged(
    pairs: list[tuple[str, str]], distinct: set[int], kept: set[int], theirs: set[int]
) -> dict[str, Any]:
    """Rows that each side drops, beside the similarity of all pairs of responses.

    Raises:
        SystemExit: ours drops a row that is like no other, or keeps one that it should drop.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    from stages.words import words

    rows = sorted(distinct)
    sets = []
    for row in rows:
        found = words(pairs[row][1])
        n = NEAR.shingle
        sets.append({tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1))})
        sets[-1].discard(())
    names: dict[tuple[str, ...], int] = {}
    columns = [names.setdefault(gram, len(names)) for one in sets for gram in one]
    sizes = np.array([len(one) for one in sets])
    held = csr_array(
        (np.ones(len(columns), np.int32), (np.repeat(np.arange(len(sets)), sizes), columns)),
        shape=(len(sets), len(names)),
    )
    common = (held @ held.T).tocoo()
    similar = common.data / (sizes[common.row] + sizes[common.col] - common.data)
    near = (similar >= NEAR.threshold) & (common.row != common.col)
    edges = csr_array((similar[near], (common.row[near], common.col[near])), shape=common.shape)
    _, clusters = connected_components(edges, directed=False)
    _, first = np.unique(clusters, return_index=True)
    stays = {rows[place] for place in first}
    sides = {"": kept, "data_juicer_": theirs}
    found = {
        f"{side}{what}": len(rows_of)
        for side, mine in sides.items()
        for what, rows_of in (
            ("dropped_unlike_all", {row for row in stays - mine if row in distinct}),
            ("kept_like_another", mine - stays),
        )
    }
    short = [rows[place] for place in np.flatnonzero(sizes <= 1)]
    found["data_juicer_dropped_shorter_than_a_window"] = sum(
        len(pairs[row][1].split()) < NEAR.shingle for row in short if row not in theirs
    )
    if found["dropped_unlike_all"] or found["kept_like_another"] > 0.01 * len(rows):
        raise SystemExit(f"near: not what the similarity of all pairs says: {found}")
    return found


# The comparison


def _cpu_ratios(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    cpu = {side: found["cpu_seconds"] for side, found in sides.items()}
    return {
        "exact_cpu_ratio": cpu["exact_ours"] / cpu["exact_plain"],
        "near_cpu_ratio": (cpu["near_ours"] - cpu["exact_ours"]) / cpu["near_plain"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure is missed")
    parser.add_argument("--data-juicer", metavar="PYTHON", help="of the environment that holds it")
    parser.add_argument("--data-juicer-rows", type=int, default=20_000)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        run_side(*chosen.side)
        return
    report: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "rows": chosen.rows,
    }
    missed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "rows").mkdir()
        report["bytes"] = write_rows(folder / "rows", chosen.rows, chosen.seed)
        sides = {}
        for side in SIDES:
            sides[side] = found = measured(side, folder / "rows")
            print(
                f"{side:<12}{found['seconds']:>8.1f} s ({found['cpu_seconds']:.1f} s of "
                f"processors) {found['rows']:>10,} rows, {found['kept']:>10,} kept, "
                f"peak {found['peak_bytes'] / (1 << 30):.2f} GiB",
                flush=True,
            )
        report["sides"] = sides
        exact = sides["exact_ours"]["seconds"] / sides["exact_plain"]["seconds"]
        added = sides["near_ours"]["seconds"] - sides["exact_ours"]["seconds"]
        near = added / sides["near_plain"]["seconds"]
        report |= {"exact_ratio": exact, "near_ratio": near, **_cpu_ratios(sides)}
        if sides["exact_ours"]["kept"] != sides["exact_plain"]["kept"]:
            raise SystemExit(f"the sides keep different numbers of rows: {sides}")
        print(
            f"exact: {exact:.2f} times the plain script (at most {MOST_EXACT:g}), "
            f"{report['exact_cpu_ratio']:.2f} times its processor time"
        )
        print(
            f"near: {near:.2f} times raw rensa (at most {MOST_NEAR:g}), "
            f"{report['near_cpu_ratio']:.2f} times its processor time"
        )
        missed += ["exact"] * (exact > MOST_EXACT) + ["near"] * (near > MOST_NEAR)
        missed += [
            f"memory of {side}"
            for side in ("exact_ours", "near_ours")
            if sides[side]["peak_bytes"] > MOST_BYTES
        ]
        if chosen.data_juicer:
            found = beside_data_juicer(chosen.data_juicer, folder, chosen.data_juicer_rows)
            report["data_juicer"] = found
            print("beside Data-Juicer:", json.dumps(found, indent=1))
            missed += [
                f"Data-Juicer, {kind}"
                for kind in ("exact", "near")
                if found[kind]["times_as_fast"] < LEAST_DATA_JUICER
            ]
    if chosen.json:
        target, _, name = chosen.json.rpartition("/")
        Store(target or ".").write_json(name, report)
    if chosen.check and missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
