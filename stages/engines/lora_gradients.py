"""Gradients of low-rank adapters that were never trained, projected to few dimensions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from stages.engines import ScoreRequest
from stages.engines.output_head import decoder_of, output_head_of
from stages.engines.packing import Segment
from stages.errors import EngineError


class LoraGradients:
    r"""Projected adapter gradients of single requests.

    An adapter adds B A x to the output W x of a frozen linear layer, with A random and B = 0, so
    that only B has a gradient. For the mean loss L of a request's target,

    .. math:: \nabla_B L = \sum_t \frac{\partial L}{\partial y_t} (A x_t)^\top

    over its tokens t, with y the layer's output. The gradients of all linear layers of the blocks,
    side by side, are projected by a sparse Johnson-Lindenstrauss matrix: every coordinate goes,
    with a random sign, to one random coordinate of few, which keeps inner products in expectation.

    In the manner of LESS (arXiv 2402.04333), and simpler than it: LESS trains the adapters first,
    sums over checkpoints, and preconditions rows' gradients with Adam's moments.
    """

    def __init__(
        self, model: Any, rank: int, dimensions: int, seed: int, *, packed: bool = False
    ) -> None:
        """Draw the adapters' A and the projection, on the CPU, so that a seed means the same.

        Args:
            model: a causal language model whose weights need no gradient.
            rank: rows of A, whose entries are normal of variance 1 / inputs.
            dimensions: of the projection.
            seed: of both.
            packed: whether the model attends within segments (`use_packed_attention`).

        Raises:
            EngineError: the blocks have no linear layer.
        """
        self._model = model
        self._packed = packed
        self._dimensions = dimensions
        draw = torch.Generator().manual_seed(seed)
        self._layers = [
            _Adapted(module, rank, dimensions, draw)
            for module in decoder_of(model).modules()
            if isinstance(module, (nn.Linear, Conv1D))
        ]
        if not self._layers:
            raise EngineError("the model's blocks have no linear layer to adapt")

    def __call__(self, request: ScoreRequest) -> Tensor:
        """The projected gradient of one request, float32 [dimensions].

        One forward and one backward pass, whose activations are held.

        Args:
            request: with a prompt and a target of at least one token.
        """
        prompt, target = request
        device = self._model.device
        ids = torch.tensor([[*prompt, *target]], device=device)
        projected = torch.zeros(self._dimensions, device=device)
        # It may ask the model's own forward, which the hooks would take part in.
        head = output_head_of(self._model)
        hooks = [layer.watch(projected) for layer in self._layers]
        try:
            with torch.enable_grad():
                embedding = cast(nn.Embedding, self._model.get_input_embeddings())
                inputs = embedding(ids).detach().requires_grad_()
                states = decoder_of(self._model)(
                    inputs_embeds=inputs, use_cache=False, **self._options(ids.shape[1])
                ).last_hidden_state[0, len(prompt) - 1 : -1]
                logits = head(states).float()
                loss = cross_entropy(logits, torch.tensor(list(target), device=device))
                # The layers' hooks take what they need on the way; this gradient itself is unused.
                torch.autograd.grad(loss, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return projected

    def _options(self, tokens: int) -> dict[str, Any]:
        """What a model that attends within segments must be told: all tokens are one."""
        return {"segments": [(Segment(0, tokens, 0, 0), None)]} if self._packed else {}


class _Adapted:
    """One linear layer with its adapter's A and its part of the projection."""

    def __init__(
        self, module: nn.Linear | Conv1D, rank: int, dimensions: int, draw: torch.Generator
    ) -> None:
        self._module = module
        weight = module.weight
        # GPT-2's linear layers are called Conv1D and hold their weights transposed.
        inputs, outputs = weight.shape if isinstance(module, Conv1D) else weight.shape[::-1]
        a = torch.randn(rank, inputs, generator=draw) / inputs**0.5
        bucket = torch.randint(dimensions, (outputs * rank,), generator=draw)
        sign = torch.randint(2, (outputs * rank,), generator=draw).mul_(2).sub_(1)
        self._a = a.to(weight.device)
        self._bucket = bucket.to(weight.device)
        self._sign = sign.to(weight.device, torch.int8)

    def watch(self, projected: Tensor) -> Any:
        """Add the projection of this layer's gradient during the next backward pass."""

        def forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            reduced = inputs[0].detach().flatten(0, -2).float() @ self._a.T

            def backward(gradient: Tensor) -> None:
                full = gradient.flatten(0, -2).float().T @ reduced
                projected.index_add_(0, self._bucket, full.flatten() * self._sign)

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return self._module.register_forward_hook(forward)
