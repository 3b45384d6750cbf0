"""Published sparse autoencoders as files, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_sparsify(folder: Path, d: int, n: int, *, k: int = 4, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        "encoder.weight": torch.randn(n, d, generator=generator) / d**0.5,
        "encoder.bias": torch.zeros(n),
        "W_dec": torch.randn(n, d, generator=generator) / d**0.5,
        "b_dec": torch.randn(d, generator=generator),
    }
    save_file(weights, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": k, "d_in": d, "num_latents": n}))
