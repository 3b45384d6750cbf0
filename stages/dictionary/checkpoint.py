"""Sparse autoencoders as bytes, in the on-disk format of SAELens 6 and later.

A checkpoint is two files, ``cfg.json`` and ``sae_weights.safetensors``. This module does no I/O
and reads no pickles.

Source: SAELens 6.54, ``SAE.save_model`` and ``SAE.load_from_disk``.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stages.dictionary.sae import (
    ARCHITECTURES,
    NORMALISATIONS,
    Architecture,
    Normalisation,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    filled_sae,
)

# SAELens takes a file without a version, or with an older one, for its flat format of before 6.0,
# and drops the metadata.
FORMAT_VERSION = "6.0.0"

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_BATCH_TOP_K = ("batchtopk", "matryoshka_batchtopk")
"""Architectures of unfinished trainings; their threshold is ``topk_threshold``, one for all."""
_SCALED = "expected_average_only_in"
"""Normalisation by a number that SAELens keeps outside the file until it is folded in."""


def sae_bytes(sae: SparseAutoencoder, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Serialise an autoencoder; the same input gives the same bytes.

    Args:
        sae: The autoencoder, with all weights of one floating-point dtype.
        metadata: JSON values on where it comes from, such as ``model_name`` and ``hook_name``;
            ``sae_lens_version`` is added if it is absent.

    Returns:
        File name to content.

    Raises:
        ValueError: If the metadata holds a NaN or an infinity, or the dtype has no name here.
        TypeError: If the metadata is not JSON.
    """
    dtype = str(sae.W_dec.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"weights must be one of {sorted(_DTYPES)}, got {dtype}")
    architecture = sae.config.architecture
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.config.d_in,
        "d_sae": sae.config.d_sae,
        "dtype": dtype,
        # Where a reader should put it, not where it was trained.
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": sae.config.normalisation,
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": FORMAT_VERSION} | dict(metadata),
    }
    if architecture == "topk":
        cfg |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    text = json.dumps(cfg, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    weights = {
        _name_in_file(name, architecture): value.cpu().contiguous()
        for name, value in sae.state_dict().items()
    }
    return {CONFIG_FILE: (text + "\n").encode(), WEIGHTS_FILE: save(weights)}


def sae_from_bytes(files: Mapping[str, bytes]) -> SparseAutoencoder:
    """Read an autoencoder back, on the CPU in the dtype that its configuration names.

    Args:
        files: File name to content; other files than the two are ignored.

    Returns:
        The autoencoder.

    Raises:
        ValueError: If a file is missing or malformed, the architecture or a convention is not
            supported, or a weight is missing, unexpected or of the wrong shape.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in files:
            raise ValueError(f"checkpoint has no {name}, only {sorted(files)}")
    cfg = _read_config(files[CONFIG_FILE])
    dtype = str(cfg.get("dtype", "float32")).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"{CONFIG_FILE}: dtype must be one of {sorted(_DTYPES)}, got {dtype}")
    try:
        weights = load(files[WEIGHTS_FILE])
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_FILE} is not a safetensors file: {error}") from error
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"{WEIGHTS_FILE}: {name} has dtype {weight.dtype}, not a float")
    return sae_from_parts(cfg, {name: value.to(_DTYPES[dtype]) for name, value in weights.items()})


@torch.no_grad()
def sae_from_parts(
    cfg: Mapping[str, Any], weights: Mapping[str, Tensor], *, activation_scale: float | None = None
) -> SparseAutoencoder:
    """Build the autoencoder that a configuration and weights of SAELens describe.

    What can be folded into the weights is, in the order in which SAELens does it:
    ``apply_b_dec_to_input`` false (``b_enc + b_dec W_enc``), the scale of activations, a top-k by
    ``rescale_acts_by_decoder_norm`` (a unit-norm decoder). The weights of a BatchTopK training
    become a ``jumprelu`` autoencoder with its one threshold, so that a token's code depends on
    that token alone.

    Args:
        cfg: The configuration, in the form of SAELens 6.
        weights: By their names in the file, of one floating-point dtype; those given may be
            overwritten.
        activation_scale: What activations are multiplied by, where ``normalize_activations`` is
            ``expected_average_only_in``.

    Raises:
        ValueError: If the architecture or a convention is not supported, the scale is missing or
            of no use, or a weight is missing, unexpected or of the wrong shape.
    """
    config = _autoencoder_config(cfg, activation_scale)
    weights = dict(weights)
    batch_threshold = None
    if cfg["architecture"] in _BATCH_TOP_K:
        if "topk_threshold" not in weights:
            raise ValueError(f"{WEIGHTS_FILE}: a {cfg['architecture']} one needs topk_threshold")
        batch_threshold = weights.pop("topk_threshold")
        weights["threshold"] = batch_threshold.new_zeros(config.d_sae)
    _check_weights(weights, config)
    weights["b_enc"] = weights.pop(_name_in_file("b_enc", config.architecture))
    sae = filled_sae(config, weights)
    if not cfg.get("apply_b_dec_to_input", True):
        sae.fold_decoder_bias()
    rescaled = cfg.get("rescale_acts_by_decoder_norm", False)
    if activation_scale is not None:
        sae.fold_input_scale(activation_scale)
        if batch_threshold is not None and rescaled:
            batch_threshold = batch_threshold / activation_scale
    if rescaled:
        sae.fold_decoder_norm()
    if batch_threshold is not None and sae.threshold is not None:
        # It was taken from activations that were scaled by the decoder's norms already.
        sae.threshold.copy_(batch_threshold.expand_as(sae.threshold))
    return sae


def _name_in_file(name: str, architecture: str) -> str:
    return "b_gate" if (name, architecture) == ("b_enc", "gated") else name


def _read_config(content: bytes) -> dict[str, Any]:
    try:
        cfg = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(cfg, dict):
        raise ValueError(f"{CONFIG_FILE} must hold an object, got {type(cfg).__name__}")
    return cfg


def _autoencoder_config(
    cfg: Mapping[str, Any], activation_scale: float | None
) -> SparseAutoencoderConfig:
    architecture = cfg.get("architecture")
    if architecture not in (*ARCHITECTURES, *_BATCH_TOP_K):
        raise ValueError(
            f"{CONFIG_FILE}: architecture must be one of "
            f"{', '.join((*ARCHITECTURES, *_BATCH_TOP_K))}, got {architecture!r}"
        )
    normalisation = cfg.get("normalize_activations") or "none"
    if normalisation not in (*NORMALISATIONS, _SCALED):
        raise ValueError(
            f"{CONFIG_FILE}: normalize_activations must be one of "
            f"{', '.join((*NORMALISATIONS, _SCALED))}, got {normalisation!r}"
        )
    if (normalisation == _SCALED) != (activation_scale is not None):
        raise ValueError(
            f"{CONFIG_FILE}: normalize_activations is {normalisation!r}, so "
            + (
                "activations were multiplied by one number in training, which the file doesn't "
                "hold: give it as activation_scale (sqrt(d_in) / mean norm of the activations)"
                if activation_scale is None
                else f"activation_scale = {activation_scale} has no meaning: leave it out"
            )
        )
    if cfg.get("reshape_activations", "none") != "none":
        raise ValueError(
            f"{CONFIG_FILE}: reshape_activations = {cfg['reshape_activations']!r} is for the heads "
            "of attention; only the residual stream is read"
        )
    for key in ("d_in", "d_sae", "k") if architecture == "topk" else ("d_in", "d_sae"):
        if type(cfg.get(key)) is not int:
            raise ValueError(f"{CONFIG_FILE}: {key} must be an integer, got {cfg.get(key)!r}")
    return SparseAutoencoderConfig(
        cfg["d_in"],
        cfg["d_sae"],
        "jumprelu" if architecture in _BATCH_TOP_K else cast(Architecture, architecture),
        cfg["k"] if architecture == "topk" else None,
        "none" if normalisation == _SCALED else cast(Normalisation, normalisation),
    )


def _check_weights(weights: Mapping[str, Tensor], config: SparseAutoencoderConfig) -> None:
    with torch.device("meta"):
        expected = {
            _name_in_file(name, config.architecture): value
            for name, value in SparseAutoencoder(config).state_dict().items()
        }
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"{WEIGHTS_FILE}: weights of a {config.architecture} autoencoder are "
            f"{sorted(expected)}; missing {sorted(missing)}, unexpected {sorted(unexpected)}"
        )
    for name, value in expected.items():
        found, wanted = tuple(weights[name].shape), tuple(value.shape)
        if found != wanted:
            hint = "; it looks transposed" if found == wanted[::-1] else ""
            raise ValueError(
                f"{WEIGHTS_FILE}: {name} has shape {found}, but d_in = {config.d_in} and "
                f"d_sae = {config.d_sae} need {wanted}{hint}"
            )
