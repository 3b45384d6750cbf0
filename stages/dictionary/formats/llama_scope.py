r"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`.

It was trained on activations scaled by one number of the data set, and gated by latents scaled by
the norms of their decoder rows. Its authors fold both at inference:

.. math:: s = \sqrt d \,/\, \mathrm{E}\lVert x \rVert, \qquad
    a_j = \lVert w_j \rVert \left( (W_E x)_j + b_{E,j} / s \right), \qquad
    z_j = a_j [a_j > \theta], \qquad
    \hat x = \sum_j z_j \, w_j / \lVert w_j \rVert + b_D / s

with :math:`w_j` the decoder row of latent `j`. The threshold applies after both.

Source: Llama Scope (arXiv 2410.20526) and OpenMOSS' Language-Model-SAEs,
`standardize_parameters_of_dataset_norm` and `transform_to_unit_decoder_norm`. SAELens 6.54 leaves
the norms out of the gating.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.hooks import block_of_hook
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import agree, assembled_sae, check_names, stated

_CONFIG, _WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
}


def files(folder: Folder, wanted: Wanted) -> list[str]:
    """Names of the files that this format needs."""
    return [_CONFIG, _WEIGHTS]


@torch.no_grad()
def read(folder: Folder, wanted: Wanted) -> Published:
    """The autoencoder.

    Raises:
        ValueError: It can't be read, or is a transcoder.
    """
    cfg = folder.json(_CONFIG)
    d = cfg.get("d_model")
    if type(d) is not int:
        raise ValueError(f"{_CONFIG}: d_model must be an integer, got {d!r}")
    stated(_CONFIG, "act_fn", str(cfg.get("act_fn")).lower(), ("jumprelu", "topk", "relu"))
    stated(_CONFIG, "use_glu_encoder", cfg.get("use_glu_encoder", False), (False,))
    hook = cfg.get("hook_point_in")
    if hook and cfg.get("hook_point_out") not in (None, hook):
        raise ValueError(
            f"{_CONFIG}: it leads from {hook} to {cfg['hook_point_out']}, so it is a transcoder"
        )
    tensors = folder.tensors(_WEIGHTS)
    if cfg.get("use_decoder_bias") is False:
        tensors["decoder.bias"] = tensors["encoder.weight"].new_zeros(d)
    check_names(_WEIGHTS, tensors, _NAMES.values())
    threshold = _threshold(cfg)
    names = dict(_NAMES)
    if threshold is not None:
        tensors["threshold"] = torch.zeros_like(tensors["encoder.bias"])
        names["threshold"] = "threshold"
    k = cfg.get("top_k") if threshold is None and cfg["act_fn"].lower() == "topk" else None
    sae = assembled_sae(names, tensors, encoder_transposed=True, decoder_transposed=True, k=k)
    agree(_CONFIG, "d_model", d, sae.config.d_in)
    agree(_CONFIG, "d_sae", cfg.get("d_sae"), sae.config.d_sae)
    scale = input_scale(cfg)
    sae.b_enc.div_(scale)
    sae.b_dec.div_(scale)
    if not cfg.get("apply_decoder_bias_to_pre_encoder", False):
        sae.fold_decoder_bias()
    if cfg.get("sparsity_include_decoder_norm", True):
        sae.fold_decoder_norm()
    if sae.threshold is not None and threshold is not None:
        sae.threshold.fill_(threshold)
    block = block_of_hook(hook) if hook else None
    return Published(sae, cfg, block, f"{_CONFIG} (hook_point_in {hook})")


def input_scale(cfg: dict[str, Any]) -> float:
    r"""The number that activations were multiplied by in training.

    .. math:: s = \sqrt d \,/\, \mathrm{E}\lVert x \rVert

    Raises:
        ValueError: The mean norm is missing, or activations were scaled token by token.
    """
    kind = cfg.get("norm_activation", "dataset-wise")
    stated(_CONFIG, "norm_activation", kind, ("dataset-wise", "inference"))
    if kind == "inference":
        return 1.0
    norm = (cfg.get("dataset_average_activation_norm") or {}).get("in")
    if not isinstance(norm, int | float) or norm <= 0:
        raise ValueError(f"{_CONFIG}: dataset_average_activation_norm.in must be above 0: {norm!r}")
    return math.sqrt(cfg["d_model"]) / norm


def _threshold(cfg: dict[str, Any]) -> float | None:
    """The common threshold; a top-k one with a threshold became a jumprelu one after training."""
    value = cfg.get("jump_relu_threshold")
    if cfg["act_fn"].lower() == "relu" or (cfg["act_fn"].lower() == "topk" and not value):
        return None
    if not isinstance(value, int | float):
        raise ValueError(f"{_CONFIG}: jump_relu_threshold must be a number, got {value!r}")
    return float(value)
