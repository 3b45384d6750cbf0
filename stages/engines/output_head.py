"""From final states to logits, as a model's own forward does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from stages.errors import EngineError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_FOUND = "factor_of_its_logits"
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Fields of configurations by which families multiply, or divide, what the head gives."""
_PROBED = 4
_NEAR = 0.02
"""Of the largest logit: numbers of 16 bits differ by less between two ways of computing them."""


def decoder_of(model: PreTrainedModel) -> Any:
    """The blocks without the output head."""
    find: Callable[[], Any] = model.get_decoder
    return find()


def output_head_of(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    r"""What turns final states into logits, scaled and bounded where the model does that.

    .. math:: c \tanh(a W h / c)

    Cohere, Granite, Falcon-H1 and others scale by a, Gemma 2 bounds by c (arXiv 2408.00118,
    section 2). Which a is meant differs between families, so that it is found by a short forward
    pass of the model itself, once.

    Raises:
        EngineError: the model makes its logits otherwise.
    """
    if _FOUND not in vars(model):
        factor = _factor_of(model)
        if factor is None:
            return _head(model, 1.0)
        vars(model)[_FOUND] = factor
    return _head(model, vars(model)[_FOUND])


def _head(model: PreTrainedModel, factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    find: Callable[[], Any] = model.get_output_embeddings
    head: Callable[[torch.Tensor], torch.Tensor] = find()
    bound = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if bound is None:
        return head if factor == 1 else lambda states: factor * head(states)
    return lambda states: bound * (factor * head(states) / bound).tanh()


def _factor_of(model: PreTrainedModel) -> float | None:
    """What the model scales its logits by; None where they are no numbers, which tell nothing."""
    import torch

    ids = torch.arange(_PROBED, device=model.device)[None]
    forward: Callable[..., Any] = model
    with torch.no_grad():
        states = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = forward(input_ids=ids, use_cache=False).logits[0].float()
        if not logits.isfinite().all():
            return None
        for factor in _candidates(model.config.get_text_config()):
            furthest = (_head(model, factor)(states).float() - logits).abs().max()
            if furthest <= _NEAR * logits.abs().max():
                return factor
    raise EngineError(
        f"models of type {model.config.model_type} make their logits in a way that is not known "
        "here, so that what was scored would be wrong; use engine: vllm, or another model"
    )


def _candidates(config: PreTrainedConfig) -> Iterator[float]:
    yield 1.0
    for name in _FACTORS:
        value = getattr(config, name, None)
        if value:
            yield float(value)
            yield 1 / float(value)
