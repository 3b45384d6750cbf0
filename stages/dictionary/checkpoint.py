"""Sparse autoencoders as bytes, in the on-disk format of SAELens 6 and later.

A checkpoint is two files, ``cfg.json`` and ``sae_weights.safetensors``. This module does no I/O
and reads no pickles.

Source: SAELens 6.54, ``SAE.save_model`` and ``SAE.load_from_disk``.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stages.dictionary.sae import SparseAutoencoder, SparseAutoencoderConfig

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
    cfg: dict[str, Any] = {
        "architecture": sae.config.architecture,
        "d_in": sae.config.d_in,
        "d_sae": sae.config.d_sae,
        "dtype": dtype,
        # Where a reader should put it, not where it was trained.
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": FORMAT_VERSION} | dict(metadata),
    }
    if sae.config.architecture == "topk":
        cfg |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    text = json.dumps(cfg, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    weights = {name: value.cpu().contiguous() for name, value in sae.state_dict().items()}
    return {CONFIG_FILE: (text + "\n").encode(), WEIGHTS_FILE: save(weights)}


def sae_from_bytes(files: Mapping[str, bytes]) -> SparseAutoencoder:
    """Read an autoencoder back, on the CPU in the dtype that its configuration names.

    Two conventions of other authors are folded into the weights, which keeps the codes:
    ``apply_b_dec_to_input`` false becomes ``b_enc + b_dec W_enc``, and a top-k by
    ``rescale_acts_by_decoder_norm`` becomes a unit-norm decoder.

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
    config = _autoencoder_config(cfg)
    try:
        weights = load(files[WEIGHTS_FILE])
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_FILE} is not a safetensors file: {error}") from error

    dtype_name = str(cfg.get("dtype", "float32")).removeprefix("torch.")
    if dtype_name not in _DTYPES:
        raise ValueError(f"{CONFIG_FILE}: dtype must be one of {sorted(_DTYPES)}, got {dtype_name}")
    sae = SparseAutoencoder(config, dtype=_DTYPES[dtype_name])
    _check_weights(weights, sae.state_dict(), config)
    sae.load_state_dict(weights)
    with torch.no_grad():
        if not cfg.get("apply_b_dec_to_input", True):
            sae.b_enc.add_(sae.b_dec @ sae.W_enc)
        if cfg.get("rescale_acts_by_decoder_norm", False):
            sae.fold_decoder_norm()
    return sae


def _read_config(content: bytes) -> dict[str, Any]:
    try:
        cfg = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(cfg, dict):
        raise ValueError(f"{CONFIG_FILE} must hold an object, got {type(cfg).__name__}")
    return cfg


def _autoencoder_config(cfg: dict[str, Any]) -> SparseAutoencoderConfig:
    architecture = cfg.get("architecture")
    if architecture not in ("topk", "jumprelu"):
        raise ValueError(
            f"{CONFIG_FILE}: architecture must be 'topk' or 'jumprelu', got {architecture!r}"
        )
    for key in ("normalize_activations", "reshape_activations"):
        if cfg.get(key, "none") != "none":
            raise ValueError(f"{CONFIG_FILE}: {key} = {cfg[key]!r} is not supported, only 'none'")
    sizes = ("d_in", "d_sae", "k") if architecture == "topk" else ("d_in", "d_sae")
    for key in sizes:
        if type(cfg.get(key)) is not int:
            raise ValueError(f"{CONFIG_FILE}: {key} must be an integer, got {cfg.get(key)!r}")
    k = cfg["k"] if architecture == "topk" else None
    return SparseAutoencoderConfig(cfg["d_in"], cfg["d_sae"], architecture, k)


def _check_weights(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    config: SparseAutoencoderConfig,
) -> None:
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
        if not weights[name].is_floating_point():
            raise ValueError(f"{WEIGHTS_FILE}: {name} has dtype {weights[name].dtype}, not a float")
