"""The generated TRL script really loads the data set and trains two steps on it.

A tiny Llama with random weights, the tokenizer of the embedded model. Skipped without TRL.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from emission_runs import two_sources, written

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=len(student_tokenizer), hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    student_tokenizer.save_pretrained(folder)
    return folder


def trained(data: Path, model: Path, out: Path, config: str) -> str:
    done = subprocess.run(
        [
            sys.executable, "trainers/trl_sft.py", str(model), str(out), "--config", config,
            "--max-steps", "2", "--max-length", "128",
        ],
        cwd=data, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HOME": str(out.parent / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


@pytest.mark.parametrize(
    ("form", "config"),
    [
        ("messages", "default"),
        pytest.param("prompt_completion", "default", marks=pytest.mark.slow),
        pytest.param("alpaca", "default", marks=pytest.mark.slow),
        ("messages", "prefix"),
    ],
)
def test_trl_trains_two_steps(
    model: Path, tmp_path: Path, form: str, config: str, student_tokenizer: Any
) -> None:
    import pyarrow as pa
    import torch
    from safetensors.torch import load_file

    from stages.rows import LABEL

    run = two_sources()
    if config == "prefix":
        ids = student_tokenizer("Two and two are four.")["input_ids"]
        run.column("prefix_kind", LABEL, ["prefix", "full"])
        run.column("prefix_prompt_ids", pa.list_(pa.int32()), [ids])
        run.column("prefix_ids", pa.list_(pa.int32()), [ids[:3], ids])
        run.column("prefix_text", pa.string(), ["Two"])
        run.column("prefix_sampled_tokens", pa.int32(), [3])
    outcome = run.emit(str(tmp_path / "run"), budget_rows=40, format=form, validation=0.1)
    written(outcome, str(tmp_path / "set"))
    said = trained(tmp_path / "set", model, tmp_path / "out", config)
    assert "'eval_loss'" in said
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before if name in after)
    assert all(torch.isfinite(value).all() for value in after.values())
