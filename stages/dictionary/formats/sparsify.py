"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder named after the hook point.

Source: eai-sparsify 1.3.3, `SparseCoder.load_from_disk` and `encode`: x - b_dec, ReLU, top-k. Older
releases call a folder `layer_L` for the *input* of block L (`hidden_states[L]`).
"""

from __future__ import annotations

import re

from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.hooks import block_before, block_of_hook
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import agree, assembled_sae, check_names, stated

_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"
_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}


def files(folder: Folder, wanted: Wanted) -> list[str]:
    """Names of the files that this format needs."""
    return [_CONFIG, _WEIGHTS]


def read(folder: Folder, wanted: Wanted) -> Published:
    """The autoencoder.

    Raises:
        ValueError: It can't be read, or not exactly.
    """
    cfg = folder.json(_CONFIG)
    stated(_CONFIG, "activation", cfg.get("activation", "topk"), ("topk",))
    # Signed ones keep the largest by absolute value, and codes are then negative too.
    for key in ("signed", "transcode", "skip_connection"):
        stated(_CONFIG, key, cfg.get(key, False), (False,))
    tensors = folder.tensors(_WEIGHTS)
    check_names(_WEIGHTS, tensors, _NAMES.values())
    if type(cfg.get("k")) is not int:
        raise ValueError(f"{_CONFIG}: k must be an integer, got {cfg.get('k')!r}")
    sae = assembled_sae(
        _NAMES, tensors, encoder_transposed=True, decoder_transposed=False, k=cfg["k"]
    )
    agree(_CONFIG, "d_in", cfg.get("d_in"), sae.config.d_in)
    if cfg.get("num_latents"):
        agree(_CONFIG, "num_latents", cfg["num_latents"], sae.config.d_sae)
    elif "expansion_factor" in cfg:
        factor = cfg["expansion_factor"]
        agree(_CONFIG, "d_in * expansion_factor", cfg["d_in"] * factor, sae.config.d_sae)
    name = folder.path_parts[-1]
    return Published(sae, cfg, _block(name), f"the folder's name {name}")


def _block(folder: str) -> int | None:
    """The block that a folder's name tells; None where it was given another name."""
    if old := re.fullmatch(r"layer_(\d+)", folder):
        return block_before(int(old[1]), f"{folder} (sparsify's old name of an input)")
    if folder == "embed_tokens" or re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.\d+(?:\.\w+)*", folder):
        return block_of_hook(folder)
    return None
