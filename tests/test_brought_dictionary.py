"""A published autoencoder in place of a trained one: settings, checks, the stage, and runs."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_files import write_sparsify
from safetensors.torch import load_file, save_file
from sharded import Tables
from test_dictionary import CODE, MATHS, MODELS, table

from pipeline.config import read_config
from pipeline.identity import fingerprint
from pipeline.runner import Run
from stages.dictionary.artifact import read_autoencoder
from stages.dictionary.settings import BROUGHT_FIELDS, TRAINING_FIELDS, DictionarySettings
from stages.dictionary.stage import DictionaryStage
from stages.engines.local import LocalHandle
from stages.engines.model_files import cached_tokenizer
from stages.engines.reader import TransformersReader
from stages.errors import ConfigError
from stages.features.settings import FeaturesSettings
from stages.features.tokens import masked_sequence
from stages.prototypes.artifact import read_prototypes
from stages.prototypes.stage import PrototypesStage
from stages.rows import Message
from stages.storage import Store


@pytest.mark.parametrize("field", TRAINING_FIELDS)
def test_settings_of_training_are_refused_by_name_beside_a_path(field: str) -> None:
    value = {
        "training": "topk", "encoder_start": "fitted", "refit": True,
        "learning_rate": 0.5, "warmup_share": 0.3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"nothing is trained: leave out {field}"):
        DictionarySettings(layer=1, path="somewhere", **{field: value.get(field, 7)})


def test_settings_of_files_are_refused_without_a_path() -> None:
    with pytest.raises(ValueError, match="format, activation_scale goes with path"):
        DictionarySettings(layer=1, format="saelens", activation_scale=2.0)


def test_settings_as_a_run_writes_them_are_read_back() -> None:
    for settings in (DictionarySettings(layer=1), DictionarySettings(layer=1, path="x")):
        assert DictionarySettings(**settings.model_dump()) == settings


def test_every_setting_is_of_training_of_files_or_of_both() -> None:
    """One that is added has to say whether it means something beside a path."""
    both = {"student", "layer", "part", "path"}
    assert both | {*TRAINING_FIELDS, *BROUGHT_FIELDS} == set(DictionarySettings.model_fields)


@pytest.fixture(scope="module")
def reader() -> Any:
    return LocalHandle(TransformersReader(MODELS["student"]))


@pytest.fixture(scope="module")
def targets() -> Tables:
    return Tables(table([*MATHS[6:], *CODE[6:]], ["maths"] * 2 + ["code"] * 2), 3)


def fitted(settings: DictionarySettings, reader: Any, targets: Tables, folder: Path) -> Any:
    stage = DictionaryStage(settings, MODELS, seed=4)
    stage.check()
    artifact = asyncio.run(stage.fit(Tables(table(MATHS), 5), targets, {"student": reader}))
    store = Store(str(folder))
    for name, data in artifact.files.items():
        store.write_bytes(name, data)
    return artifact, store


def states_of(reader: Any, messages: list[Message], layer: int) -> torch.Tensor:
    sequence = masked_sequence(cached_tokenizer(MODELS["student"]), messages, "both", 128)
    return torch.from_numpy(asyncio.run(reader.activations([sequence], layer)))


def test_stage_writes_the_codes_of_the_files_and_their_origin(
    reader: Any, targets: Tables, tmp_path: Path
) -> None:
    """The prototype of a task is the mean over rows of the mean code of sparsify's formula."""
    folder = tmp_path / "layers.3"
    write_sparsify(folder, 576, 64)
    settings = DictionarySettings(layer=3, path=str(folder))
    artifact, store = fitted(settings, reader, targets, tmp_path / "made")
    sae = read_autoencoder(store)
    stage = PrototypesStage(FeaturesSettings(), settings, MODELS, seed=4)
    made = asyncio.run(stage.fit(targets, targets, {"student": reader}, {"dictionary": store}))
    for name, data in made.files.items():
        store.write_bytes(name, data)
    prototypes = torch.from_numpy(read_prototypes(store).codes)
    weights = load_file(folder / "sae.safetensors")
    expected = []
    for start in (2, 0):
        rows = targets.table["effective_messages"].to_pylist()[start : start + 2]
        codes = []
        for messages in rows:
            x = states_of(reader, messages, 3) - weights["b_dec"]
            a = torch.relu(x @ weights["encoder.weight"].T + weights["encoder.bias"])
            kept = a >= a.sort(dim=-1, descending=True).values[:, 3:4]
            codes.append((a * kept).mean(0))
        expected.append(torch.stack(codes).mean(0))
    torch.testing.assert_close(prototypes, torch.stack(expected), rtol=1e-4, atol=1e-4)
    metadata = store.read_json("cfg.json")["metadata"]
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert metadata["source_format"] == "sparsify"
    assert metadata["source_config"] == {"k": 4, "d_in": 576, "num_latents": 64}
    origin = Store(str(folder))
    assert metadata["source_files"] == {
        name: f"sha256:{origin.sha256(name)}" for name in ("cfg.json", "sae.safetensors")
    }
    assert artifact.report["latents"] == sae.config.d_sae == 64
    states = torch.cat(
        [states_of(reader, row, 3) for row in targets.table["effective_messages"].to_pylist()]
    )
    error = (states - sae(states).detach()).double().square().sum()
    fvu = error / (states.double() - states.double().mean(0)).square().sum()
    assert artifact.report["quality"]["fvu"] == pytest.approx(float(fvu), rel=1e-3)


def test_stage_brings_latents_to_one_scale_where_that_keeps_the_reconstruction(
    reader: Any, targets: Tables, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {
        "w_enc": torch.randn(576, 64, generator=generator),
        "w_dec": torch.randn(64, 576, generator=generator),
        "b_enc": torch.zeros(64),
        "b_dec": torch.zeros(576),
        "threshold": torch.full((64,), 20.0),
    }
    (tmp_path / "files").mkdir()
    save_file(weights, tmp_path / "files" / "params.safetensors")
    cfg = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.3.output"}
    (tmp_path / "files" / "config.json").write_text(json.dumps(cfg))
    settings = DictionarySettings(layer=3, path=str(tmp_path / "files"))
    _, store = fitted(settings, reader, targets, tmp_path / "made")
    sae = read_autoencoder(store)
    x = states_of(reader, targets.table["effective_messages"].to_pylist()[0], 3)
    h = x @ weights["w_enc"]
    codes = h * (h > 20)
    assert (codes > 0).any()
    norms = weights["w_dec"].norm(dim=-1)
    torch.testing.assert_close(sae.encode(x), codes * norms, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(sae(x), codes @ weights["w_dec"], rtol=1e-4, atol=1e-1)


@pytest.fixture
def tiny_student(tmp_path: Path, student_tokenizer: Any) -> str:
    """A random model of width 8, that of the fake engines, and 5 blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        vocab_size=len(student_tokenizer),
    )
    folder = tmp_path / "student"
    LlamaForCausalLM(config).save_pretrained(folder)
    student_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def brought(recipe: Any, tiny_student: str, tmp_path: Path) -> Any:
    """The recipe of the fixture `recipe`, with an autoencoder that lies beside it."""
    write_sparsify(tmp_path / "layers.2", 8, 32)
    recipe.value["models"]["student"] = {"model": tiny_student}
    recipe.value["dictionary"] = {"layer": 2, "path": "layers.2"}
    return recipe


def job_of(recipe: Any) -> Run:
    return Run(read_config(recipe.save()), lambda _: None)


def test_run_with_a_brought_autoencoder_is_complete_and_then_kept(
    brought: Any, execute: Any
) -> None:
    done = execute()
    assert done.kinds("dictionary")[-1] == "done"
    assert (brought.run_folder / "dataset" / "README.md").exists()
    again = execute()
    assert again.kinds("dictionary") == ["kept"]
    assert again.asked["reader"] == 0


def test_fingerprint_is_of_the_files_content_not_of_their_place(
    brought: Any, tmp_path: Path
) -> None:
    def found() -> str:
        return fingerprint(job_of(brought).identities["dictionary"])

    here = found()
    shutil.copytree(tmp_path / "layers.2", tmp_path / "copied" / "layers.2")
    brought.value["dictionary"]["path"] = str(tmp_path / "copied" / "layers.2")
    assert found() == here
    (tmp_path / "copied" / "layers.2" / "README.md").write_text("No part of it.")
    assert found() == here
    write_sparsify(tmp_path / "copied" / "layers.2", 8, 32, seed=1)
    assert found() != here


def test_changed_file_is_named_when_a_run_goes_on(
    brought: Any, execute: Any, tmp_path: Path
) -> None:
    execute()
    write_sparsify(tmp_path / "layers.2", 8, 32, seed=1)
    with pytest.raises(ConfigError, match=r"dictionary\.settings\.path\.sae\.safetensors"):
        execute()
    done = execute(restart_from="dictionary")
    assert done.kinds("dictionary")[-1] == "done"
    assert done.kinds("features")[-1] == "done"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "nowhere"}, "nowhere holds no autoencoder of a known format"),
        ({"format": "gemma_scope"}, r"lacks params\.npz, which the format gemma_scope needs"),
        ({"layer": 3}, "block 2, .*: set dictionary.layer to 2"),
        ({"layer": 7, "path": "far"}, "has 5 blocks"),
        ({"path": "wide"}, "width 12, but student .* has width 8"),
        ({"path": "damaged"}, r"sae\.safetensors can't be read"),
        ({"steps": 3}, "leave out steps"),
    ],
)
def test_files_that_can_t_be_used_are_refused_before_anything_runs(
    settings: dict[str, Any], message: str, brought: Any, tmp_path: Path
) -> None:
    write_sparsify(tmp_path / "far", 8, 32)
    write_sparsify(tmp_path / "wide", 12, 32)
    write_sparsify(tmp_path / "damaged", 8, 32)
    (tmp_path / "damaged" / "sae.safetensors").write_bytes(b"x" * 100)
    brought.value["dictionary"] |= settings
    with pytest.raises(ConfigError, match=message):
        job_of(brought)


def test_layer_in_the_recipe_counts_from_0_and_ends_before_the_final_norm(tmp_path: Path) -> None:
    """layer L = output of block L = hidden_states[L + 1], save the last, which Hugging Face norms.

    The models are random: 32 blocks as in the 8B Llamas, and one of GPT-2's make.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from stages.engines import MaskedSequence
    from stages.engines.settings import ModelSettings

    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=32,
        num_attention_heads=2,
        vocab_size=100,
    )
    gpt2 = GPT2Config(
        n_embd=16, n_layer=4, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    ids = [5, 17, 60, 3, 9]
    for name, model, layer in (
        ("llama", LlamaForCausalLM(llama), 30),
        ("gpt2", GPT2LMHeadModel(gpt2), 2),
    ):
        model.eval().save_pretrained(tmp_path / name)
        with torch.inference_mode():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        settings = ModelSettings(model=str(tmp_path / name))
        found = TransformersReader(settings).activations([MaskedSequence(ids, [True] * 5)], layer)
        torch.testing.assert_close(
            torch.from_numpy(found), states[layer + 1][0], rtol=1e-5, atol=1e-5
        )
        assert not torch.allclose(torch.from_numpy(found), states[layer][0], atol=1e-3)
        last = TransformersReader(settings).activations(
            [MaskedSequence(ids, [True] * 5)], layer + 1
        )
        final_norm = model.model.norm if name == "llama" else model.transformer.ln_f
        with torch.inference_mode():
            normed = final_norm(torch.from_numpy(last))
        torch.testing.assert_close(normed, states[layer + 2][0], rtol=1e-4, atol=1e-4)
