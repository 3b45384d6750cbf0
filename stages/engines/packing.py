"""Packs: sequences laid end to end, so that no work goes to padding.

Linear layers see one long row of tokens; attention is computed sequence by sequence. A prefix that
sequences share is in the pack once, before them, and each of them reads it as its own beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.engines import TokenIds
from stages.engines.attention import attends_by_sdpa
from stages.engines.prefixes import SharedPrefix

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_NAME = "tamis_packed"


class Segment(NamedTuple):
    """Tokens [start, stop) of a pack, which continue those of its prefix [first, last)."""

    start: int
    stop: int
    first: int
    last: int


class Pack(NamedTuple):
    """What one forward takes.

    Attributes:
        ids: token ids.
        positions: each token's position in its own sequence.
        segments: prefixes and sequences, in order; they cover the pack.
        members: places of the sequences that it holds.
        origins: of each, where its first token would be: token t is at origin + t, but for those of
            its prefix.
    """

    ids: list[int]
    positions: list[int]
    segments: list[Segment]
    members: list[int]
    origins: list[int]


def packs_of(
    sequences: Sequence[TokenIds], groups: Sequence[SharedPrefix], budget: int
) -> list[Pack]:
    """Packs of at most `budget` tokens that hold every sequence once, in the groups' order.

    A sequence that doesn't fit a pack with its prefix has one of its own.

    Args:
        sequences: whole token sequences.
        groups: which of them begin with which prefix; each sequence is in one group.
        budget: tokens of a pack.
    """
    packs: list[Pack] = []
    for group in groups:
        shared = len(group.ids)
        prefix: Segment | None = None
        for member in group.members:
            own = sequences[member][shared:]
            more = len(own) + (shared if prefix is None else 0)
            if not packs or len(packs[-1].ids) + more > budget:
                packs.append(Pack([], [], [], [], []))
                prefix = None
            pack = packs[-1]
            if shared and prefix is None:
                prefix = _appended(pack, group.ids, 0)
            start = _appended(pack, own, shared, prefix).start
            pack.members.append(member)
            pack.origins.append(start - shared)
    return packs


def _appended(pack: Pack, ids: TokenIds, position: int, prefix: Segment | None = None) -> Segment:
    start = len(pack.ids)
    read = (prefix.start, prefix.stop) if prefix else (start, start)
    segment = Segment(start, start + len(ids), *read)
    pack.ids.extend(ids)
    pack.positions.extend(range(position, position + len(ids)))
    pack.segments.append(segment)
    return segment


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Have a model attend within segments; False, and no change, where it can't be told to.

    It can on a CPU, where attention goes through the library's interface by SDPA and every layer
    reads all that comes before. Elsewhere one call a sequence costs more than the padding that it
    saves.
    """
    from transformers import AttentionInterface

    able = getattr(model, "_supports_attention_backend", False) and attends_by_sdpa(model)
    if model.device.type != "cpu" or not able or not _reads_all(model.config):
        return False
    # Without a mask function of that name the model makes no mask, which would be tokens squared.
    AttentionInterface.register(_NAME, segment_attention)
    model.set_attn_implementation(_NAME)
    return True


def _reads_all(config: PreTrainedConfig) -> bool:
    """Whether every layer reads all that comes before a token, and not a window of it."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return all(window is None for window in windows)


def packed_states(decoder: Any, pack: Pack, device: torch.device) -> torch.Tensor:
    """Final states of a pack's tokens, [tokens, d]."""
    import torch

    states: torch.Tensor = decoder(
        input_ids=torch.tensor([pack.ids], device=device),
        position_ids=torch.tensor([pack.positions], device=device),
        use_cache=False,
        segments=[(segment, _mask(segment)) for segment in pack.segments],
    ).last_hidden_state
    return states[0]


def _mask(segment: Segment) -> torch.Tensor | None:
    """Which of the prefix and of its own tokens each token may read; None: all before it."""
    if segment.first == segment.last:
        return None
    import torch

    own, shared = segment.stop - segment.start, segment.last - segment.first
    allowed = torch.ones(own, shared + own, dtype=torch.bool).tril(diagonal=shared)
    return torch.zeros(own, shared + own).masked_fill(~allowed, float("-inf"))


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    segments: Sequence[tuple[Segment, torch.Tensor | None]],
    **others: Any,
) -> tuple[torch.Tensor, None]:
    r"""Causal attention within each segment of a pack.

    .. math:: o_t = \mathrm{softmax}\bigl(q_t K_{S(t)}^\top s\bigr) V_{S(t)}

    S(t) holds the tokens of t's prefix and those of its segment up to t.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, d].
        key: [1, key heads, tokens, d].
        value: like key.
        attention_mask: none; segments say what is read.
        scaling: s; None: 1 / sqrt(d).
        segments: each with its additive mask [own, prefix + own], or None without a prefix.
        others: what the model's family adds; the library's SDPA takes no notice of them either.

    Returns:
        [1, tokens, heads, d], and None for the weights.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    grouped = key.shape[1] != query.shape[1]
    pieces = []
    for (start, stop, first, last), mask in segments:
        keys, values = key[:, :, start:stop], value[:, :, start:stop]
        if mask is not None:
            keys = torch.cat([key[:, :, first:last], keys], dim=2)
            values = torch.cat([value[:, :, first:last], values], dim=2)
        attended = scaled_dot_product_attention(
            query[:, :, start:stop],
            keys,
            values,
            attn_mask=None if mask is None else mask.to(query.dtype),
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        pieces.append(attended.transpose(1, 2))
    return torch.cat(pieces, dim=1), None
