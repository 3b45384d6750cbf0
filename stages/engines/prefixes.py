"""Prompts that begin alike: the part that they share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.engines import TokenIds

_LEAST_TOKENS = 8
_LEAST_PROMPTS = 4


@dataclass(frozen=True)
class SharedPrefix:
    """Places of the prompts that begin with `ids`, in ascending order."""

    ids: tuple[int, ...]
    members: list[int]


def shared_prefixes(prompts: Sequence[TokenIds]) -> list[SharedPrefix]:
    """Groups of prompts by a common beginning; those without one share the empty prefix.

    Every prompt is in one group. Prompts are grouped by their first 8 tokens, and a group shares
    all that its members have in common but for a prompt's last token, whose state predicts what
    follows. Under one chat template that is the header, the system turn and a fixed question.

    Args:
        prompts: token ids.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        start = tuple(prompt[:_LEAST_TOKENS]) if len(prompt) > _LEAST_TOKENS else ()
        groups.setdefault(start, []).append(place)
    alone: list[int] = groups.pop((), [])
    shared = []
    for members in groups.values():
        if len(members) < _LEAST_PROMPTS:
            alone += members
            continue
        shared.append(SharedPrefix(_common([prompts[i] for i in members]), members))
    if alone:
        shared.append(SharedPrefix((), sorted(alone)))
    return shared


def _common(prompts: Sequence[TokenIds]) -> tuple[int, ...]:
    """The longest common beginning that leaves every prompt at least one token."""
    # Of sorted sequences the first and the last differ earliest.
    ordered = sorted(map(list, prompts))
    first, last = ordered[0], ordered[-1]
    most = min(len(prompt) for prompt in ordered) - 1
    length = next((i for i in range(most) if first[i] != last[i]), most)
    return tuple(first[:length])
