"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder named after the hook point.

Source: eai-sparsify 1.3.3, `SparseCoder.load_from_disk` and `encode`: x - b_dec, ReLU, top-k. Older
releases call a folder `layer_L` for the *input* of block L (`hidden_states[L]`).
"""

from __future__ import annotations

import re
from typing import Literal

from stages.dictionary.formats.fields import Fields, checked_fields
from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.hooks import block_before, block_of_hook
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import agree, assembled_sae, check_names

_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"
_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}


class _Config(Fields):
    d_in: int
    k: int
    num_latents: int | None = 0
    expansion_factor: int = 0
    activation: Literal["topk"] = "topk"
    # Signed ones keep the largest by absolute value, and codes are then negative too.
    signed: Literal[False] = False
    transcode: Literal[False] = False
    skip_connection: Literal[False] = False


def files(folder: Folder, wanted: Wanted) -> list[str]:
    """Names of the files that this format needs."""
    return [_CONFIG, _WEIGHTS]


def read(folder: Folder, wanted: Wanted) -> Published:
    """The autoencoder.

    Raises:
        ValueError: It can't be read, or not exactly.
    """
    raw = folder.json(_CONFIG)
    cfg = checked_fields(_CONFIG, _Config, raw)
    tensors = folder.tensors(_WEIGHTS)
    check_names(_WEIGHTS, tensors, _NAMES.values())
    sae = assembled_sae(_NAMES, tensors, encoder_transposed=True, decoder_transposed=False, k=cfg.k)
    agree(_CONFIG, "d_in", cfg.d_in, sae.config.d_in)
    if cfg.num_latents:
        agree(_CONFIG, "num_latents", cfg.num_latents, sae.config.d_sae)
    elif "expansion_factor" in cfg.model_fields_set:
        factor = cfg.expansion_factor
        agree(_CONFIG, "d_in * expansion_factor", cfg.d_in * factor, sae.config.d_sae)
    name = folder.path_parts[-1]
    return Published(sae, raw, _block(name), f"the folder's name {name}")


def _block(folder: str) -> int | None:
    """The block that a folder's name tells; None where it was given another name."""
    if old := re.fullmatch(r"layer_(\d+)", folder):
        return block_before(int(old[1]), f"{folder} (sparsify's old name of an input)")
    if folder == "embed_tokens" or re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.\d+(?:\.\w+)*", folder):
        return block_of_hook(folder)
    return None
