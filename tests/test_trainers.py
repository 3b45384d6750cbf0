"""The generated TRL script really loads the data set and trains two steps on what it should.

A tiny Llama with random weights, the tokenizer of the embedded model.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from emission_runs import assistant, read, two_sources, user, written

MARKED = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>
{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML that says which tokens the assistant writes."""


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


def losses(data: Path, model: Path, out: Path, config: str, monkeypatch: Any) -> Counter[str]:
    """The runs of tokens with a loss, as TRL's collator has them, as text."""
    import trl
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found: Counter[str] = Counter()

    def look(self: Any) -> None:
        for batch in self.get_train_dataloader():
            for ids, labels in zip(
                batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
            ):
                assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
                for masked, run in groupby(labels, lambda label: label == -100):
                    if not masked:
                        found[tokenizer.decode(list(run))] += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(trl.SFTTrainer, "train", look)
    monkeypatch.setattr(
        sys, "argv", ["trl_sft.py", str(model), str(out), "--config", config, "--max-length", "256"]
    )
    with pytest.raises(KeyboardInterrupt):
        runpy.run_path(str(data / "trainers" / "trl_sft.py"), run_name="__main__")
    return found


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("form", ["messages", "prompt_completion", "alpaca"])
def test_trl_trains_on_assistant_turns_alone(
    model: Path,
    tmp_path: Path,
    form: str,
    marked: bool,
    student_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if marked:
        monkeypatch.setattr(student_tokenizer, "chat_template", MARKED)
    student_tokenizer.save_pretrained(tmp_path / "model")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "model" / name).write_bytes((model / name).read_bytes())
    run = two_sources()
    for i, row in enumerate(run.rows):
        talk = [user(f"Who {i}?"), assistant(f"Ada {i}."), user(f"When {i}?"), assistant(f"In {i}")]
        system = [{"role": "system", "content": f"Be short, {i}."}] if i % 2 else []
        row["messages"], row["messages_reflected"] = system + talk[(i % 3 == 0) * 2 :], None
    outcome = run.emit(str(tmp_path / "run"), budget_rows=12, format=form)
    written(outcome, str(tmp_path / "set"))
    of = {row["id"]: row["messages"] for row in run.rows}
    wanted: Counter[str] = Counter()
    for line in read(outcome):
        turns = [turn["content"] for turn in of[line["id"]] if turn["role"] == "assistant"]
        wanted.update(
            f"{text}<|im_end|>\n" for text in turns[-1 if form == "prompt_completion" else 0 :]
        )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    found = losses(tmp_path / "set", tmp_path / "model", tmp_path / "out", "default", monkeypatch)
    assert found == wanted


def test_trl_trains_on_what_a_prefix_holds(
    model: Path, tmp_path: Path, student_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    from stages.rows import LABEL

    run = two_sources()
    prompt, solution = (student_tokenizer(text)["input_ids"] for text in ("Two and two?", " Four."))
    run.column("prefix_kind", LABEL, ["prefix", "full"])
    run.column("prefix_prompt_ids", pa.list_(pa.int32()), [prompt])
    run.column("prefix_ids", pa.list_(pa.int32()), [solution[:1], solution])
    run.column("prefix_text", pa.string(), ["Four"])
    run.column("prefix_sampled_tokens", pa.int32(), [1, len(solution)])
    outcome = run.emit(str(tmp_path / "run"), budget_rows=12)
    written(outcome, str(tmp_path / "set"))
    kinds = Counter(line["kind"] for line in read(outcome, "prefix"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    found = losses(tmp_path / "set", model, tmp_path / "out", "prefix", monkeypatch)
    texts = {
        kind: student_tokenizer.decode(ids)
        for kind, ids in (("prefix", solution[:1]), ("full", solution))
    }
    assert found == {texts[kind]: count for kind, count in kinds.items()}
