"""Gemma Scope 2 (Gemma 3): `params.safetensors` and `config.json` in `resid_post…/layer_L_…`.

Source: SAELens 6.54, `gemma_3_sae_huggingface_loader`: JumpReLU with a threshold a latent; the
decoder bias isn't subtracted before encoding.
"""

from __future__ import annotations

from typing import Literal

from stages.dictionary.formats.fields import Fields, checked_fields
from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.hooks import block_of_hook
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import agree, assembled_sae, check_names

_CONFIG, _WEIGHTS = "config.json", "params.safetensors"
_NAMES = {
    "W_enc": "w_enc",
    "W_dec": "w_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
}


class _Config(Fields):
    architecture: Literal["jump_relu"]
    affine_connection: Literal[False] | None = False
    type: Literal["sae"] = "sae"
    hf_hook_point_in: str | None = None
    hf_hook_point_out: str | None = None
    width: int | None = None
    apply_b_dec_to_input: bool | None = False


def files(folder: Folder, wanted: Wanted) -> list[str]:
    """Names of the files that this format needs."""
    return [_CONFIG, _WEIGHTS]


def read(folder: Folder, wanted: Wanted) -> Published:
    """The autoencoder.

    Raises:
        ValueError: It can't be read, or is a transcoder.
    """
    raw = folder.json(_CONFIG)
    cfg = checked_fields(_CONFIG, _Config, raw)
    hook = cfg.hf_hook_point_in
    if hook and cfg.hf_hook_point_out not in (None, hook):
        raise ValueError(f"{_CONFIG}: it leads from {hook} to {cfg.hf_hook_point_out}")
    tensors = folder.tensors(_WEIGHTS)
    check_names(_WEIGHTS, tensors, _NAMES.values())
    sae = assembled_sae(_NAMES, tensors, encoder_transposed=False, decoder_transposed=False)
    if cfg.width is not None:
        agree(_CONFIG, "width", cfg.width, sae.config.d_sae)
    if not cfg.apply_b_dec_to_input:
        sae.fold_decoder_bias()
    block = block_of_hook(hook) if hook else None
    return Published(sae, raw, block, f"{_CONFIG} (hf_hook_point_in {hook})")
