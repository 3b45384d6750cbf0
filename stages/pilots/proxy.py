"""Proxies: small language models, their training on responses, and their loss on targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from stages.engines import MaskedSequence
from stages.engines.output_head import decoder_of, output_head_of
from stages.pilots.settings import ProxySettings, ProxyTrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EVALUATION_ROWS = 16


def small_llama(settings: ProxySettings, vocabulary: int, seed: int) -> PreTrainedModel:
    """A Llama with random weights, input and output embeddings tied.

    Args:
        settings: its shape.
        vocabulary: tokens.
        seed: of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=8 * settings.width // 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast("PreTrainedModel", cast(Any, LlamaForCausalLM)(config))


def response_losses(
    model: PreTrainedModel, rows: Sequence[MaskedSequence]
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Negative log-likelihoods of the counted tokens, and the row of each.

    .. math:: \ell_t = -\log p(y_t \mid y_{<t})

    Source: definition; logits are computed only where a counted token follows.

    Args:
        model: a causal language model.
        rows: ids, and which of them count; a row's first token never does.

    Returns:
        float32 [tokens] in nats, int64 [tokens].
    """
    device = model.device
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    there = torch.zeros(len(rows), longest, dtype=torch.int64)
    keep = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        there[place, : len(row.ids)] = 1
        keep[place, : len(row.ids)] = torch.tensor(row.keep)
    states = decoder_of(model)(
        input_ids=ids.to(device), attention_mask=there.to(device), use_cache=False
    ).last_hidden_state
    owner, position = torch.nonzero(keep[:, 1:], as_tuple=True)
    logits = output_head_of(model)(states[owner.to(device), position.to(device)]).float()
    follows = ids[owner, position + 1].to(device)
    return functional.cross_entropy(logits, follows, reduction="none"), owner


def train_proxy(
    model: PreTrainedModel,
    rows: Sequence[MaskedSequence],
    settings: ProxyTrainingSettings,
    seed: int,
) -> int:
    """Train a model on responses, in place: AdamW, linear warm-up, linear decay to zero.

    Steps depend on the number of rows alone, so that every mixture of one size gets the same.

    Args:
        model: in float32.
        rows: one pass of them, in order; later passes are shuffled.
        settings: of the training.
        seed: of the order of later passes.

    Returns:
        Tokens that a loss was computed of.

    Raises:
        FloatingPointError: the loss isn't finite.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )
    per_pass = -(-len(rows) // settings.batch)
    steps = per_pass * settings.passes
    warm = max(1, int(settings.warmup_share * steps))
    order = np.random.default_rng(seed)
    tokens = done = 0
    model.train()
    for reading in range(settings.passes):
        places = np.arange(len(rows)) if reading == 0 else order.permutation(len(rows))
        for start in range(0, len(rows), settings.batch):
            rate = min((done + 1) / warm, (steps - done) / max(steps - warm, 1))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            batch = [rows[i] for i in places[start : start + settings.batch].tolist()]
            losses, _ = response_losses(model, batch)
            loss = losses.mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {done + 1} of {steps}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            tokens += len(losses)
            done += 1
    return tokens


def mean_losses(
    model: PreTrainedModel, rows: Sequence[MaskedSequence], task: NDArray[np.int64], tasks: int
) -> NDArray[np.float64]:
    r"""Mean loss per counted token of each task.

    .. math:: L_t = \frac{\sum_{i \in t} \sum_j \ell_{ij}}{\sum_{i \in t} n_i}

    Source: definition.

    Args:
        model: a causal language model.
        rows: target rows.
        task: of each row, [rows].
        tasks: how many there are.

    Returns:
        float64 [tasks], nats.
    """
    totals, counts = np.zeros(tasks), np.zeros(tasks)
    # Rows of like length together: padding is computed for nothing.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    model.train(False)
    with torch.inference_mode():
        for start in range(0, len(order), _EVALUATION_ROWS):
            places = order[start : start + _EVALUATION_ROWS]
            losses, owner = response_losses(model, [rows[i] for i in places])
            of = task[np.array(places)][owner.numpy()]
            totals += np.bincount(of, weights=losses.double().cpu().numpy(), minlength=tasks)
            counts += np.bincount(of, minlength=tasks)
    return np.asarray(totals / counts, np.float64)
