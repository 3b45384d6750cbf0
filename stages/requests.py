"""Which rows a row stage is asked for, and what stands in the columns of the others."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import pyarrow as pa

from stages.rows import NOT_REQUESTED, key_hash
from stages.rules import rule_mask


def lowest_keys(ids: Iterable[str], seed: int, limit: int, others: Sequence[int] = ()) -> list[int]:
    """The `limit` lowest hashes of (id, seed), ascending, of these rows and of other hashes."""
    return heapq.nsmallest(limit, [*others, *(key_hash(row, seed) for row in ids)])


def requested_rows(
    rows: pa.Table, where: str | None, highest_key: int | None, seed: int
) -> list[bool]:
    """By row, whether it meets the rule and its hash of (id, seed) isn't above the highest.

    Args:
        rows: their ids, and the columns that the rule names.
        where: a rule; None: every row meets it.
        highest_key: None: there is no limit.
        seed: of the run.
    """
    mask: list[bool] = rule_mask(where, rows).to_pylist() if where else [True] * rows.num_rows
    if highest_key is None:
        return mask
    return [
        met and key_hash(row, seed) <= highest_key
        for met, row in zip(mask, rows["id"].to_pylist(), strict=True)
    ]


def not_requested_columns(stage: str, adds: pa.Schema, rows: int) -> pa.Table:
    """Columns of rows that a stage wasn't asked for: nulls, and the status that says so."""
    columns = [
        pa.array([NOT_REQUESTED] * rows, pa.string()).cast(field.type)
        if field.name == f"{stage}_status"
        else pa.nulls(rows, field.type)
        for field in adds
    ]
    return pa.table(columns, schema=adds)
