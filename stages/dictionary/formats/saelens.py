"""SAELens: `cfg.json` and `sae_weights.safetensors`, also in the flat form of before 6.0.

Source: SAELens 6.54, `load_from_disk`, `handle_config_defaulting` and `handle_pre_6_0_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.dictionary.checkpoint import CONFIG_FILE, WEIGHTS_FILE, sae_from_parts
from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.hooks import block_of_hook
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import check_finite


def files(folder: Folder, wanted: Wanted) -> list[str]:
    """Names of the files that this format needs."""
    return [CONFIG_FILE, WEIGHTS_FILE]


def read(folder: Folder, wanted: Wanted) -> Published:
    """The autoencoder.

    Raises:
        ValueError: It can't be read, or not exactly.
    """
    raw = folder.json(CONFIG_FILE)
    cfg = raw if _is_current(raw) else _of_flat(raw)
    weights = folder.tensors(WEIGHTS_FILE)
    check_finite(weights)
    factor = weights.pop("scaling_factor", None)
    if factor is not None and not factor.is_meta and not bool((factor == 1).all()):
        raise ValueError(
            f"{WEIGHTS_FILE}: scaling_factor isn't 1; SAELens 6 reads no fine-tuned scaling either"
        )
    # Gated ones have no b_enc; SAELens before 6 wrote one all the same.
    if cfg.get("architecture") == "gated":
        weights.pop("b_enc", None)
    sae = sae_from_parts(cfg, weights, activation_scale=wanted.activation_scale)
    metadata = cfg.get("metadata") or {}
    hook = metadata.get("hook_name") or metadata.get("hf_hook_name")
    block = block_of_hook(hook) if hook else None
    return Published(sae, raw, block, f"{CONFIG_FILE} (hook_name {hook})")


def _is_current(cfg: Mapping[str, Any]) -> bool:
    """Whether it is in the form of 6.0 and later: SAELens goes by the version in it."""
    version = cfg.get("sae_lens_version") or (cfg.get("metadata") or {}).get("sae_lens_version")
    return bool(version) and int(str(version).split(".")[0]) >= 6


def _of_flat(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A flat configuration in the present form."""
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    k = (cfg.get("activation_fn_kwargs") or {}).get("k")
    architecture = cfg.get("architecture", "standard")
    if activation == "topk" and k is not None:
        architecture = "topk"
    elif activation not in ("relu", "topk"):
        raise ValueError(f"{CONFIG_FILE}: activation_fn = {activation!r} can't be read, only relu")
    normalisation = cfg.get("normalize_activations")
    if isinstance(normalisation, bool):
        normalisation = "expected_average_only_in" if normalisation else "none"
    hook = cfg.get("hook_name") or cfg.get("hook_point") or ""
    return {
        "architecture": architecture,
        "d_in": cfg.get("d_in"),
        "d_sae": cfg.get("d_sae"),
        "k": k,
        "apply_b_dec_to_input": cfg.get("apply_b_dec_to_input", True),
        "normalize_activations": normalisation,
        "reshape_activations": "hook_z" if "hook_z" in hook else "none",
        "metadata": {"hook_name": hook},
    }
