"""OpenAI's autoencoders of GPT-2 small: `{layer}.pt`, a state_dict of torch.save.

Source: OpenAI's sparse_autoencoder, `Autoencoder.from_state_dict`: those with the TopK activation
read layer-normalised input, those with ReLU raw input.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import ConfigDict, Field

from stages.dictionary.formats.fields import Fields, checked_fields
from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import assembled_sae, check_names

_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "latent_bias",
    "W_dec": "decoder.weight",
    "b_dec": "pre_bias",
}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_PLACE = re.compile(r"(resid_post_mlp|resid_post_attn|resid_delta_\w+?|mlp_post_act)(_v\w+)?")


class _Activation(Fields):
    k: int
    postact_fn: Literal["ReLU"]


class _Values(Fields):
    """What isn't a tensor in the state; anything else there would have to be applied."""

    model_config = ConfigDict(extra="forbid")

    activation: Literal["TopK", "ReLU"] = "ReLU"
    activation_state_dict: dict[str, object] = Field(default_factory=dict)


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
    tensors, plain = folder.unpickled(file)
    check_names(file, tensors, _NAMES.values(), _STATISTICS)
    values = checked_fields(file, _Values, plain)
    k = None
    if values.activation == "TopK":
        k = checked_fields(file, _Activation, values.activation_state_dict).k
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
    return Published(
        sae, {"activation": values.activation, "k": k}, block, f"the file's name {file}"
    )
