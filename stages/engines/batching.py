"""Batches by token budget: similar lengths together, so that little work goes to padding."""

from __future__ import annotations

from collections.abc import Sequence


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that rows x longest row <= budget; longest first, ties by index.

    A row longer than the budget forms a batch of its own. The grouping depends on the lengths
    alone, which makes a shard's numbers reproducible.

    Args:
        lengths: tokens per row.
        budget: tokens per batch, padding included.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
