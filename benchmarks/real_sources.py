"""Real sources of eight kinds that benchmarks read in place, beside the checkout."""

from __future__ import annotations

from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "shared" / "data" / "sources"
FILES = (
    "alpaca_5000.json",
    "dolly_3k.json",
    "gsm8k_train.jsonl",
    "gpteacher_codegen.json",
    "math_5000.jsonl",
    "gpteacher_roleplay.json",
    "flan_cot_creak.json",
    "flan_cot_aqua.json",
)
