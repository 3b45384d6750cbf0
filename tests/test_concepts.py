"""Concepts of tokens and rows, against the published equation taken one token at a time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import STUDENT
from engine_fakes import FakeReader
from torch.nn.functional import cross_entropy

from stages.concepts.attribution import MISSING, strongest
from stages.concepts.settings import ConceptsSettings
from stages.concepts.stage import ConceptsStage
from stages.dictionary.checkpoint import sae_bytes
from stages.dictionary.sae import SparseAutoencoder, SparseAutoencoderConfig
from stages.dictionary.settings import DictionarySettings
from stages.engines import MaskedSequence, RowConcepts
from stages.engines.local import LocalHandle
from stages.engines.model_files import cached_tokenizer
from stages.engines.reader import TransformersReader
from stages.engines.settings import ModelSettings
from stages.features.tokens import masked_sequence
from stages.rows import MESSAGES
from stages.storage import Store

LAYER = 26
MODEL = ModelSettings(model=STUDENT, max_length=64)
LATENTS = 900
TURNS = [
    {"role": "user", "content": "Add 2 and 3."},
    {"role": "assistant", "content": "The sum is 5."},
]


def random_sae(normalisation: Any) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    config = SparseAutoencoderConfig(576, LATENTS, "topk", 6, normalisation)
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(LATENTS, 576, generator=generator))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


@pytest.fixture(scope="module")
def reader() -> TransformersReader:
    return TransformersReader(MODEL)


def literal_attributions(
    model: Any, sae: SparseAutoencoder, sequence: MaskedSequence, settings: ConceptsSettings
) -> dict[int, np.ndarray]:
    """CoCoMix, Eq. 1, a forward and a backward pass a token: only its own state is replaced."""
    ids = torch.tensor([list(sequence.ids)])
    states = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0].detach()
    found = {}
    for place, kept in enumerate(sequence.keep[:-1]):
        if not kept:
            continue
        code = sae.encode(states[place]).detach().requires_grad_()
        reconstruction = sae.decode(code, states[place])

        def replaced(_module: Any, _inputs: Any, output: Any, place: int = place,
                     value: torch.Tensor = reconstruction) -> Any:  # fmt: skip
            is_tuple = isinstance(output, tuple)
            hidden = (output[0] if is_tuple else output).clone()
            hidden[0, place] = value
            return (hidden, *output[1:]) if is_tuple else hidden

        handle = model.model.layers[LAYER].register_forward_hook(replaced)
        logits = model(ids).logits[0, place]
        handle.remove()
        loss = cross_entropy(logits.float(), ids[0, place + 1])
        (gradient,) = torch.autograd.grad(loss, code)
        own = code if settings.latents == "active" else sae.activations(states[place])
        sign = 1 if settings.gradient_of == "loss" else -1
        found[place] = (sign * own * gradient).detach().numpy()
    return found


@pytest.mark.parametrize(
    ("normalisation", "latents", "gradient_of"),
    [("none", "active", "loss"), ("layer_norm", "all", "likelihood")],
)
def test_concepts_are_those_of_the_published_equation(
    reader: TransformersReader,
    library_model: Any,
    tmp_path: Any,
    normalisation: Any,
    latents: Any,
    gradient_of: Any,
) -> None:
    sae = random_sae(normalisation)
    store = Store(str(tmp_path))
    for name, data in sae_bytes(sae, {}).items():
        store.write_bytes(name, data)
    settings = ConceptsSettings(per_row=5, latents=latents, gradient_of=gradient_of)
    sequence = masked_sequence(cached_tokenizer(MODEL), TURNS, "both", 64)
    expected = literal_attributions(library_model, sae, sequence, settings)
    (found,) = reader.concepts([sequence], LAYER, store.url, settings)
    assert found.ids.shape == found.scores.shape == (len(sequence.ids), 4)
    assert 5 < len(expected) < len(sequence.ids) - 1
    scale = max(float(values.max()) for values in expected.values())
    for place in range(len(sequence.ids)):
        ids, scores = found.ids[place], found.scores[place]
        if place not in expected:
            # A template token, or the last one: nothing comes after it.
            assert ids.tolist() == [MISSING] * 4
            assert not scores.any()
            continue
        values = expected[place]
        held = ids != MISSING
        assert held.sum() == min(4, int((values > 0).sum()))
        np.testing.assert_allclose(scores[held], values[ids[held]], atol=2e-4 * scale)
        np.testing.assert_allclose(
            scores[held], np.sort(values)[::-1][: held.sum()], atol=2e-4 * scale
        )
    mean = np.mean(list(expected.values()), axis=0)
    np.testing.assert_allclose(found.row_scores, np.sort(mean)[::-1][:5], atol=1e-4 * scale)
    np.testing.assert_allclose(found.row_scores, mean[found.row_ids], atol=1e-4 * scale)


def test_reader_reads_states_after_concepts_as_before(
    reader: TransformersReader, tmp_path: Any
) -> None:
    store = Store(str(tmp_path))
    for name, data in sae_bytes(random_sae("none"), {}).items():
        store.write_bytes(name, data)
    sequence = masked_sequence(cached_tokenizer(MODEL), TURNS, "both", 64)
    before = reader.activations([sequence], LAYER)
    reader.concepts([sequence], LAYER, store.url, ConceptsSettings())
    np.testing.assert_array_equal(reader.activations([sequence], LAYER), before)


@pytest.mark.parametrize("concepts_first", [False, True])
def test_a_reader_gives_codes_and_concepts_of_one_autoencoder(
    concepts_first: bool, reader: TransformersReader, tmp_path: Any
) -> None:
    """A recipe with features and concepts reads both from one model, in either order."""
    store = Store(str(tmp_path))
    for name, data in sae_bytes(random_sae("none"), {}).items():
        store.write_bytes(name, data)
    sequence = masked_sequence(cached_tokenizer(MODEL), TURNS, "both", 64)

    def concepts() -> RowConcepts:
        return reader.concepts([sequence], LAYER, store.url, ConceptsSettings())[0]

    before = concepts() if concepts_first else None
    codes = reader.pooled_codes([sequence], LAYER, store.url, "mean")
    after = concepts()
    assert codes.nnz
    assert len(after.row_ids)
    if before is not None:
        np.testing.assert_array_equal(before.ids, after.ids)


def test_slots_without_a_positive_value_are_masked() -> None:
    ids, scores = strongest(torch.tensor([[0.0, 3.0, -2.0, 1.0], [-1.0, 0.0, 0.0, -5.0]]), 6)
    assert ids.tolist() == [[1, 3, -1, -1, -1, -1], [-1] * 6]
    assert scores.tolist() == [[3, 1, 0, 0, 0, 0], [0] * 6]


def test_row_without_tokens_fails_and_one_of_a_single_token_has_no_concept(
    reader: TransformersReader, tmp_path: Any
) -> None:
    store = Store(str(tmp_path))
    for name, data in sae_bytes(random_sae("none"), {}).items():
        store.write_bytes(name, data)
    rows = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}],
    ]
    table = pa.table({"id": ["a", "b"], "effective_messages": pa.array(rows, MESSAGES)})
    stage = ConceptsStage(
        ConceptsSettings(part="response"), DictionarySettings(layer=LAYER), {"student": MODEL}
    )
    made = asyncio.run(
        stage.process(table, {"student": LocalHandle(reader)}, {"dictionary": store})
    )
    empty, single = made.to_pylist()
    assert empty["concepts_status"].startswith("failed: no_tokens")
    assert empty["concept_ids"] is None
    assert single["concepts_status"] == "ok"
    assert {one for slots in single["concept_ids"] for one in slots} == {MISSING}
    assert single["concept_row_ids"] == []


def made_up(sequence: MaskedSequence) -> RowConcepts:
    tokens = np.array(sequence.ids, np.int32)
    ids = np.stack([tokens % 16, np.full(len(tokens), MISSING, np.int32)], axis=1)
    return RowConcepts(ids, ids.clip(0).astype(np.float32), ids[:2, 0], np.ones(2, np.float32))


def test_data_set_has_the_concepts_of_emitted_rows_and_says_whose_they_are(
    recipe: Any, execute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def concepts(
        _self: Any, sequences: Any, _layer: int, _dictionary: str, _settings: Any
    ) -> list[RowConcepts]:
        return [made_up(sequence) for sequence in sequences]

    monkeypatch.setattr(FakeReader, "concepts", concepts)
    del recipe.value["reflection"], recipe.value["difficulty"]
    recipe.value["concepts"] = {"where": 'source == "apples"'}
    recipe.value["emission"] = {"budget_rows": 8, "shard_bytes": 1 << 20}
    execute()
    dataset = recipe.run_folder / "dataset"
    (file,) = (dataset / "concepts").glob("*.parquet")
    lines = pq.read_table(file).to_pylist()
    data = [r for f in sorted((dataset / "data").glob("*.parquet"))
            for r in pq.read_table(f).to_pylist()]  # fmt: skip
    assert [line["id"] for line in lines] == [r["id"] for r in data if r["source"] == "apples"]
    messages = {row["id"]: row["messages"] for row in data}
    for line in lines:
        sequence = masked_sequence(
            cached_tokenizer(MODEL), messages[line["id"]], "both", MODEL.max_length
        )
        assert line["input_ids"] == list(sequence.ids)
        expected = made_up(sequence)
        assert line["concept_ids"] == expected.ids.tolist()
        assert line["concept_scores"] == expected.scores.tolist()
        assert line["row_concepts"] == expected.row_ids.tolist()
    said = json.loads((dataset / "concepts" / "dictionary.json").read_text())
    assert said["layer"] == 2
    assert said["hidden_states"] == 3
    assert said["autoencoder"]["d_sae"] == 16
    assert said["autoencoder_sha256"] == Store(str(recipe.run_folder)).sha256(
        "dictionary/sae_weights.safetensors"
    )
    assert said["student"]["reference"] == STUDENT
    card = (dataset / "README.md").read_text()
    assert "config_name: concepts" in card
    assert "concept_ids" not in data[0].get("provenance", {})
