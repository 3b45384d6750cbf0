"""Small random models of other makes than the student's, against the library's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.engines import MaskedSequence, ScoreRequest
from stages.engines.output_head import output_head_of
from stages.engines.reader import TransformersReader
from stages.engines.scorer import TransformersScorer
from stages.engines.settings import ModelSettings
from stages.engines.splicer import TransformersSplicer
from stages.errors import EngineError

PREFIX = list(range(30, 42))
REQUESTS = [
    ScoreRequest([*PREFIX, 3], [9, 8, 7]),
    ScoreRequest([*PREFIX, 4, 5, 6], [11]),
    ScoreRequest([*PREFIX, 7], list(range(50, 69))),
    ScoreRequest([*PREFIX, 8], [12, 13]),
    ScoreRequest([1, 2], [3]),
]
"""Four begin alike, so that a scorer which shares prefixes shares theirs; lengths differ."""
SEQUENCES = [
    MaskedSequence([*prompt, *target], [False] + [True] * (len(prompt) + len(target) - 1))
    for prompt, target in REQUESTS
]


def gemma2(kinds: list[str]) -> Any:
    """Gemma 2 with bounds so low, and weights so large, that both bounds tell."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=len(kinds),
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        attn_logit_softcapping=1.5, final_logit_softcapping=2.0, sliding_window=5,
        layer_types=kinds, initializer_range=0.5, attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=100, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def scaled(make: str) -> Any:
    """A family that scales its logits: by a field of its configuration, or by one over it."""
    import transformers

    torch.manual_seed(0)
    own = {
        "Cohere": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
        "HyperCLOVAX": {"logits_scaling": 0.3},
    }[make]
    config = getattr(transformers, f"{make}Config")(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager", **own,
    )  # fmt: skip
    return getattr(transformers, f"{make}ForCausalLM")(config).eval()


SCALED = ["Cohere", "Granite", "HyperCLOVAX"]


@pytest.fixture(
    scope="module", params=["Gemma 2", "Gemma 2, every layer reads all", "GPT-2", *SCALED]
)
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "GPT-2":
        return gpt2()
    if request.param in SCALED:
        return scaled(request.param)
    first = "sliding_attention" if request.param == "Gemma 2" else "full_attention"
    return gemma2([first, "full_attention"] * 2)


def saved(model: Any, folder: Path) -> ModelSettings:
    model.save_pretrained(folder)
    return ModelSettings(model=str(folder), max_length=64, batch_tokens=80, threads=1)


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """Of every token but the first, by the library's model, [tokens - 1]."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]


def test_reader_reads_the_states_of_the_library(model: Any, tmp_path: Path) -> None:
    """Padded batches of several lengths, against one sequence at a time."""
    reader = TransformersReader(saved(model, tmp_path))
    for layer in (0, 1):
        found = reader.activations(SEQUENCES, layer)
        expected = []
        for sequence in SEQUENCES:
            ids = torch.tensor([list(sequence.ids)])
            with torch.inference_mode():
                states = model(ids, output_hidden_states=True).hidden_states[layer + 1][0]
            expected.append(states[torch.tensor(sequence.keep)].numpy())
        np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-4, atol=1e-4)


def test_scorer_scores_as_the_library_does(model: Any, tmp_path: Path) -> None:
    scorer = TransformersScorer(saved(model, tmp_path))
    expected = [
        float(log_probs(model, [*prompt, *target])[-len(target) :].sum())
        for prompt, target in REQUESTS
    ]
    np.testing.assert_allclose(scorer.score(REQUESTS).sums, expected, rtol=1e-4, atol=1e-4)
    found = scorer.first_tokens([prompt for prompt, _ in REQUESTS], list(range(100)))
    for row, (prompt, _) in enumerate(REQUESTS):
        with torch.inference_mode():
            logits = model(torch.tensor([list(prompt)])).logits[0, -1].double()
        np.testing.assert_allclose(found.log_probs[row], logits.log_softmax(-1), atol=1e-4)


def test_gradient_norms_are_those_of_the_librarys_loss(model: Any, tmp_path: Path) -> None:
    found = TransformersScorer(saved(model, tmp_path)).gradient_norms(REQUESTS)
    weight = model.get_input_embeddings().weight
    for norm, (prompt, target) in zip(found, REQUESTS, strict=True):
        ids = torch.tensor([[*prompt, *target]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, weight)
        assert norm == pytest.approx(float(gradient.norm()), rel=1e-3)


def test_losses_with_other_states_in_a_blocks_place_are_the_librarys(
    model: Any, tmp_path: Path
) -> None:
    """What the CE-loss recovered by an autoencoder is computed from."""
    splicer = TransformersSplicer(saved(model, tmp_path))
    clean, zeroed = (splicer.spliced(SEQUENCES, 1, replace) for replace in (None, torch.zeros_like))
    blocks = getattr(model.get_decoder(), "layers", None) or model.get_decoder().h
    for row, sequence in enumerate(SEQUENCES):
        kept = torch.tensor(sequence.keep)
        ids = list(sequence.ids)
        assert clean.sums[row] == pytest.approx(float(log_probs(model, ids).sum()), abs=1e-3)

        def zero(_m: Any, _i: Any, output: Any, kept: torch.Tensor = kept) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            states = states.clone()
            states[0, kept] = 0
            return (states, *output[1:]) if isinstance(output, tuple) else states

        hook = blocks[1].register_forward_hook(zero)
        expected = float(log_probs(model, ids).sum())
        hook.remove()
        assert zeroed.sums[row] == pytest.approx(expected, abs=1e-3)
        assert zeroed.sums[row] != pytest.approx(clean.sums[row], abs=1e-2)


def test_a_model_that_makes_its_logits_in_an_unknown_way_is_refused() -> None:
    """Scoring it would give wrong numbers without a word."""

    class Shifted(type(gpt2())):  # type: ignore[misc]
        def forward(self, *args: Any, **named: Any) -> Any:
            found = super().forward(*args, **named)
            found.logits = found.logits + torch.linspace(-5, 5, 100)
            return found

    model = gpt2()
    model.__class__ = Shifted
    with pytest.raises(EngineError, match="type gpt2 make their logits in a way"):
        output_head_of(model)
