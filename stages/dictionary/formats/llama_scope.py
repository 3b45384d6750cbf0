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
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveInt

from stages.dictionary.formats.fields import Fields, checked_fields
from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.hooks import block_of_hook
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import agree, assembled_sae, check_names

_CONFIG, _WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
}


def _lower(name: object) -> object:
    return name.lower() if isinstance(name, str) else name


class _Norms(Fields):
    input: float = Field(alias="in", gt=0)


class _Config(Fields):
    d_model: PositiveInt
    d_sae: int
    act_fn: Annotated[Literal["jumprelu", "topk", "relu"], BeforeValidator(_lower)]
    jump_relu_threshold: float | None = None
    top_k: int | None = None
    use_glu_encoder: Literal[False] = False
    use_decoder_bias: bool = True
    apply_decoder_bias_to_pre_encoder: bool = False
    sparsity_include_decoder_norm: bool = True
    norm_activation: Literal["dataset-wise", "inference"] = "dataset-wise"
    dataset_average_activation_norm: _Norms | None = None
    hook_point_in: str | None = None
    hook_point_out: str | None = None


def files(folder: Folder, wanted: Wanted) -> list[str]:
    """Names of the files that this format needs."""
    return [_CONFIG, _WEIGHTS]


@torch.no_grad()
def read(folder: Folder, wanted: Wanted) -> Published:
    """The autoencoder.

    Raises:
        ValueError: It can't be read, or is a transcoder.
    """
    raw = folder.json(_CONFIG)
    cfg = checked_fields(_CONFIG, _Config, raw)
    hook = cfg.hook_point_in
    if hook and cfg.hook_point_out not in (None, hook):
        raise ValueError(
            f"{_CONFIG}: it leads from {hook} to {cfg.hook_point_out}, so it is a transcoder"
        )
    tensors = folder.tensors(_WEIGHTS)
    if not cfg.use_decoder_bias and "encoder.weight" in tensors:
        tensors["decoder.bias"] = tensors["encoder.weight"].new_zeros(cfg.d_model)
    check_names(_WEIGHTS, tensors, _NAMES.values())
    threshold = _threshold(cfg)
    names = dict(_NAMES)
    if threshold is not None:
        tensors["threshold"] = torch.zeros_like(tensors["encoder.bias"])
        names["threshold"] = "threshold"
    k = cfg.top_k if threshold is None and cfg.act_fn == "topk" else None
    sae = assembled_sae(names, tensors, encoder_transposed=True, decoder_transposed=True, k=k)
    agree(_CONFIG, "d_model", cfg.d_model, sae.config.d_in)
    agree(_CONFIG, "d_sae", cfg.d_sae, sae.config.d_sae)
    scale = _input_scale(cfg)
    sae.b_enc.div_(scale)
    sae.b_dec.div_(scale)
    if not cfg.apply_decoder_bias_to_pre_encoder:
        sae.fold_decoder_bias()
    if cfg.sparsity_include_decoder_norm:
        sae.fold_decoder_norm()
    if sae.threshold is not None and threshold is not None:
        sae.threshold.fill_(threshold)
    block = block_of_hook(hook) if hook else None
    return Published(sae, raw, block, f"{_CONFIG} (hook_point_in {hook})")


def _input_scale(cfg: _Config) -> float:
    r"""The number that activations were multiplied by in training.

    .. math:: s = \sqrt d \,/\, \mathrm{E}\lVert x \rVert

    Raises:
        ValueError: The mean norm is missing.
    """
    if cfg.norm_activation == "inference":
        return 1.0
    if cfg.dataset_average_activation_norm is None:
        raise ValueError(f"{_CONFIG}: dataset_average_activation_norm: missing; it has to be given")
    return math.sqrt(cfg.d_model) / cfg.dataset_average_activation_norm.input


def _threshold(cfg: _Config) -> float | None:
    """The common threshold; a top-k one with a threshold became a jumprelu one after training."""
    if cfg.act_fn == "relu" or (cfg.act_fn == "topk" and not cfg.jump_relu_threshold):
        return None
    if cfg.jump_relu_threshold is None:
        raise ValueError(f"{_CONFIG}: jump_relu_threshold: missing; it has to be given")
    return cfg.jump_relu_threshold
