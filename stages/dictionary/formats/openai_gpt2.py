"""OpenAI's autoencoders of GPT-2 small: `{layer}.pt`, a state_dict of torch.save.

Source: OpenAI's sparse_autoencoder, `Autoencoder.from_state_dict`: those with the TopK activation
read layer-normalised input, those with ReLU raw input.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import assembled_sae, check_names, stated

_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "latent_bias",
    "W_dec": "decoder.weight",
    "b_dec": "pre_bias",
}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_PLACE = re.compile(r"(resid_post_mlp|resid_post_attn|resid_delta_\w+?|mlp_post_act)(_v\w+)?")


def files(folder: Folder, wanted: Wanted) -> list[str]:
    """Names of the files that this format needs: that of the layer, else the only one."""
    found = [name for name in folder.store.names() if name.endswith(".pt")]
    return found if len(found) == 1 else [f"{wanted.layer}.pt"]


def read(folder: Folder, wanted: Wanted) -> Published:
    """The autoencoder.

    Raises:
        ValueError: It can't be read, or reads another place than the residual stream.
    """
    for part in folder.path_parts:
        if (place := _PLACE.fullmatch(part)) and place[1] != "resid_post_mlp":
            raise ValueError(f"{part}: only autoencoders of resid_post_mlp can be used")
    (file,) = files(folder, wanted)
    state = folder.unpickled(file)
    activation = state.pop("activation", "ReLU")
    settings = state.pop("activation_state_dict", {})
    tensors: dict[str, Tensor] = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    check_names(file, state, _NAMES.values(), _STATISTICS)
    stated(file, "activation", activation, ("TopK", "ReLU"))
    k = _k(file, settings) if activation == "TopK" else None
    sae = assembled_sae(
        _NAMES,
        tensors,
        encoder_transposed=True,
        decoder_transposed=True,
        k=k,
        normalisation="none" if k is None else "layer_norm",
    )
    stem = file.removesuffix(".pt")
    block = int(stem) if stem.isdecimal() else None
    return Published(sae, {"activation": activation, "k": k}, block, f"the file's name {file}")


def _k(file: str, settings: dict[str, Any]) -> int:
    stated(file, "postact_fn", settings.get("postact_fn"), ("ReLU",))
    k = settings.get("k")
    if not isinstance(k, int):
        raise ValueError(f"{file}: k must be an integer, got {k!r}")
    return k
