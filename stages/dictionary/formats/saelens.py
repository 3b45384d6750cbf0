"""SAELens: `cfg.json` and `sae_weights.safetensors`, also in the flat form of before 6.0.

Source: SAELens 6.54, `load_from_disk`, `handle_config_defaulting` and `handle_pre_6_0_config`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from stages.dictionary.checkpoint import CONFIG_FILE, WEIGHTS_FILE, sae_from_parts
from stages.dictionary.formats.fields import Fields, checked_fields
from stages.dictionary.formats.folder import Folder
from stages.dictionary.formats.hooks import block_of_hook
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.formats.weights import check_values

_Version = Annotated[str, Field(pattern=r"^\d+(\..*)?$")]


class _Metadata(Fields):
    sae_lens_version: _Version | None = None
    hook_name: str | None = None
    hf_hook_name: str | None = None


class _Kwargs(Fields):
    k: int | None = None


class _Config(Fields):
    """Fields of either form, but those that `sae_from_parts` checks."""

    sae_lens_version: _Version | None = None
    metadata: _Metadata | None = None
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    # The flat form alone.
    architecture: str = "standard"
    activation_fn_str: str | None = None
    activation_fn: str | None = None
    activation_fn_kwargs: _Kwargs | None = None
    normalize_activations: str | bool | None = None
    hook_name: str | None = None
    hook_point: str | None = None


def files(folder: Folder, wanted: Wanted) -> list[str]:
    """Names of the files that this format needs."""
    return [CONFIG_FILE, WEIGHTS_FILE]


def read(folder: Folder, wanted: Wanted) -> Published:
    """The autoencoder.

    Raises:
        ValueError: It can't be read, or not exactly.
    """
    raw = folder.json(CONFIG_FILE)
    fields = checked_fields(CONFIG_FILE, _Config, raw)
    metadata = fields.metadata or _Metadata()
    # SAELens goes by the version, too.
    version = fields.sae_lens_version or metadata.sae_lens_version
    current = version is not None and int(version.split(".")[0]) >= 6
    cfg = raw if current else _of_flat(raw, fields)
    weights = folder.tensors(WEIGHTS_FILE)
    check_values(weights)
    factor = weights.pop("scaling_factor", None)
    if factor is not None and not factor.is_meta and not bool((factor == 1).all()):
        raise ValueError(
            f"{WEIGHTS_FILE}: scaling_factor isn't 1; SAELens 6 reads no fine-tuned scaling either"
        )
    # Gated ones have no b_enc; SAELens before 6 wrote one all the same.
    if cfg.get("architecture") == "gated":
        weights.pop("b_enc", None)
    sae = sae_from_parts(cfg, weights, activation_scale=wanted.activation_scale)
    hook = metadata.hook_name or metadata.hf_hook_name if current else _flat_hook(fields)
    block = block_of_hook(hook) if hook else None
    return Published(sae, raw, block, f"{CONFIG_FILE} (hook_name {hook})")


def _flat_hook(fields: _Config) -> str:
    return fields.hook_name or fields.hook_point or ""


def _of_flat(raw: dict[str, Any], fields: _Config) -> dict[str, Any]:
    """A flat configuration in the present form."""
    activation = fields.activation_fn_str or fields.activation_fn or "relu"
    k = fields.activation_fn_kwargs.k if fields.activation_fn_kwargs else None
    architecture = fields.architecture
    if activation == "topk" and k is not None:
        architecture = "topk"
    elif activation not in ("relu", "topk"):
        raise ValueError(f"{CONFIG_FILE}: activation_fn = {activation!r} can't be read, only relu")
    normalisation = fields.normalize_activations
    if isinstance(normalisation, bool):
        normalisation = "expected_average_only_in" if normalisation else "none"
    return {
        "architecture": architecture,
        "d_in": raw.get("d_in"),
        "d_sae": raw.get("d_sae"),
        "k": k,
        "apply_b_dec_to_input": fields.apply_b_dec_to_input,
        "normalize_activations": normalisation,
        "reshape_activations": "hook_z" if "hook_z" in _flat_hook(fields) else "none",
    }
