"""Batches by token budget: similar lengths together, so that little work goes to padding."""

from __future__ import annotations

from collections.abc import Sequence

FORWARD_OVERHEAD = 64
"""What one more forward batch costs beside its tokens, in tokens; measured on two cores."""


def token_budget_batches(
    lengths: Sequence[int], budget: int, overhead: int = FORWARD_OVERHEAD
) -> list[list[int]]:
    r"""Indices grouped so that padded work is least; longest first, ties by index.

    Of all ways to cut the rows, sorted by length, into batches of at most `budget` tokens (padding
    included), the one that minimises

    .. math:: \sum_{b} \bigl(|b| \cdot \max_{i \in b} \ell_i + c\bigr)

    where c is the overhead of a batch. A row longer than the budget forms a batch of its own. The
    grouping depends on the lengths alone, which makes a shard's numbers reproducible.

    Args:
        lengths: tokens per row.
        budget: tokens per batch, padding included.
        overhead: of one more batch, in tokens: small where every token is computed once, large
            where a batch is stepped through token by token.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    # best[j]: least cost of the first j rows; cut[j]: where their last batch starts.
    best, cut = [0], [0]
    for stop in range(1, len(order) + 1):
        cost, start = min(
            (best[start] + (stop - start) * lengths[order[start]] + overhead, start)
            for start in _starts(order, lengths, stop, budget)
        )
        best.append(cost)
        cut.append(start)
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[cut[stop] : stop])
        stop = cut[stop]
    return batches[::-1]


def _starts(order: Sequence[int], lengths: Sequence[int], stop: int, budget: int) -> range:
    """Where a batch that ends before `stop` may start."""
    first = stop - 1
    while first > 0 and (stop - first + 1) * lengths[order[first - 1]] <= budget:
        first -= 1
    return range(first, stop)
