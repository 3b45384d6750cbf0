"""Gradients of each token's own loss with respect to its own state, for all tokens in one pass.

Through ordinary attention a token's state bears on the losses of all later tokens. Here two streams
pass the blocks: the states as they are, and a second in which every token has a state of its own
making. A token of the second stream reads the tokens before it in the first stream and itself in
the second, so that its loss depends on no other token's replaced state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.engines.attention import shared_head_attention
from stages.engines.model_files import blocks_of
from stages.engines.output_head import decoder_of, output_head_of
from stages.errors import EngineError

if TYPE_CHECKING:
    import torch

_NAME = "tamis_own_path"
_LOGITS_CHUNK = 256
"""Tokens whose logits are held at once."""


class OwnGradients(NamedTuple):
    """Of the tokens whose states were replaced, float32 [tokens, d].

    Attributes:
        states: as they were.
        gradient: of each one's loss, with respect to what stood in the state's place.
    """

    states: torch.Tensor
    gradient: torch.Tensor


def own_gradients(
    model: Any,
    ids: Sequence[int],
    places: Sequence[int],
    layer: int,
    replace: Callable[[torch.Tensor], torch.Tensor],
) -> OwnGradients:
    r"""The gradient of each token's next-token loss where its state alone is replaced.

    .. math:: g_t = \nabla_{y_t} \bigl[ -\log p(x_{t+1} \mid y_t, h_{<t}) \bigr]

    with h the output of the block and y what replaces it. One forward pass, of which the blocks
    after the layer take two streams, and one backward pass through those.

    Args:
        model: a causal language model.
        ids: of the row.
        places: tokens whose states are replaced; the row's last token isn't one.
        layer: block whose output is replaced, from 0.
        replace: float32 states [tokens, d] to others.

    Raises:
        EngineError: the model's attention has terms that two streams don't cover.
    """
    import torch

    model.requires_grad_(False)
    # It may ask the model's own forward, which must not meet the hook.
    head = output_head_of(model)
    device = model.device
    row = torch.tensor([list(ids)], device=device)
    where = torch.tensor(list(places), dtype=torch.long, device=device)
    held: list[torch.Tensor] = []

    def doubled(_module: Any, _inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        own = states[0, where].float()
        held.extend((own, replace(own).detach().requires_grad_()))
        with torch.enable_grad():
            second = states[0].index_copy(0, where, held[1].to(states.dtype))
            both = torch.stack([states[0], second])
        return (both, *output[1:]) if isinstance(output, tuple) else both

    handle = blocks_of(decoder_of(model))[layer].register_forward_hook(doubled)
    try:
        with _two_streams(model), torch.enable_grad():
            final = decoder_of(model)(input_ids=row, use_cache=False).last_hidden_state[1]
            slope = _loss_slope(head, final[where].detach(), row[0, where + 1])
            full = torch.zeros_like(final).index_copy(0, where, slope)
            (gradient,) = torch.autograd.grad(final, held[1], full)
    finally:
        handle.remove()
    return OwnGradients(held[0], gradient)


def own_path_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention; of two rows the second reads the first before each token, itself there.

    Args:
        module: the attention layer.
        query: [1 or 2, heads, tokens, d].
        key: [1 or 2, key heads, tokens, d].
        value: like key.
        attention_mask: bool [1, 1, tokens, tokens], true where a key may be read; None: all before.
        scaling: of the scores; None: 1 / sqrt(d).
        others: what the model's family adds.

    Returns:
        [1 or 2, tokens, heads, d], and None for the weights.

    Raises:
        EngineError: a family's addition would be left out.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise EngineError(f"attention with {name} isn't covered by concepts; use another model")
    first, _ = shared_head_attention(
        module, query[:1], key[:1], value[:1], attention_mask, scaling, is_causal=True
    )
    if len(query) == 1:
        return first, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Weights of all pairs of tokens are made again in the backward pass instead of being held.
    second = checkpoint(
        _second_stream, query, key, value, attention_mask, scale, use_reentrant=False
    )
    return torch.cat([first, second]), None


def _second_stream(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    import torch

    _, heads, tokens, width = query.shape
    groups = key.shape[1]
    asked = query[1].reshape(groups, heads // groups, tokens, width)
    scores = (asked @ key[0].unsqueeze(1).transpose(-1, -2)).float()
    own = (asked * key[1].unsqueeze(1)).sum(dim=-1, keepdim=True).float()
    itself = torch.eye(tokens, dtype=torch.bool, device=query.device)
    allowed = itself.cumsum(dim=1).bool().T.contiguous() if mask is None else mask[0, 0]
    scores = torch.where(itself, own, scores) * scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1).to(value.dtype)
    read = weights.masked_fill(itself, 0) @ value[0].unsqueeze(1)
    read = read + weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * value[1].unsqueeze(1)
    return read.reshape(heads, tokens, width).transpose(0, 1).unsqueeze(0)


def _loss_slope(
    head: Callable[[torch.Tensor], torch.Tensor], final: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Gradient of the summed loss with respect to final states, [tokens, d]."""
    import torch
    from torch.nn.functional import cross_entropy

    slopes: list[torch.Tensor] = []
    for start in range(0, len(final), _LOGITS_CHUNK):
        part = slice(start, start + _LOGITS_CHUNK)
        leaf, wanted = final[part].requires_grad_(), targets[part]
        loss = cross_entropy(head(leaf).float(), wanted, reduction="sum")
        slopes += torch.autograd.grad(loss, leaf)
    return torch.cat(slopes) if slopes else final


@contextmanager
def _two_streams(model: Any) -> Iterator[None]:
    """While open, the model attends by `own_path_attention`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_NAME, own_path_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
