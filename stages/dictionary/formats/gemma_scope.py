"""Gemma Scope (Gemma 2): `params.npz` in `layer_L/width_W/average_l0_X`.

Source: Gemma Scope (arXiv 2408.05147) and SAELens 6.54, `gemma_2_sae_huggingface_loader`: JumpReLU
with a threshold a latent; the decoder bias isn't subtracted before encoding.
"""

from __future__ import annotations

import re

from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import assembled_sae, check_names

_WEIGHTS = "params.npz"
_OTHER_PLACES = re.compile(r"embedding|gemma-scope-.*-(mlp|att|transcoders)")


def files(folder: Folder, wanted: Wanted) -> list[str]:
    """Names of the files that this format needs."""
    return [_WEIGHTS]


def read(folder: Folder, wanted: Wanted) -> Published:
    """The autoencoder.

    Raises:
        ValueError: It can't be read, or reads another place than the residual stream.
    """
    parts = folder.path_parts[-4:]
    for part in parts:
        if _OTHER_PLACES.fullmatch(part):
            raise ValueError(f"{part}: only autoencoders of the residual stream can be used")
    tensors = folder.tensors(_WEIGHTS)
    # Some of its files call the matrices w_enc and w_dec.
    names = {ours: ours for ours in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")} | {
        name.upper()[:1] + name[1:]: name for name in tensors if name in ("w_enc", "w_dec")
    }
    check_names(_WEIGHTS, tensors, names.values())
    sae = assembled_sae(names, tensors, encoder_transposed=False, decoder_transposed=False)
    sae.fold_decoder_bias()
    told = next((found for part in parts if (found := re.fullmatch(r"layer_(\d+)", part))), None)
    return Published(sae, {}, int(told[1]) if told else None, "the folder's path")
