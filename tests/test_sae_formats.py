"""Readers of published autoencoders, against the libraries that wrote them or written-out formulas.

Every file is made here, from random weights, in the layout that its publisher documents.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.dictionary.checkpoint import sae_bytes, sae_from_bytes
from stages.dictionary.formats import (
    FORMATS,
    detected_format,
    file_identities,
    read_published,
)
from stages.dictionary.formats.hooks import block_of_hook
from stages.dictionary.formats.published import Published, Wanted
from stages.dictionary.sae import SparseAutoencoder, SparseAutoencoderConfig
from stages.dictionary.sparse import batch_top_k_entries
from stages.errors import ConfigError
from stages.storage import Store

D, N, K = 12, 40, 5
LAYER = 7


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(shape, generator=generator)


def x_of(*shape: int) -> Tensor:
    """Activations off the origin, of different norms."""
    generator = torch.Generator().manual_seed(5)
    scale = 0.5 + 3 * torch.rand(*shape[:-1], 1, generator=generator)
    return scale * torch.randn(shape, generator=generator) + 0.7


X = x_of(30, D)


def read(folder: Path, form: str | None = None, **wanted: Any) -> Published:
    asked = Wanted(**{"layer": LAYER} | wanted)
    found = detected_format(str(folder), asked)
    assert form in (None, found)
    # Everything but values is checked without reading them, and must come out the same.
    shapes = read_published(str(folder), found, asked, shapes_only=True).sae
    published = read_published(str(folder), found, asked)
    assert shapes.config == published.sae.config
    assert all(weight.is_meta for weight in shapes.state_dict().values())
    return published


def close(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest value: a float32 sum errs by the size of its terms."""
    atol = 1e-5 * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


def write_json(folder: Path, name: str, value: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value))


# SAELens ------------------------------------------------------------------------------------------

NORMALISED = ["none", "layer_norm", "constant_norm_rescale"]
ARCHITECTURES = ["standard", "topk", "jumprelu", "gated"]


def saelens_sae(architecture: str, **settings: Any) -> Any:
    """One of SAELens' own, with random weights."""
    import sae_lens

    kinds = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
    }
    kind, config = kinds[architecture]
    if architecture == "topk":
        settings = {"k": K} | settings
    sae = kind(config(d_in=D, d_sae=N, **settings))
    generator = torch.Generator().manual_seed(11)
    for name, weight in sae.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        weight.data = drawn.abs() if name == "threshold" else drawn
    sae.cfg.metadata.hook_name = f"blocks.{LAYER}.hook_resid_post"
    return sae


@pytest.mark.parametrize("normalisation", NORMALISED)
@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_codes_and_reconstructions_are_the_library_s(
    architecture: str, subtracts: bool, normalisation: str, tmp_path: Path
) -> None:
    oracle = saelens_sae(
        architecture, apply_b_dec_to_input=subtracts, normalize_activations=normalisation
    )
    oracle.save_model(tmp_path)
    sae = read(tmp_path, "saelens").sae
    close(sae.encode(X), oracle.encode(X))
    close(sae(X), oracle(X))
    assert 0 < (sae.encode(X) > 0).float().mean() < 0.9


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_scale_of_the_data_set_is_folded_as_the_library_folds_it(
    architecture: str, tmp_path: Path
) -> None:
    oracle = saelens_sae(architecture, normalize_activations="expected_average_only_in")
    oracle.save_model(tmp_path)
    sae = read(tmp_path, activation_scale=0.3).sae
    oracle.fold_activation_norm_scaling_factor(0.3)
    close(sae.encode(X), oracle.encode(X))
    close(sae(X), oracle(X))
    with pytest.raises(ConfigError, match="give it as activation_scale"):
        read(tmp_path)


def test_saelens_top_k_by_decoder_norm_and_scale_together(tmp_path: Path) -> None:
    oracle = saelens_sae(
        "topk",
        normalize_activations="expected_average_only_in",
        rescale_acts_by_decoder_norm=True,
        apply_b_dec_to_input=False,
    )
    oracle.save_model(tmp_path)
    sae = read(tmp_path, activation_scale=0.3).sae
    oracle.fold_activation_norm_scaling_factor(0.3)
    close(sae.encode(X), oracle.encode(X))
    close(sae(X), oracle(X))


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_saelens_flat_configuration_of_before_6(architecture: str, tmp_path: Path) -> None:
    import sae_lens

    saelens_sae(architecture).save_model(tmp_path)
    flat = {
        "architecture": "standard" if architecture == "topk" else architecture,
        "d_in": D,
        "d_sae": N,
        "dtype": "torch.float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "layer_norm",
        "activation_fn_str": "topk" if architecture == "topk" else "relu",
        "activation_fn_kwargs": {"k": K} if architecture == "topk" else {},
        "hook_point": f"blocks.{LAYER}.hook_resid_post",
        "finetuning_scaling_factor": False,
    }
    write_json(tmp_path, "cfg.json", flat)
    oracle = sae_lens.SAE.load_from_disk(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    save_file(weights | {"scaling_factor": torch.ones(N)}, tmp_path / "sae_weights.safetensors")
    found = read(tmp_path, "saelens")
    close(found.sae.encode(X), oracle.encode(X))
    close(found.sae(X), oracle(X))
    assert found.block == LAYER


@pytest.mark.parametrize("rescaled", [True, False])
def test_weights_of_a_batch_top_k_training_are_read_as_what_it_would_save(
    rescaled: bool, tmp_path: Path
) -> None:
    from sae_lens import SAE
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    torch.manual_seed(0)
    config = BatchTopKTrainingSAEConfig(d_in=D, d_sae=N, k=K, rescale_acts_by_decoder_norm=rescaled)
    trained = BatchTopKTrainingSAE(config)
    for weight in trained.parameters():
        weight.data.normal_()
    trained.topk_threshold.fill_(8.0)
    (tmp_path / "saved").mkdir()
    trained.save_inference_model(tmp_path / "saved")
    folder = tmp_path / "unfinished"
    folder.mkdir()
    save_file(trained.state_dict(), folder / "sae_weights.safetensors")
    cfg = config.to_dict() | {"metadata": {"sae_lens_version": "6.54.0"}}
    write_json(folder, "cfg.json", cfg)
    sae, oracle = read(folder).sae, SAE.load_from_disk(tmp_path / "saved")
    close(sae.encode(X), oracle.encode(X))
    close(sae(X), oracle(X))
    assert 0 < (sae.encode(X) > 0).float().mean() < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "transcoder"}, "architecture must be one of"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations must be one of"),
        ({"reshape_activations": "hook_z"}, "only the residual stream"),
        ({"d_sae": N + 1}, f"d_sae = {N + 1} need"),
    ],
)
def test_saelens_settings_that_can_t_be_followed_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saelens_sae("jumprelu").save_model(tmp_path)
    write_json(tmp_path, "cfg.json", json.loads((tmp_path / "cfg.json").read_text()) | change)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path)


# sparsify -----------------------------------------------------------------------------------------


def sparsify_sae(folder: Path, **settings: Any) -> Any:
    import sparsify

    config = sparsify.SparseCoderConfig(k=K, **settings)
    made = sparsify.SparseCoder(D, config)
    torch.manual_seed(1)
    for weight in made.parameters():
        weight.data.normal_()
    if config.normalize_decoder:
        made.set_decoder_norm_to_unit_norm()
    made.save_to_disk(folder)
    return sparsify.SparseCoder.load_from_disk(folder)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("size", [{"num_latents": N}, {"num_latents": 0, "expansion_factor": 4}])
def test_sparsify_codes_and_reconstructions_are_the_library_s(
    size: dict[str, int], unit: bool, tmp_path: Path
) -> None:
    folder = tmp_path / f"layers.{LAYER}"
    oracle = sparsify_sae(folder, normalize_decoder=unit, **size)
    found = read(folder, "sparsify")
    values, indices, dense = oracle.encode(X)
    close(found.sae.encode(X), torch.zeros_like(dense).scatter(-1, indices, values))
    close(found.sae(X), oracle(X).sae_out)
    assert found.sae.config.d_sae == (size["num_latents"] or D * 4)
    assert found.block == LAYER


@pytest.mark.parametrize(
    ("folder", "block"),
    [("layer_8", 7), ("layers.7", 7), ("h.7", 7), ("model.layers.7", 7), ("mine", None)],
)
def test_sparsify_folder_tells_the_block(folder: str, block: int | None, tmp_path: Path) -> None:
    sparsify_sae(tmp_path / folder, num_latents=N)
    assert read(tmp_path / folder).block == block


@pytest.mark.parametrize("folder", ["layers.7.mlp", "embed_tokens", "layer_0"])
def test_sparsify_of_another_place_is_refused(folder: str, tmp_path: Path) -> None:
    sparsify_sae(tmp_path / folder, num_latents=N)
    with pytest.raises(ConfigError, match="residual stream after a block"):
        read(tmp_path / folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signed": True}, r"signed: Input should be False \(given: True\)"),
        ({"activation": "groupmax"}, "activation: Input should be 'topk'"),
        ({"transcode": True}, "transcode: Input should be False"),
        ({"num_latents": N + 1}, f"num_latents = {N + 1}, but the weights have {N}"),
        ({"d_in": D + 1}, f"d_in = {D + 1}, but the weights have {D}"),
        ({"num_latents": 0, "expansion_factor": 5}, f"= {D * 5}, but the weights have {N}"),
        ({"k": N + 1}, f"1 <= k <= d_sae = {N}"),
        ({"k": None}, "k: Input should be a valid integer"),
    ],
)
def test_sparsify_settings_that_can_t_be_followed_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sparsify_sae(tmp_path, num_latents=N)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    write_json(tmp_path, "cfg.json", cfg | change)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path)


def test_sparsify_with_a_skip_connection_is_refused(tmp_path: Path) -> None:
    sparsify_sae(tmp_path, num_latents=N, skip_connection=True)
    write_json(tmp_path, "cfg.json", {"k": K, "d_in": D, "num_latents": N})
    with pytest.raises(ConfigError, match=r"unexpected \['W_skip'\]"):
        read(tmp_path)


# Gemma Scope --------------------------------------------------------------------------------------


def jump_relu_weights(draw: Callable[..., Tensor], upper: str) -> dict[str, Tensor]:
    return {
        f"{upper}_enc": draw(D, N),
        f"{upper}_dec": draw(N, D),
        "b_enc": draw(N),
        "b_dec": draw(D),
        "threshold": draw(N).abs(),
    }


def jump_relu_by_hand(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """z_j = max(h_j, 0) where h_j > theta_j, h = x W_enc + b_enc, token by token."""
    enc = weights.get("W_enc", weights.get("w_enc"))
    assert enc is not None
    codes = torch.zeros(len(x), N, dtype=torch.float64)
    for t, token in enumerate(x.double()):
        for j in range(N):
            h = float(token @ enc[:, j].double()) + float(weights["b_enc"][j])
            if h > float(weights["threshold"][j]):
                codes[t, j] = max(h, 0.0)
    return codes.float()


@pytest.mark.parametrize("prefix", ["W", "w"])
def test_gemma_scope_is_jump_relu_of_the_raw_input(
    prefix: str, draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / f"layer_{LAYER}" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    weights = jump_relu_weights(draw, prefix)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in weights.items()})
    found = read(folder, "gemma_scope")
    expected = jump_relu_by_hand(weights, X)
    close(found.sae.encode(X), expected)
    close(found.sae(X), expected @ weights[f"{prefix}_dec"] + weights["b_dec"])
    assert found.block == LAYER


def test_gemma_scope_equals_saelens_own_conversion(
    draw: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sae_lens
    from sae_lens.loading import pretrained_sae_loaders as loaders

    name = f"layer_{LAYER}/width_16k/average_l0_71"
    (tmp_path / name).mkdir(parents=True)
    weights = {key: value.numpy() for key, value in jump_relu_weights(draw, "W").items()}
    np.savez(tmp_path / name / "params.npz", **weights)
    # What a download would leave on the disk is there already.
    monkeypatch.setattr(
        loaders,
        "hf_hub_download",
        lambda repo_id, filename, subfolder, force_download: str(tmp_path / subfolder / filename),
    )
    cfg, state, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", name, cfg_overrides={"d_in": D, "d_sae": N}
    )
    oracle = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
    oracle.load_state_dict(state)
    sae = read(tmp_path / name).sae
    close(sae.encode(X), oracle.encode(X))
    close(sae(X), oracle(X))


@pytest.mark.parametrize(
    "place", ["embedding/width_4k/average_l0_6", "gemma-scope-2b-pt-mlp/layer_7/width_16k/a"]
)
def test_gemma_scope_of_another_place_is_refused(
    place: str, draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    (tmp_path / place).mkdir(parents=True)
    weights = {key: value.numpy() for key, value in jump_relu_weights(draw, "W").items()}
    np.savez(tmp_path / place / "params.npz", **weights)
    with pytest.raises(ConfigError, match="only autoencoders of the residual stream"):
        read(tmp_path / place)


def gemma_scope_2(folder: Path, draw: Callable[..., Tensor], **change: Any) -> dict[str, Tensor]:
    weights = jump_relu_weights(draw, "w")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "params.safetensors")
    hook = f"model.layers.{LAYER}.output"
    cfg = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-it",
        "hf_hook_point_in": hook,
        "hf_hook_point_out": hook,
        "width": N,
        "l0": 20,
        "affine_connection": False,
        "type": "sae",
    }
    write_json(folder, "config.json", cfg | change)
    return weights


def test_gemma_scope_2_is_jump_relu_of_the_raw_input(
    draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    weights = gemma_scope_2(tmp_path, draw)
    found = read(tmp_path, "gemma_scope_2")
    expected = jump_relu_by_hand(weights, X)
    close(found.sae.encode(X), expected)
    close(found.sae(X), expected @ weights["w_dec"] + weights["b_dec"])
    assert found.block == LAYER


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topk"}, "architecture: Input should be 'jump_relu'"),
        ({"affine_connection": True}, "affine_connection: Input should be False"),
        ({"hf_hook_point_out": "model.layers.7.mlp"}, "it leads from"),
        ({"hf_hook_point_in": "model.layers.7.self_attn.o_proj.input"}, "it leads from"),
        ({"width": N + 1}, f"width = {N + 1}"),
    ],
)
def test_gemma_scope_2_settings_that_can_t_be_followed_are_refused(
    change: dict[str, Any], message: str, draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    gemma_scope_2(tmp_path, draw, **change)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path)


# Llama Scope --------------------------------------------------------------------------------------


def llama_scope(folder: Path, draw: Callable[..., Tensor], **change: Any) -> Any:
    weights = {
        "encoder.weight": draw(N, D),
        "encoder.bias": draw(N),
        "decoder.weight": draw(D, N),
        "decoder.bias": draw(D),
    }
    hook = f"blocks.{LAYER}.hook_resid_post"
    cfg = {
        "d_model": D,
        "d_sae": N,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.53,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 17.125, "out": 17.125},
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "top_k": K,
        "hook_point_in": hook,
        "hook_point_out": hook,
    } | change
    write_json(folder, "hyperparams.json", cfg)
    (folder / "checkpoints").mkdir(exist_ok=True)
    save_file(weights, folder / "checkpoints" / "final.safetensors")
    return weights, cfg


def llama_scope_by_hand(weights: Any, cfg: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction and activity in training's own space, where input and output are scaled.

    There: h = W_E (s x - b_D if subtracted) + b_E; a latent is scored by h |w_j| (or h), and kept
    by top-k or by the threshold, which stands in the units of unscaled activations.
    """
    s = math.sqrt(D) / cfg["dataset_average_activation_norm"]["in"]
    decoder = weights["decoder.weight"].double()
    shifted = s * x.double()
    if cfg["apply_decoder_bias_to_pre_encoder"]:
        shifted = shifted - weights["decoder.bias"].double()
    h = shifted @ weights["encoder.weight"].double().T + weights["encoder.bias"].double()
    norms = decoder.norm(dim=0) if cfg["sparsity_include_decoder_norm"] else torch.ones(N)
    scores = torch.relu(h * norms)
    if cfg["act_fn"] == "topk":
        kept = scores >= scores.sort(dim=-1, descending=True).values[:, K - 1 : K]
    else:
        kept = scores > s * cfg["jump_relu_threshold"]
    codes = torch.relu(h) * kept
    out = (codes @ decoder.T + weights["decoder.bias"].double()) / s
    return out.float(), codes > 0


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["jumprelu", "topk"])
def test_llama_scope_gates_and_reconstructs_as_in_training(
    act_fn: str, by_norm: bool, subtracts: bool, draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    weights, cfg = llama_scope(
        tmp_path,
        draw,
        act_fn=act_fn,
        jump_relu_threshold=0.0 if act_fn == "topk" else 0.53,
        sparsity_include_decoder_norm=by_norm,
        apply_decoder_bias_to_pre_encoder=subtracts,
    )
    found = read(tmp_path, "llama_scope")
    expected, active = llama_scope_by_hand(weights, cfg, X)
    close(found.sae(X), expected)
    assert torch.equal(found.sae.encode(X) > 0, active)
    if by_norm:
        # Codes are then in the units of the activations.
        close(found.sae.W_dec.norm(dim=-1), torch.ones(N))
    assert found.block == LAYER


def test_llama_scope_thresholds_codes_in_the_units_of_activations(
    draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    llama_scope(tmp_path, draw)
    sae = read(tmp_path).sae
    codes = sae.encode(X).detach()
    assert float(codes[codes > 0].min()) > 0.53
    assert ((sae.activations(X) > 0) & (sae.activations(X) < 0.53)).any()


def test_llama_scope_with_unit_decoder_equals_saelens_own_conversion(
    draw: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then: SAELens leaves the decoder's norms out. Its codes are s times ours."""
    import sae_lens
    from sae_lens.loading import pretrained_sae_loaders as loaders

    weights, cfg = llama_scope(tmp_path / "x", draw)
    weights["decoder.weight"] /= weights["decoder.weight"].norm(dim=0)
    save_file(weights, tmp_path / "x" / "checkpoints" / "final.safetensors")
    monkeypatch.setattr(
        loaders,
        "hf_hub_download",
        lambda repo_id, filename, subfolder="", force_download=False: str(
            tmp_path / subfolder / filename
        ),
    )
    theirs, state, _ = loaders.llama_scope_sae_huggingface_loader(
        "fnlp/x", "x", cfg_overrides={"dtype": "float32"}
    )
    oracle = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(theirs))
    oracle.load_state_dict(state)
    s = math.sqrt(D) / cfg["dataset_average_activation_norm"]["in"]
    oracle.fold_activation_norm_scaling_factor(s)
    sae = read(tmp_path / "x").sae
    close(sae.encode(X), oracle.encode(X) / s)
    close(sae(X), oracle(X))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook_point_out": "blocks.7.hook_mlp_out"}, "transcoder"),
        ({"act_fn": "batchtopk"}, "act_fn: Input should be 'jumprelu', 'topk' or 'relu'"),
        ({"norm_activation": "token-wise"}, "norm_activation: Input should be 'dataset-wise' or"),
        ({"dataset_average_activation_norm": None}, "dataset_average_activation_norm: missing"),
        ({"dataset_average_activation_norm": {"in": 0}}, r"\.in: Input should be greater than 0"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold: missing"),
        ({"d_sae": N + 1}, f"d_sae = {N + 1}"),
        ({"d_model": None}, "d_model: Input should be a valid integer"),
    ],
)
def test_llama_scope_settings_that_can_t_be_followed_are_refused(
    change: dict[str, Any], message: str, draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    llama_scope(tmp_path, draw, **change)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path)


# OpenAI -------------------------------------------------------------------------------------------


def openai_gpt2(folder: Path, draw: Callable[..., Tensor], **change: Any) -> dict[str, Any]:
    state: dict[str, Any] = {
        "pre_bias": draw(D),
        "latent_bias": draw(N),
        "encoder.weight": draw(N, D),
        "decoder.weight": draw(D, N),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
        "latents_activation_frequency": torch.ones(N),
        "latents_mean_square": torch.zeros(N),
        "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    } | change
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"{LAYER}.pt")
    return state


def openai_by_hand(state: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction, one token at a time in float64."""
    top_k = state["activation"] == "TopK"
    codes, outs = [], []
    for token in x.double():
        mean, deviation = 0.0, 1.0
        value = token
        if top_k:
            mean = float(token.sum()) / D
            deviation = math.sqrt(float(((token - mean) ** 2).sum()) / (D - 1))
            value = (token - mean) / (deviation + 1e-5)
        h = state["encoder.weight"].double() @ (value - state["pre_bias"].double())
        h = h + state["latent_bias"].double()
        kept = set(h.argsort(descending=True)[:K].tolist()) if top_k else set(range(N))
        z = torch.tensor([max(float(h[j]), 0.0) if j in kept else 0.0 for j in range(N)]).double()
        out = state["decoder.weight"].double() @ z + state["pre_bias"].double()
        codes.append(z)
        outs.append(out * deviation + mean)
    return torch.stack(codes).float(), torch.stack(outs).float()


@pytest.mark.parametrize("change", [{}, {"activation": "ReLU", "activation_state_dict": {}}])
def test_openai_codes_and_reconstructions_are_those_of_the_formula(
    change: dict[str, Any], draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    state = openai_gpt2(tmp_path, draw, **change)
    found = read(tmp_path, "openai_gpt2")
    codes, outs = openai_by_hand(state, X)
    close(found.sae.encode(X), codes)
    close(found.sae(X), outs)
    assert found.block == LAYER


def test_openai_layer_norm_survives_our_own_format(
    draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    state = openai_gpt2(tmp_path, draw)
    back = sae_from_bytes(sae_bytes(read(tmp_path).sae, {}))
    codes, outs = openai_by_hand(state, X)
    close(back.encode(X), codes)
    close(back(X), outs)
    with pytest.raises(ValueError, match="needs the activations"):
        back.decode(codes)


def test_openai_file_of_the_layer_is_chosen_among_several(
    draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    state = openai_gpt2(tmp_path, draw)
    torch.save({}, tmp_path / "3.pt")
    close(read(tmp_path).sae.b_dec, state["pre_bias"])
    with pytest.raises(ConfigError, match=r"openai_gpt2: 5\.pt"):
        read(tmp_path, layer=5)


class Bomb:
    """A pickle of it calls a function when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


@pytest.mark.parametrize("change", [{"bomb": Bomb()}])
def test_openai_pickle_that_could_run_code_is_refused(
    change: dict[str, Any],
    draw: Callable[..., Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    openai_gpt2(tmp_path, draw, **change)
    with pytest.raises(ConfigError, match="could run code"):
        read(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


def test_openai_of_another_place_is_refused(draw: Callable[..., Tensor], tmp_path: Path) -> None:
    openai_gpt2(tmp_path / "resid_post_attn_v5_32k" / "autoencoders", draw)
    with pytest.raises(ConfigError, match="only autoencoders of resid_post_mlp"):
        read(tmp_path / "resid_post_attn_v5_32k" / "autoencoders")
    openai_gpt2(tmp_path / "resid_post_mlp_v5_32k" / "autoencoders", draw)
    assert read(tmp_path / "resid_post_mlp_v5_32k" / "autoencoders").block == LAYER


# All formats --------------------------------------------------------------------------------------


def flipped_npz(folder: Path, draw: Callable[..., Tensor], turn: Callable[[Tensor], Any]) -> None:
    weights = jump_relu_weights(draw, "W")
    arrays = {k: (turn(v) if v.ndim == 2 else v).numpy() for k, v in weights.items()}
    np.savez(folder / "params.npz", **arrays)


def flipped_llama(folder: Path, draw: Callable[..., Tensor], turn: Callable[[Tensor], Any]) -> None:
    weights, _ = llama_scope(folder, draw)
    turned = {k: turn(v).contiguous() if v.ndim == 2 else v for k, v in weights.items()}
    save_file(turned, folder / "checkpoints" / "final.safetensors")


def flipped_sparsify(
    folder: Path, draw: Callable[..., Tensor], turn: Callable[[Tensor], Any]
) -> None:
    write_json(folder, "cfg.json", {"k": K, "d_in": D, "num_latents": 0})
    weights = {"encoder.weight": draw(N, D), "encoder.bias": draw(N)}
    weights |= {"W_dec": draw(N, D), "b_dec": draw(D)}
    turned = {k: turn(v).contiguous() if v.ndim == 2 else v for k, v in weights.items()}
    save_file(turned, folder / "sae.safetensors")


@pytest.mark.parametrize("write", [flipped_npz, flipped_llama, flipped_sparsify])
def test_orientation_is_told_by_shape(write: Callable[..., None], tmp_path: Path) -> None:
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    saes = []
    for generator, turn in zip(generators, (lambda w: w, lambda w: w.T), strict=True):
        folder = tmp_path / str(len(saes))
        folder.mkdir()
        write(folder, lambda *shape, g=generator: torch.randn(shape, generator=g), turn)
        saes.append(read(folder).sae)
    assert torch.equal(saes[0](X), saes[1](X))
    assert saes[0].W_enc.shape == (D, N)


def test_square_weights_are_read_as_the_format_documents_them(tmp_path: Path) -> None:
    import sparsify

    oracle = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=K, num_latents=D))
    for weight in oracle.parameters():
        weight.data.normal_()
    oracle.save_to_disk(tmp_path)
    close(read(tmp_path).sae(X), oracle(X).sae_out)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalisation", NORMALISED)
def test_our_own_files_round_trip_and_open_in_saelens(
    architecture: str, normalisation: str, tmp_path: Path
) -> None:
    import sae_lens

    saelens_sae(architecture, normalize_activations=normalisation).save_model(tmp_path / "theirs")
    sae = read(tmp_path / "theirs").sae
    (tmp_path / "ours").mkdir()
    files = sae_bytes(sae, {"hook_name": f"blocks.{LAYER}.hook_resid_post"})
    for name, data in files.items():
        (tmp_path / "ours" / name).write_bytes(data)
    back = read(tmp_path / "ours", "saelens").sae
    assert torch.equal(back(X), sae(X))
    assert sae_bytes(back, {}) == sae_bytes(sae, {})
    oracle = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    close(sae.encode(X), oracle.encode(X))
    close(sae(X), oracle(X))


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
@pytest.mark.parametrize("normalisation", NORMALISED)
def test_decoder_norms_folded_into_codes_leave_the_reconstruction(
    architecture: str, normalisation: str, tmp_path: Path
) -> None:
    saelens_sae(architecture, normalize_activations=normalisation).save_model(tmp_path)
    sae, folded = read(tmp_path).sae, read(tmp_path).sae
    folded.fold_decoder_norm()
    torch.testing.assert_close(folded(X), sae(X), rtol=1e-4, atol=1e-4)
    close(folded.encode(X), sae.encode(X) * sae.W_dec.norm(dim=-1))


def test_jump_relu_keeps_no_latent_at_its_threshold() -> None:
    sae = SparseAutoencoder(SparseAutoencoderConfig(2, 3, "jumprelu"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
        assert sae.threshold is not None
        sae.threshold.copy_(torch.tensor([0.5, 0.25, -1.0]))
    codes = sae.encode(torch.tensor([[0.5, 9.0], [0.25, 9.0], [-0.5, 9.0]]))
    assert codes.tolist() == [[0, 0.5, 0.5], [0, 0, 0.25], [0, 0, 0]]


def test_batch_top_k_read_as_a_threshold_doesn_t_depend_on_the_batch(tmp_path: Path) -> None:
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    torch.manual_seed(0)
    trained = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=N, k=K))
    for weight in trained.parameters():
        weight.data.normal_()
    trained.topk_threshold.fill_(8.0)
    trained.save_inference_model(tmp_path)
    sae = read(tmp_path).sae
    assert 0 < (sae.encode(X) > 0).float().mean() < 0.5
    alone = torch.cat([sae.encode(token[None]) for token in X])
    close(sae.encode(X), alone)
    # BatchTopK itself would: its codes change with the company.
    dense = sae.activations(X)

    def kept(codes: torch.Tensor) -> torch.Tensor:
        tokens, latents, values = batch_top_k_entries(codes, K)
        return torch.zeros_like(codes).index_put((tokens, latents), values)

    batch = kept(dense)
    single = torch.cat([kept(token[None]) for token in dense])
    assert not torch.equal(batch, single)


@pytest.mark.parametrize(
    ("hook", "block"),
    [
        ("blocks.7.hook_resid_post", 7),
        ("blocks.8.hook_resid_pre", 7),
        ("model.layers.7", 7),
        ("model.layers.7.output", 7),
        ("model.language_model.layers.7.output", 7),
        ("transformer.h.7", 7),
        ("gpt_neox.layers.7", 7),
    ],
)
def test_names_of_a_place_are_one_block(hook: str, block: int) -> None:
    assert block_of_hook(hook) == block


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.0.hook_resid_pre",
        "blocks.7.hook_resid_mid",
        "blocks.7.hook_mlp_out",
        "blocks.7.attn.hook_z",
        "hook_embed",
        "model.layers.7.self_attn.o_proj.input",
    ],
)
def test_names_of_other_places_are_refused(hook: str) -> None:
    with pytest.raises(ValueError, match="residual stream after a block"):
        block_of_hook(hook)


@pytest.mark.parametrize(
    ("hook", "layer", "right"),
    [("blocks.7.hook_resid_pre", 7, 6), ("blocks.7.hook_resid_post", 8, 7)],
)
def test_layer_that_contradicts_the_file_is_answered_with_the_right_one(
    hook: str, layer: int, right: int, tmp_path: Path
) -> None:
    sae = saelens_sae("jumprelu")
    sae.cfg.metadata.hook_name = hook
    sae.save_model(tmp_path)
    message = rf"{hook}.*block {right}, .*hidden_states\[{right + 1}\]: set .* to {right}"
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, layer=layer)
    assert read(tmp_path, layer=right).block == right


def test_format_is_asked_for_where_two_fit_and_told_where_none_does(
    draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"known format .*saelens: cfg.json.*there is nothing"):
        detected_format(str(tmp_path), Wanted(LAYER))
    llama_scope(tmp_path, draw)
    openai_gpt2(tmp_path, draw)
    with pytest.raises(ConfigError, match="llama_scope and openai_gpt2"):
        detected_format(str(tmp_path), Wanted(LAYER))
    with pytest.raises(ConfigError, match=r"lacks cfg\.json, sae\.safetensors, which .* sparsify"):
        file_identities(str(tmp_path), "sparsify", Wanted(LAYER))


def test_scale_is_refused_where_files_tell_it(draw: Callable[..., Tensor], tmp_path: Path) -> None:
    llama_scope(tmp_path / "a", draw)
    with pytest.raises(ConfigError, match="llama_scope don't: leave it out"):
        read(tmp_path / "a", activation_scale=2.0)
    saelens_sae("topk").save_model(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"activation_scale = 2\.0 has no meaning"):
        read(tmp_path / "b", activation_scale=2.0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("params.safetensors", b"\x80\x04K\x01."),
        ("params.safetensors", b"\xff" * 64),
        ("params.safetensors", b""),
        ("config.json", b"[1]"),
        ("config.json", b'{"l0": NaN}'),
        ("config.json", b"\xff"),
    ],
)
def test_damaged_file_is_named(
    name: str, content: bytes, draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    gemma_scope_2(tmp_path, draw)
    (tmp_path / name).write_bytes(content)
    for shapes_only in (True, False):
        with pytest.raises(ConfigError, match=name):
            read_published(str(tmp_path), "gemma_scope_2", Wanted(LAYER), shapes_only=shapes_only)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("shapes_only", [True, False])
def test_half_of_a_file_is_refused_and_the_early_check_says_what_to_do(
    shapes_only: bool, draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    gemma_scope_2(tmp_path, draw)
    whole = (tmp_path / "params.safetensors").stat().st_size
    cut_short(tmp_path / "params.safetensors")
    message = rf"params\.safetensors .* {whole - 1000} bytes.* tells of {whole}: fetch it again"
    with pytest.raises(ConfigError, match=message if shapes_only else r"params\.safetensors"):
        read_published(str(tmp_path), "gemma_scope_2", Wanted(LAYER), shapes_only=shapes_only)


def saelens_flat(folder: Path, **change: Any) -> None:
    saelens_sae("jumprelu").save_model(folder)
    write_json(folder, "cfg.json", {"architecture": "jumprelu", "d_in": D, "d_sae": N} | change)


def saelens_metadata(folder: Path, **change: Any) -> None:
    saelens_sae("jumprelu").save_model(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    write_json(folder, "cfg.json", cfg | {"metadata": cfg["metadata"] | change})


def sparsify_file(folder: Path, **change: Any) -> None:
    sparsify_sae(folder, num_latents=N)
    cfg = json.loads((folder / "cfg.json").read_text())
    write_json(folder, "cfg.json", cfg | change)


def gemma_2(folder: Path, **change: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    gemma_scope_2(folder, lambda *shape: torch.randn(shape, generator=generator), **change)


def openai(folder: Path, **change: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    openai_gpt2(folder, lambda *shape: torch.randn(shape, generator=generator), **change)


@pytest.mark.parametrize(
    ("form", "write", "change", "message"),
    [
        ("saelens", saelens_flat, {"metadata": [1]}, r"cfg\.json .*metadata: Input should be a "),
        ("saelens", saelens_flat, {"metadata": "x"}, "metadata: Input should be a valid dict"),
        ("saelens", saelens_flat, {"hook_name": 5}, "hook_name: Input should be a valid string"),
        ("saelens", saelens_flat, {"activation_fn_kwargs": "x"}, "activation_fn_kwargs: Input"),
        ("saelens", saelens_flat, {"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input: Input"),
        ("saelens", saelens_flat, {"sae_lens_version": "dev"}, r"version: .*\(given: 'dev'\)"),
        ("saelens", saelens_flat, {"sae_lens_version": 6}, "version: Input should be a valid str"),
        ("saelens", saelens_metadata, {"sae_lens_version": "dev"}, r"metadata\.sae_lens_version"),
        ("saelens", saelens_metadata, {"hook_name": 5}, r"metadata\.hook_name: Input should be"),
        (
            "sparsify",
            sparsify_file,
            {"expansion_factor": None, "num_latents": 0},
            r"cfg\.json .*expansion_factor: Input should be a valid integer",
        ),
        ("sparsify", sparsify_file, {"d_in": "12"}, "d_in: Input should be a valid integer"),
        ("gemma_scope_2", gemma_2, {"hf_hook_point_in": ["a"]}, "hf_hook_point_in: Input"),
        ("openai_gpt2", openai, {"activation_state_dict": [1]}, "activation_state_dict: Input"),
        ("openai_gpt2", openai, {"pre_bias": "x"}, r"missing \['pre_bias'\]"),
        ("openai_gpt2", openai, {"scale": 2.0}, "scale: unknown key"),
    ],
)
def test_fields_of_another_type_are_named(
    form: str, write: Callable[..., None], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, **change)
    for shapes_only in (True, False):
        with pytest.raises(ConfigError, match=message):
            read_published(str(tmp_path), form, Wanted(LAYER), shapes_only=shapes_only)


@pytest.mark.parametrize("form", ["saelens", "gemma_scope_2"])
def test_integers_as_weights_are_refused(form: str, tmp_path: Path) -> None:
    if form == "saelens":
        saelens_sae("jumprelu").save_model(tmp_path)
        file = tmp_path / "sae_weights.safetensors"
    else:
        gemma_2(tmp_path)
        file = tmp_path / "params.safetensors"
    save_file(load_file(file) | {"b_enc": torch.ones(N, dtype=torch.long)}, file)
    for shapes_only in (True, False):
        with pytest.raises(ConfigError, match="b_enc holds no floating-point numbers"):
            read_published(str(tmp_path), form, Wanted(LAYER), shapes_only=shapes_only)


@pytest.mark.parametrize(
    "header",
    [
        [1],
        {"w_enc": 5},
        {"w_enc": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}},
        {"w_enc": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"w_enc": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}},
        {"w_enc": {"dtype": "F32", "shape": [4]}},
    ],
)
def test_headers_that_say_nonsense_are_refused(header: Any, tmp_path: Path) -> None:
    gemma_2(tmp_path)
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(16)
    (tmp_path / "params.safetensors").write_bytes(content)
    for shapes_only in (True, False):
        with pytest.raises(ConfigError, match=r"params\.safetensors can't be read"):
            read_published(str(tmp_path), "gemma_scope_2", Wanted(LAYER), shapes_only=shapes_only)


@pytest.mark.parametrize("content", [b"PK nothing", pickle.dumps([1], protocol=2)])
def test_damaged_archive_is_named(content: bytes, tmp_path: Path) -> None:
    for name, form in (("params.npz", "gemma_scope"), (f"{LAYER}.pt", "openai_gpt2")):
        (tmp_path / name).write_bytes(content)
        for shapes_only in (True, False):
            with pytest.raises(ConfigError, match=name):
                read_published(str(tmp_path), form, Wanted(LAYER), shapes_only=shapes_only)


def test_archive_with_pickled_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", W_enc=np.array([Bomb()], dtype=object))
    for shapes_only in (True, False):
        with pytest.raises(ConfigError, match=r"params\.npz"):
            read_published(str(tmp_path), "gemma_scope", Wanted(LAYER), shapes_only=shapes_only)


def test_weights_that_aren_t_finite_or_don_t_fit_are_refused(
    draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    weights = gemma_scope_2(tmp_path, draw)
    save_file(weights | {"b_dec": weights["b_dec"] / 0}, tmp_path / "params.safetensors")
    with pytest.raises(ConfigError, match="b_dec holds a NaN or an infinity"):
        read_published(str(tmp_path), "gemma_scope_2", Wanted(LAYER))
    save_file(weights | {"w_dec": torch.zeros(N, D + 1)}, tmp_path / "params.safetensors")
    with pytest.raises(ConfigError, match=rf"w_dec has shape \({N}, {D + 1}\)"):
        read(tmp_path)
    save_file(weights | {"threshold": torch.zeros(1)}, tmp_path / "params.safetensors")
    with pytest.raises(ConfigError, match=rf"threshold has shape \(1,\), but there are {N}"):
        read(tmp_path)


def test_half_precision_weights_are_computed_with_in_float32(
    draw: Callable[..., Tensor], tmp_path: Path
) -> None:
    weights = gemma_scope_2(tmp_path, draw)
    half = {name: value.bfloat16() for name, value in weights.items()}
    save_file(half, tmp_path / "params.safetensors")
    sae = read(tmp_path).sae
    assert {weight.dtype for weight in sae.state_dict().values()} == {torch.float32}
    wide = {name: value.float() for name, value in half.items()}
    close(sae.encode(X), jump_relu_by_hand(wide, X))


def test_folder_on_another_filesystem_is_read(draw: Callable[..., Tensor], tmp_path: Path) -> None:
    llama_scope(tmp_path, draw)
    store = Store("memory://published/llama")
    for name in ("hyperparams.json", "checkpoints/final.safetensors"):
        store.write_bytes(name, (tmp_path / name).read_bytes())
    wanted = Wanted(LAYER)
    here = read(tmp_path).sae
    there = read_published(store.url, detected_format(store.url, wanted), wanted).sae
    assert torch.equal(there(X), here(X))
    assert file_identities(store.url, "llama_scope", wanted) == file_identities(
        str(tmp_path), "llama_scope", wanted
    )


def test_every_format_has_a_name_in_the_recipe() -> None:
    from typing import get_args

    from stages.dictionary.settings import FormatName

    assert sorted(get_args(FormatName)) == sorted(FORMATS)
