"""Training of sparse autoencoders: equations, steps, the buffer, and going on from a state."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from stages.dictionary.buffer import ActivationBuffer, mixed_batches
from stages.dictionary.checkpoint import sae_bytes
from stages.dictionary.evaluate import SplicedLosses, evaluate_reconstruction
from stages.dictionary.losses import (
    aux_k_loss,
    fraction_of_variance_unexplained,
    geometric_median,
    least_squares_scale,
    perpendicular_part,
)
from stages.dictionary.sae import SparseAutoencoder, SparseAutoencoderConfig
from stages.dictionary.sparse import (
    Entries,
    Parameters,
    batch_top_k_entries,
    sparse_reconstruction,
    top_k_entries,
)
from stages.dictionary.train import Trainer, TrainingConfig, TrainingPoint, train

D_IN, ATOMS, ACTIVE = 16, 32, 3
BOTH = pytest.mark.parametrize("training", ["topk", "batchtopk"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Problems this small only lose by threads, and lose badly on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_input(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(seed: int, *, n_atoms: int = ATOMS, batch: int = 512) -> Iterator[Tensor]:
    """Batches of sums of three of a few fixed unit directions, off the origin."""
    fixed = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(n_atoms, D_IN, generator=fixed), dim=-1)
    offset = torch.randn(D_IN, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.rand(batch, n_atoms, generator=generator).topk(ACTIVE, dim=-1).indices
        size = 1 + torch.rand(batch, ACTIVE, generator=generator)
        yield torch.zeros(batch, n_atoms).scatter(-1, chosen, size) @ atoms + offset


def held_out() -> list[Tensor]:
    batches = planted(999)
    return [next(batches) for _ in range(8)]


def recipe(**changes: object) -> TrainingConfig:
    fields: dict[str, object] = {
        "d_in": D_IN,
        "d_sae": 48,
        "k": ACTIVE,
        "steps": 80,
        "learning_rate": 3e-3,
        "warmup_steps": 50,
        "dead_after_tokens": 10_000,
    }
    return TrainingConfig(**(fields | changes))  # type: ignore[arg-type]


def trained(
    config: TrainingConfig, batches: Iterator[Tensor], seed: int = 0
) -> tuple[SparseAutoencoder, list[TrainingPoint]]:
    points: list[TrainingPoint] = []
    return train(Trainer(config, seed), batches, points.append), points


def dense(entries: Entries, batch: int, n: int) -> Tensor:
    code = torch.zeros(batch, n, dtype=entries.values.dtype)
    code[entries.tokens, entries.latents] = entries.values
    return code


# Equations


def test_top_k_entries_equal_a_sort_of_each_token() -> None:
    a = torch.relu(random_input(40, 30) - 1.2)
    expected = torch.zeros_like(a)
    for token, row in enumerate(a.tolist()):
        for latent in sorted(range(30), key=lambda j: -row[j])[:5]:
            expected[token, latent] = row[latent]
    entries = top_k_entries(a, 5)
    assert torch.equal(dense(entries, 40, 30), expected)
    assert entries.values.min() > 0
    assert len(entries.values) < 200


@pytest.mark.parametrize(
    "a",
    [
        torch.relu(random_input(300, 400)),
        torch.relu(random_input(300, 400) - 3.0),
        torch.zeros(3, 50),
        # The largest are where a sample taken at even distances never looks.
        torch.relu(random_input(300, 400)) * (1 + 9.0 * (torch.arange(400) % 2)),
        torch.relu(random_input(300, 400)) / (1 + 9.0 * (torch.arange(400) % 2)),
    ],
)
def test_batch_top_k_entries_equal_a_sort_of_the_batch(a: Tensor) -> None:
    """The k B largest of all latents of the batch (Bussmann et al. 2024, equation 4)."""
    flat = np.sort(a.numpy().ravel())[::-1][: 4 * len(a)]
    entries = batch_top_k_entries(a, 4)
    assert np.array_equal(np.sort(entries.values.numpy())[::-1], flat[flat > 0])
    assert torch.equal(a[entries.tokens, entries.latents], entries.values)
    places = entries.tokens * a.shape[1] + entries.latents
    assert (places.diff() > 0).all()


@pytest.mark.parametrize("select", [top_k_entries, batch_top_k_entries])
def test_sparse_gradients_equal_those_of_the_dense_autoencoder(select: object) -> None:
    """Autograd through dense matrices gives the same gradients of all four parameters."""
    d, n, batch = 6, 20, 15
    weights = Parameters(
        *(random_input(*shape, seed=i).double() for i, shape in
          enumerate([(n, d), (n, d), (n,), (d,)]))
    )  # fmt: skip
    x = 2 * random_input(batch, d).double()
    goal = random_input(batch, d, seed=5).double()

    def gradients(sparse: bool) -> list[Tensor]:
        leaves = Parameters(*(w.clone().requires_grad_(True) for w in weights))
        a = torch.relu((x - leaves.decoder_bias) @ leaves.encoder.T + leaves.encoder_bias)
        entries = select(a.detach(), 3)  # type: ignore[operator]
        if sparse:
            x_hat = sparse_reconstruction(x, leaves, entries)
        else:
            chosen = dense(entries, batch, n) > 0
            x_hat = (a * chosen) @ leaves.decoder + leaves.decoder_bias
        ((x_hat - goal) ** 3).sum().backward()
        return [x_hat.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    for sparse, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(sparse, expected)


def test_aux_loss_equals_a_loop_and_moves_no_live_latent() -> None:
    """FVU(e, TopK_aux(a_dead) W_dec,dead), e fixed (Gao et al. 2024, appendix A.2)."""
    residual = random_input(7, 5).requires_grad_(True)
    latents = torch.relu(random_input(7, 9, seed=2)).requires_grad_(True)
    rows = random_input(9, 5, seed=3).requires_grad_(True)
    loss = aux_k_loss(residual, latents, rows, 4)
    error = variance = 0.0
    mean = residual.detach().double().mean(0)
    for token in range(7):
        best = sorted(range(9), key=lambda j: -float(latents.detach()[token, j]))[:4]
        made = sum(latents[token, j].detach().double() * rows[j].detach().double() for j in best)
        error += float((residual[token].detach().double() - made).square().sum())
        variance += float((residual[token].detach().double() - mean).square().sum())
    assert float(loss.detach()) == pytest.approx(error / variance, rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert residual.grad is None
    assert latents.grad is not None
    assert latents.grad.any()
    assert float(aux_k_loss(residual, latents, rows, 99).detach()) > 0


def test_fvu_is_zero_of_itself_and_one_of_the_mean() -> None:
    x = random_input(30, 4) + 7
    assert float(fraction_of_variance_unexplained(x, x)) == 0
    mean = x.mean(0).expand_as(x)
    assert float(fraction_of_variance_unexplained(x, mean)) == pytest.approx(1)


def test_perpendicular_part_changes_no_row_norm_to_first_order() -> None:
    rows = torch.nn.functional.normalize(random_input(9, 5), dim=-1)
    gradient = random_input(9, 5, seed=1)
    part = perpendicular_part(gradient, rows)
    torch.testing.assert_close((part * rows).sum(-1), torch.zeros(9), atol=1e-6, rtol=0)
    along = gradient - part
    torch.testing.assert_close(along.norm(dim=-1), (along * rows).sum(-1).abs())


def test_geometric_median_with_outlier_stays_near_the_cluster() -> None:
    cluster = random_input(99, 4)
    points = torch.cat([cluster, torch.full((1, 4), 1e4)])
    median = geometric_median(points)

    def cost(centre: Tensor) -> float:
        return float((points.double() - centre).norm(dim=-1).sum())

    assert median.norm() < 0.5
    assert points.mean(dim=0).norm() > 100
    moves = 0.05 * torch.nn.functional.normalize(random_input(50, 4), dim=-1)
    assert all(cost(median + move) > cost(median) for move in moves)


def test_learning_rate_rises_stays_and_falls() -> None:
    config = recipe(steps=10, warmup_steps=2, decay_steps=4, learning_rate=8.0)
    rates = [config.learning_rate_at(step) for step in range(1, 11)]
    assert rates == [4, 8, 8, 8, 8, 8, 8, 6, 4, 2]
    rate = TrainingConfig(d_in=8, d_sae=2**16, k=4, steps=1).peak_learning_rate
    assert rate == pytest.approx(1e-4)


# Steps


def plain_training(
    config: TrainingConfig, batches: Iterator[Tensor], directions: Tensor
) -> list[Tensor]:
    """The method written out with dense matrices, autograd and Adam's own equations."""
    w_dec = directions.clone()
    w_enc = directions.clone()
    b_enc, b_dec = torch.zeros(config.d_sae), torch.zeros(config.d_in)
    weights = [w_enc, w_dec, b_enc, b_dec]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    quiet = torch.zeros(config.d_sae, dtype=torch.int64)
    for step in range(1, config.steps + 1):
        x = next(batches)
        if step == 1:
            b_dec.copy_(geometric_median(x))
        for w in weights:
            w.requires_grad_(True)
        a = torch.relu((x - b_dec) @ w_enc.T + b_enc)
        if config.training == "topk":
            cut = a.topk(config.k, dim=-1).values[:, -1:]
        else:
            cut = a.flatten().topk(config.k * len(x)).values[-1]
        z = a * (a >= cut)
        e = x - z @ w_dec - b_dec
        loss = e.square().sum() / (x - x.mean(0)).square().sum()
        dead = quiet >= config.dead_after_tokens
        if dead.any():
            kept = a[:, dead].topk(min(config.d_in // 2, int(dead.sum())), dim=-1)
            z_aux = torch.zeros(len(x), int(dead.sum())).scatter(-1, kept.indices, kept.values)
            goal = e.detach()
            missed = (goal - z_aux @ w_dec[dead]).square().sum()
            loss = loss + missed / (goal - goal.mean(0)).square().sum() / 32
        gradients = list(torch.autograd.grad(loss, weights))
        quiet += len(x)
        quiet[(z > 0).any(0)] = 0
        with torch.no_grad():
            gradients[1] -= (gradients[1] * w_dec).sum(-1, keepdim=True) * w_dec
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            rate = config.peak_learning_rate * min(1, step / config.warmup_steps)
            for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
                g = g / max(1.0, float(norm))
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g * g
                mean = first[i] / (1 - 0.9**step)
                spread = (second[i] / (1 - 0.999**step)).sqrt()
                w -= rate * mean / (spread + 6.25e-10)
            w_dec /= w_dec.norm(dim=-1, keepdim=True)
    return weights


@BOTH
def test_training_equals_the_method_written_out_with_dense_matrices(training: str) -> None:
    config = recipe(
        training=training, d_sae=300, steps=30, warmup_steps=5, dead_after_tokens=600,
        learning_rate=1e-3,
    )  # fmt: skip
    # The decoder's first directions, as a trainer that never moved has them.
    unmoved = recipe(d_sae=300, steps=1, warmup_steps=0, learning_rate=0.0)
    still, _ = trained(unmoved, planted(1), seed=3)
    sae, points = trained(config, planted(1), seed=3)
    assert 0 < max(point.dead_share for point in points) < 1
    expected = plain_training(config, planted(1), still.W_dec.detach())
    for found, wanted in zip([sae.W_enc.T, sae.W_dec, sae.b_enc, sae.b_dec], expected, strict=True):
        # Adam divides small gradients by themselves, which makes much of their rounding.
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


@BOTH
def test_training_on_planted_dictionary_beats_pca_of_same_rank(training: str) -> None:
    sae, points = trained(recipe(training=training, steps=1000), planted(1))
    result = evaluate_reconstruction(sae, held_out())

    x = torch.cat(held_out()).double()
    variances = torch.linalg.svdvals(x - x.mean(dim=0)).square()
    pca_fvu = float(variances[ACTIVE:].sum() / variances.sum())
    assert result.fvu < 0.15
    assert result.fvu < 0.5 * pca_fvu
    assert result.l0 == pytest.approx(ACTIVE, rel=0.1)
    assert [point.step for point in points] == list(range(1, 1001))
    assert points[-1].fvu < points[0].fvu
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(48))


@BOTH
def test_training_twice_with_one_seed_gives_identical_bytes(training: str) -> None:
    config = recipe(training=training, dead_after_tokens=2000)
    runs = [trained(config, planted(1), seed) for seed in (3, 3, 4)]
    first, second, other = (sae_bytes(sae, {}) for sae, _ in runs)
    assert first == second
    assert runs[0][1] == runs[1][1]
    assert first != other


@BOTH
@pytest.mark.parametrize("stop", [1, 37, 60])
def test_trainer_given_its_state_back_goes_on_to_the_same_bytes(training: str, stop: int) -> None:
    config = recipe(training=training, dead_after_tokens=2000, decay_steps=20)
    whole, points = trained(config, planted(1))
    batches = planted(1)
    trainer = Trainer(config, 0)
    for batch in itertools.islice(batches, stop):
        trainer.step(batch)
    tensors, numbers = trainer.state()
    # Nothing of the other trainer's memory is shared.
    later = Trainer.from_state(config, {k: v.clone() for k, v in tensors.items()}, numbers)
    after: list[TrainingPoint] = []
    assert sae_bytes(train(later, batches, after.append), {}) == sae_bytes(whole, {})
    assert after == points[stop:]


def test_aux_loss_against_none_reduces_dead_share() -> None:
    def dead_share(coefficient: float) -> float:
        # A learning rate far too high kills latents by the dozen.
        config = recipe(
            d_sae=64,
            steps=300,
            learning_rate=0.05,
            warmup_steps=10,
            dead_after_tokens=2500,
            aux_coefficient=coefficient,
        )
        sae, _ = trained(config, planted(1, n_atoms=64, batch=256))
        unseen = planted(999, n_atoms=64)
        return evaluate_reconstruction(sae, [next(unseen) for _ in range(8)]).dead_share

    without = dead_share(0.0)
    assert without > 0.3
    assert dead_share(1 / 32) < 0.5 * without


def test_training_on_shifted_activations_shifts_only_the_decoder_bias() -> None:
    # An auxiliary loss that decoded the residual with b_dec would depend on the origin.
    config = recipe(steps=40, warmup_steps=5, dead_after_tokens=512, aux_coefficient=1.0)
    shift = 8 * torch.ones(D_IN)
    here, points = trained(config, planted(1))
    there, shifted = trained(config, (x + shift for x in planted(1)))

    assert max(point.dead_share for point in points) > 0
    assert [p.fvu for p in shifted] == pytest.approx([p.fvu for p in points], rel=1e-3)
    torch.testing.assert_close(there.W_dec, here.W_dec, rtol=0, atol=1e-3)
    torch.testing.assert_close(there.b_dec, here.b_dec + shift, rtol=0, atol=1e-3)


def test_batch_top_k_threshold_is_debiased_average_of_least_positive_activations() -> None:
    # A learning rate of zero freezes the initial weights, so that the activations are known.
    config = recipe(learning_rate=0.0, steps=2, warmup_steps=0, threshold_decay=0.5)
    sae, _ = trained(config, planted(5))
    batches = planted(5)
    least = []
    for _ in range(2):
        a = sae.activations(next(batches)).detach().flatten()
        least.append(float(a.topk(ACTIVE * 512).values[-1]))

    assert sae.config == SparseAutoencoderConfig(D_IN, 48, "jumprelu")
    assert sae.threshold is not None
    expected = torch.full((48,), (least[0] + 2 * least[1]) / 3)
    torch.testing.assert_close(sae.threshold, expected)


def test_training_with_too_few_batches_or_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="ran out after 1 batches"):
        trained(recipe(), iter([torch.ones(4, D_IN)]))
    with pytest.raises(ValueError, match="must exceed warmup_steps"):
        recipe(steps=50)
    with pytest.raises(ValueError, match=r"\[batch, 16\]"):
        trained(recipe(), iter([torch.ones(4, 3)]))


def test_training_on_non_finite_activations_is_stopped() -> None:
    batches = iter([random_input(4, D_IN), torch.full((4, D_IN), float("nan"))])
    with pytest.raises(FloatingPointError, match="step 2"):
        trained(recipe(warmup_steps=0, steps=2), batches)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 0},
        {"k": 49},
        {"training": "relu"},
        {"threshold_decay": 1.0},
        {"aux_k": 0},
        {"d_in": 0},
        {"dead_after_tokens": 0},
        {"decay_steps": -1},
    ],
)
def test_training_config_out_of_range_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|needs"):
        recipe(**changes)


# Measures


def some_sae() -> SparseAutoencoder:
    sae = SparseAutoencoder(SparseAutoencoderConfig(12, 40, "topk", 5), dtype=torch.float64)
    with torch.no_grad():
        for i, weight in enumerate(sae.parameters()):
            weight.copy_(random_input(*weight.shape, seed=i))
    return sae


def test_evaluation_is_ratio_of_sums_and_survives_large_mean() -> None:
    sae = some_sae()
    x = random_input(120, 12).double() * torch.linspace(0.1, 3, 120).unsqueeze(1) + 1e5
    with torch.no_grad():
        sae.b_dec.add_(1e5)
    result = evaluate_reconstruction(sae, [x[:10], x[10:11], x[11:]])

    expected = (x - sae(x).detach()).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert result.fvu == pytest.approx(float(expected), rel=1e-9)
    assert result.l0 == pytest.approx(float((sae.encode(x) > 0).sum() / 120))
    assert result.dead_share == float((sae.encode(x) == 0).all(dim=0).double().mean())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "FVU is undefined"),
        ([torch.ones(4, 12)], "FVU is undefined"),
        ([torch.ones(4, 3)], "12"),
    ],
)
def test_evaluation_without_variance_or_with_wrong_width_is_refused(
    batches: list[Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_reconstruction(some_sae(), batches)


def test_recovered_share_of_the_loss() -> None:
    assert SplicedLosses(clean=2.0, spliced=2.0, ablated=10.0).recovered == 1
    assert SplicedLosses(clean=2.0, spliced=10.0, ablated=10.0).recovered == 0
    assert SplicedLosses(clean=2.0, spliced=4.0, ablated=10.0).recovered == pytest.approx(0.75)


# The buffer


def numbered(sizes: list[int]) -> Iterator[Tensor]:
    """Chunks of activations that hold their place in the stream."""
    start = 0
    for size in sizes:
        yield torch.arange(start, start + size, dtype=torch.float32)[:, None].expand(size, 2)
        start += size


@settings(max_examples=60)
@given(
    sizes=some.lists(some.integers(1, 40), max_size=30),
    batch=some.integers(1, 12),
    factor=some.integers(2, 6),
    seed=some.integers(0, 3),
)
def test_every_activation_leaves_the_buffer_once(
    sizes: list[int], batch: int, factor: int, seed: int
) -> None:
    buffer = ActivationBuffer(batch * factor, 2, seed)
    batches = list(mixed_batches(buffer, numbered(sizes), batch))
    left = torch.cat([torch.zeros(0, 2), *batches])
    assert sorted(left[:, 0].tolist()) == list(range(sum(sizes)))
    assert all(len(one) == batch for one in batches[:-1])


def test_buffer_mixes_texts_and_holds_no_more_than_its_capacity() -> None:
    read = 0

    def chunks() -> Iterator[Tensor]:
        nonlocal read
        for chunk in numbered([50] * 200):
            read += len(chunk)
            yield chunk

    given_out, texts = 0, []
    for batch in mixed_batches(ActivationBuffer(2000, 2, 0), chunks(), 100):
        given_out += len(batch)
        assert read - given_out <= 2000 + 50
        texts.append(len(set((batch[:, 0] // 50).tolist())))
    # Of 2000 tokens of 40 texts, 100 at random miss a text with probability (39/40)^100 = 0.08.
    assert np.mean(texts[:80]) > 30
    assert given_out == 10_000


def test_buffer_is_filled_when_half_is_gone() -> None:
    read: list[int] = []

    def chunks() -> Iterator[Tensor]:
        for i, chunk in enumerate(numbered([10] * 100)):
            read.append(i)
            yield chunk

    batches = mixed_batches(ActivationBuffer(100, 2, 0), chunks(), 10)
    counts = []
    for _ in range(12):
        next(batches)
        counts.append(len(read))
    assert counts == [10] * 5 + [15] * 5 + [20] * 2


def test_buffer_order_is_the_seed_s() -> None:
    def order(seed: int) -> list[float]:
        buffer = ActivationBuffer(64, 2, seed)
        return torch.cat(list(mixed_batches(buffer, numbered([30] * 9), 16)))[:, 0].tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("stop", [1, 4, 11, 16])
def test_buffer_given_its_state_back_goes_on_alike(stop: int) -> None:
    whole = list(mixed_batches(ActivationBuffer(64, 2, 0), numbered([23] * 12), 16))
    chunks = numbered([23] * 12)
    buffer = ActivationBuffer(64, 2, 0)
    for _ in itertools.islice(mixed_batches(buffer, chunks, 16), stop):
        pass
    later = ActivationBuffer.from_state(64, 0, *buffer.state())
    rest = list(mixed_batches(later, chunks, 16))
    assert len(rest) == len(whole) - stop
    for found, expected in zip(rest, whole[stop:], strict=True):
        assert torch.equal(found, expected)


def test_least_squares_scale_is_that_of_numpys_solver() -> None:
    x, x_hat = random_input(40, 6), random_input(40, 6, seed=12)
    (expected,) = np.linalg.lstsq(x_hat.reshape(-1, 1).numpy(), x.flatten().numpy())[0]
    assert float(least_squares_scale(x, x_hat)) == pytest.approx(expected, rel=1e-5)


@BOTH
def test_fitted_encoder_begins_with_the_scale_that_reconstructs_best(training: str) -> None:
    """No scaled transpose explains more of the first batch, and the same latents are active."""
    config = TrainingConfig(D_IN, 8 * ATOMS, 6, 2, training, "fitted")  # type: ignore[arg-type]
    batch = next(planted(3))
    trainer = Trainer(config, 0)
    started = trainer.step(batch)
    other = Trainer(TrainingConfig(D_IN, 8 * ATOMS, 6, 2, training), 0)  # type: ignore[arg-type]
    assert other.step(batch).l0 == started.l0
    decoder = torch.nn.functional.normalize(
        torch.randn(8 * ATOMS, D_IN, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    bias = geometric_median(batch)
    pre = torch.relu((batch - bias) @ decoder.T)
    flat = pre if training == "topk" else pre.flatten()
    kept = flat.topk(6 if training == "topk" else 6 * len(batch))
    z = torch.zeros_like(flat).scatter(-1, kept.indices, kept.values).reshape(pre.shape)
    fvus = [
        float(fraction_of_variance_unexplained(batch, scale * z @ decoder + bias))
        for scale in np.linspace(0.02, 1.5, 75)
    ]
    assert min(fvus) * 0.99 < started.fvu <= min(fvus) + 1e-6
    assert started.fvu < fvus[49] - 0.01  # scale 1
