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
from stages.features.jaccard import generalised_jaccard, prototype
from stages.features.pooling import max_pool_codes, mean_pool_codes, mean_pool_dense

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
    sae_lens = pytest.importorskip("sae_lens")
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
    sae_lens = pytest.importorskip("sae_lens")
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
    pytest.importorskip("sae_lens")
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


def test_prototype_of_many_examples_does_not_collapse_similarity() -> None:
    examples = sparse_vectors(100, 200, 4)
    mean = prototype(examples)
    torch.testing.assert_close(mean, examples.double().mean(dim=0).float())
    assert generalised_jaccard(examples, mean).min() > 0.1
    assert generalised_jaccard(examples, 100 * mean).max() < 0.02
    assert torch.equal(prototype(examples[:1]), examples[0])
    with pytest.raises(ValueError, match="with examples"):
        prototype(torch.empty(0, 3))


def tokens_of_three_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of 30 tokens of rows 0, 1 and 3 of four; row 2 has none."""
    generator = torch.Generator().manual_seed(6)
    scores = torch.rand(30, 50, generator=generator)
    values, indices = scores.topk(6, dim=-1)
    rows = torch.tensor([0] * 4 + [1] * 11 + [3] * 15)
    return indices, values, rows, torch.bincount(rows, minlength=4)


def pooled_by_loop(indices: Tensor, values: Tensor, rows: Tensor, how: str) -> Tensor:
    pooled = torch.zeros(4, 50, dtype=torch.float64)
    for row in range(4):
        tokens = [
            torch.zeros(50, dtype=torch.float64).scatter(0, index, value.double())
            for index, value, owner in zip(indices, values, rows, strict=True)
            if owner == row
        ]
        if tokens:
            stacked = torch.stack(tokens)
            pooled[row] = stacked.mean(dim=0) if how == "mean" else stacked.amax(dim=0)
    return pooled.float()


def test_pooling_of_sparse_codes_equals_pooling_of_dense_codes() -> None:
    indices, values, rows, lengths = tokens_of_three_rows()
    dense = torch.zeros(30, 50).scatter(-1, indices, values)
    mean = mean_pool_codes(indices, values, rows, 4, 50, lengths)
    torch.testing.assert_close(mean, pooled_by_loop(indices, values, rows, "mean"))
    torch.testing.assert_close(mean, mean_pool_dense(dense, rows, 4, lengths))
    peak = max_pool_codes(indices, values, rows, 4, 50)
    assert torch.equal(peak, pooled_by_loop(indices, values, rows, "max"))


def test_pooling_with_padding_tokens_is_unchanged() -> None:
    indices, values, rows, lengths = tokens_of_three_rows()
    more = (torch.cat([t[:7], t[:5], t[7:]]) for t in (indices, values, rows))
    padded_indices, padded_values, padded_rows = more
    padded_rows[7:12] = -1
    padded_values[7:12] = 1e9

    assert torch.equal(
        mean_pool_codes(padded_indices, padded_values, padded_rows, 4, 50, lengths),
        mean_pool_codes(indices, values, rows, 4, 50, lengths),
    )
    assert torch.equal(
        max_pool_codes(padded_indices, padded_values, padded_rows, 4, 50),
        max_pool_codes(indices, values, rows, 4, 50),
    )
    padded, plain = (
        torch.zeros(len(i), 50).scatter(-1, i, v)
        for i, v in ((padded_indices, padded_values), (indices, values))
    )
    assert torch.equal(
        mean_pool_dense(padded, padded_rows, 4, lengths), mean_pool_dense(plain, rows, 4, lengths)
    )


def test_pooling_in_another_order_of_rows_permutes_the_result() -> None:
    indices, values, rows, lengths = tokens_of_three_rows()
    moved = torch.tensor([2, 0, 3, 1])
    new_lengths = torch.empty_like(lengths)
    new_lengths[moved] = lengths
    order = torch.argsort(moved[rows], stable=True)
    pooled = mean_pool_codes(indices[order], values[order], moved[rows][order], 4, 50, new_lengths)
    expected = mean_pool_codes(indices, values, rows, 4, 50, lengths)
    assert torch.equal(pooled[moved], expected)


def test_pooling_in_chunks_adds_up_to_pooling_at_once() -> None:
    indices, values, rows, lengths = tokens_of_three_rows()
    chunks = [slice(0, 9), slice(9, 30)]
    whole = mean_pool_codes(indices, values, rows, 4, 50, lengths)
    parts = [mean_pool_codes(indices[c], values[c], rows[c], 4, 50, lengths) for c in chunks]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    peaks = [max_pool_codes(indices[c], values[c], rows[c], 4, 50) for c in chunks]
    assert torch.equal(torch.maximum(*peaks), max_pool_codes(indices, values, rows, 4, 50))


def test_pooling_in_half_precision_accumulates_in_float32() -> None:
    tokens = 4096
    pooled = mean_pool_codes(
        torch.zeros(tokens, 1, dtype=torch.int64),
        torch.ones(tokens, 1, dtype=torch.bfloat16),
        torch.zeros(tokens, dtype=torch.int64),
        1,
        2,
        torch.tensor([tokens]),
    )
    assert torch.equal(pooled, torch.tensor([[1.0, 0.0]]))


def test_pooling_with_inconsistent_input_is_refused() -> None:
    indices, values, rows, lengths = tokens_of_three_rows()
    with pytest.raises(ValueError, match=r"codes_indices must be in \[0, 49\)"):
        mean_pool_codes(indices.clamp(max=49) * 0 + 49, values, rows, 4, 49, lengths)
    with pytest.raises(ValueError, match="row_of_token must be in"):
        max_pool_codes(indices, values, rows, 3, 50)
    with pytest.raises(ValueError, match="length of at least 1"):
        mean_pool_codes(indices, values, rows, 4, 50, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="lengths must have shape"):
        mean_pool_codes(indices, values, rows, 4, 50, lengths[:3])
    with pytest.raises(ValueError, match="codes must be"):
        mean_pool_codes(indices, values[:, :2], rows, 4, 50, lengths)
    with pytest.raises(ValueError, match="vectors must be"):
        mean_pool_dense(values, rows[:3], 4, lengths)
