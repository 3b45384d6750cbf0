"""Sparse autoencoders, pooling of their codes, and similarity to task prototypes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from stages.dictionary.checkpoint import CONFIG_FILE, WEIGHTS_FILE, sae_bytes, sae_from_bytes
from stages.dictionary.sae import (
    Architecture,
    SparseAutoencoder,
    SparseAutoencoderConfig,
)
from stages.features.jaccard import generalised_jaccard

BOTH = pytest.mark.parametrize("architecture", ["topk", "jumprelu"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Problems this small only lose by threads, and lose badly on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_sae(architecture: Architecture, *, d_in: int = 12, d_sae: int = 40) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(7)
    k = 5 if architecture == "topk" else None
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in, d_sae, architecture, k))
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        if sae.threshold is not None:
            sae.threshold.copy_(3 * torch.rand(d_sae, generator=generator))
    return sae


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def write(files: dict[str, bytes], directory: Path) -> None:
    for name, content in files.items():
        (directory / name).write_bytes(content)


@BOTH
@pytest.mark.parametrize("shape", [(30, 12), (4, 6, 12)])
def test_encode_decode_of_written_checkpoint_equals_sae_lens(
    architecture: Architecture, shape: tuple[int, ...], tmp_path: Path
) -> None:
    import sae_lens

    sae, x = random_sae(architecture), random_input(*shape)
    write(sae_bytes(sae, {"model_name": "tiny", "hook_name": "model.layers.1"}), tmp_path)
    oracle = sae_lens.SAE.load_from_disk(tmp_path)

    torch.testing.assert_close(sae.encode(x), oracle.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), oracle(x), rtol=1e-5, atol=1e-5)
    assert oracle.cfg.architecture() == architecture
    assert oracle.cfg.metadata.hook_name == "model.layers.1"
    assert 0 < (sae.encode(x) > 0).float().mean() < 1


@pytest.mark.parametrize(
    ("architecture", "convention"),
    [
        ("topk", "apply_b_dec_to_input"),
        ("topk", "rescale_acts_by_decoder_norm"),
        ("jumprelu", "apply_b_dec_to_input"),
    ],
)
def test_reading_other_conventions_keeps_the_codes_of_sae_lens(
    architecture: Architecture, convention: str, tmp_path: Path
) -> None:
    import sae_lens

    files = sae_bytes(random_sae(architecture), {})
    cfg = json.loads(files[CONFIG_FILE])
    files[CONFIG_FILE] = json.dumps(cfg | {convention: not cfg[convention]}).encode()
    write(files, tmp_path)
    sae, oracle, x = (
        sae_from_bytes(files),
        sae_lens.SAE.load_from_disk(tmp_path),
        random_input(9, 12),
    )

    torch.testing.assert_close(sae.encode(x), oracle.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), oracle(x), rtol=1e-4, atol=1e-4)


def test_reading_checkpoint_of_sae_lens_training_keeps_its_codes(tmp_path: Path) -> None:
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    torch.manual_seed(0)
    trained = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=12, d_sae=40, k=5))
    trained.b_dec.data.normal_()
    trained.topk_threshold.fill_(0.05)
    trained.save_inference_model(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    from sae_lens import SAE

    x = random_input(20, 12)
    sae = sae_from_bytes(files)
    assert sae.config.architecture == "jumprelu"
    torch.testing.assert_close(
        sae.encode(x), SAE.load_from_disk(tmp_path).encode(x), rtol=1e-5, atol=1e-5
    )


@BOTH
def test_checkpoint_round_trip_gives_same_output_and_same_bytes(architecture: Architecture) -> None:
    sae, x, metadata = random_sae(architecture), random_input(30, 12), {"b": "é", "a": 1}
    files = sae_bytes(sae, metadata)
    back = sae_from_bytes(files)

    assert sorted(files) == ["cfg.json", "sae_weights.safetensors"]
    assert back.config == sae.config
    assert torch.equal(back(x), sae(x))
    assert sae_bytes(back, dict(reversed(metadata.items()))) == files


def test_checkpoint_in_half_precision_keeps_its_dtype() -> None:
    sae = random_sae("jumprelu").to(torch.bfloat16)
    back = sae_from_bytes(sae_bytes(sae, {}))
    assert back.W_enc.dtype == torch.bfloat16
    assert back.threshold is not None
    assert sae.threshold is not None
    assert torch.equal(back.threshold, sae.threshold)


def test_checkpoint_with_transposed_weight_says_so() -> None:
    files = sae_bytes(random_sae("topk"), {})
    weights = load(files[WEIGHTS_FILE])
    files[WEIGHTS_FILE] = save(weights | {"W_dec": weights["W_dec"].T.contiguous()})
    with pytest.raises(ValueError, match=r"W_dec has shape \(12, 40\).*\(40, 12\).*transposed"):
        sae_from_bytes(files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "transcoder"}, "architecture must be"),
        ({"architecture": "gated"}, r"missing \['b_gate', 'b_mag', 'r_mag'\]"),
        ({"architecture": "jumprelu"}, r"missing \['threshold'\]"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations must be"),
        ({"normalize_activations": "expected_average_only_in"}, "activation_scale"),
        ({"k": None}, "k must be an integer"),
        ({"k": 41}, "1 <= k <= d_sae = 40"),
        ({"d_sae": 41}, "d_sae = 41 need"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_checkpoint_with_wrong_config_is_refused(change: dict[str, object], message: str) -> None:
    files = sae_bytes(random_sae("topk"), {})
    files[CONFIG_FILE] = json.dumps(json.loads(files[CONFIG_FILE]) | change).encode()
    with pytest.raises(ValueError, match=message):
        sae_from_bytes(files)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({WEIGHTS_FILE: b"\x80\x04."}, "not a safetensors file"),
        ({CONFIG_FILE: b"[]"}, "must hold an object"),
        ({CONFIG_FILE: b"\xff"}, "not JSON"),
    ],
)
def test_checkpoint_with_foreign_content_is_refused(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sae_from_bytes(sae_bytes(random_sae("topk"), {}) | files)
    with pytest.raises(ValueError, match="checkpoint has no"):
        sae_from_bytes(files)


def test_metadata_with_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        sae_bytes(random_sae("topk"), {"fvu": float("nan")})


@BOTH
def test_encode_sparse_scattered_equals_encode(architecture: Architecture) -> None:
    sae, x = random_sae(architecture), random_input(4, 6, 12)
    z, codes = sae.encode(x), sae.encode_sparse(x)
    dense = torch.zeros_like(z).scatter_add(-1, codes.indices, codes.values)
    assert torch.equal(dense, z)
    assert codes.indices.shape[-1] == (z > 0).sum(-1).max()


def test_top_k_with_few_positive_latents_never_goes_negative() -> None:
    sae = random_sae("topk")
    with torch.no_grad():
        sae.b_enc.fill_(-8.0)
    z = sae.encode(random_input(50, 12))
    assert (z >= 0).all()
    assert ((z > 0).sum(-1) < 5).any()


def test_fold_decoder_norm_keeps_jumprelu_reconstruction_and_scales_codes() -> None:
    sae, x = random_sae("jumprelu"), random_input(30, 12)
    before, codes, norm = sae(x), sae.encode(x), sae.W_dec.norm(dim=-1)
    sae.fold_decoder_norm()
    torch.testing.assert_close(sae(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encode(x), codes * norm, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(40))


def test_jumprelu_code_of_a_token_does_not_depend_on_its_batch() -> None:
    sae, x = random_sae("jumprelu"), random_input(16, 12)
    alone = torch.cat([sae.encode(row.unsqueeze(0)) for row in x])
    torch.testing.assert_close(sae.encode(x), alone)


def test_jumprelu_activation_equal_to_threshold_is_off() -> None:
    sae = SparseAutoencoder(SparseAutoencoderConfig(2, 2, "jumprelu"))
    assert sae.threshold is not None
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.threshold.fill_(1.0)
    assert torch.equal(sae.encode(torch.tensor([1.0, 1.5])), torch.tensor([0.0, 1.5]))


def sparse_vectors(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, width, generator=generator)
    return values * (torch.rand(rows, width, generator=generator) < 0.3)


def test_generalised_jaccard_by_identity_equals_brute_force() -> None:
    z, tasks = sparse_vectors(20, 300, 1), sparse_vectors(4, 300, 2)
    expected = torch.empty(20, 4, dtype=torch.float64)
    for row in range(20):
        for task in range(4):
            pairs = list(zip(z[row].tolist(), tasks[task].tolist(), strict=True))
            expected[row, task] = sum(map(min, pairs)) / sum(map(max, pairs))

    result = generalised_jaccard(z, tasks)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(generalised_jaccard(z[3], tasks), expected[3], rtol=1e-12, atol=0)
    torch.testing.assert_close(generalised_jaccard(z, tasks[1]), expected[:, 1], rtol=1e-12, atol=0)
    assert float(generalised_jaccard(z[3], tasks[1])) == pytest.approx(float(expected[3, 1]))


def test_generalised_jaccard_of_identical_and_disjoint_and_zero_vectors() -> None:
    z = sparse_vectors(5, 64, 3)
    zero = torch.zeros(64)
    torch.testing.assert_close(generalised_jaccard(z, z).diagonal(), torch.ones(5).double())
    left, right = torch.eye(64)[:2]
    assert generalised_jaccard(left, right) == 0
    assert generalised_jaccard(zero, zero) == 0
    assert generalised_jaccard(zero, left) == 0


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_generalised_jaccard_of_invalid_codes_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="non-negative"):
        generalised_jaccard(torch.tensor([1.0, value]), torch.ones(2))
    with pytest.raises(ValueError, match="same width"):
        generalised_jaccard(torch.ones(3), torch.ones(2))
