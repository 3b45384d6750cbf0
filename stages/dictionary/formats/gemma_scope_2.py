"""Gemma Scope 2 (Gemma 3): `params.safetensors` and `config.json` in `resid_post…/layer_L_…`.

Source: SAELens 6.54, `gemma_3_sae_huggingface_loader`: JumpReLU with a threshold a latent; the
decoder bias isn't subtracted before encoding.
"""

from __future__ import annotations

from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.hooks import block_of_hook
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import agree, assembled_sae, check_names, stated

_CONFIG, _WEIGHTS = "config.json", "params.safetensors"
_NAMES = {
    "W_enc": "w_enc",
    "W_dec": "w_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
}


def files(folder: Folder, wanted: Wanted) -> list[str]:
    """Names of the files that this format needs."""
    return [_CONFIG, _WEIGHTS]


def read(folder: Folder, wanted: Wanted) -> Published:
    """The autoencoder.

    Raises:
        ValueError: It can't be read, or is a transcoder.
    """
    cfg = folder.json(_CONFIG)
    stated(_CONFIG, "architecture", cfg.get("architecture"), ("jump_relu",))
    stated(_CONFIG, "affine_connection", cfg.get("affine_connection", False), (False, None))
    stated(_CONFIG, "type", cfg.get("type", "sae"), ("sae",))
    hook = cfg.get("hf_hook_point_in")
    if hook and cfg.get("hf_hook_point_out") not in (None, hook):
        raise ValueError(f"{_CONFIG}: it leads from {hook} to {cfg['hf_hook_point_out']}")
    tensors = folder.tensors(_WEIGHTS)
    check_names(_WEIGHTS, tensors, _NAMES.values())
    sae = assembled_sae(_NAMES, tensors, encoder_transposed=False, decoder_transposed=False)
    if "width" in cfg:
        agree(_CONFIG, "width", cfg["width"], sae.config.d_sae)
    if not cfg.get("apply_b_dec_to_input", False):
        sae.fold_decoder_bias()
    block = block_of_hook(hook) if hook else None
    return Published(sae, cfg, block, f"{_CONFIG} (hf_hook_point_in {hook})")
