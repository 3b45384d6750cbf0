"""The data set of prefixes: token ids to train on, one line a prompt of the emitted rows.

Source: UPFT (arXiv 2503.02875), Eq. 8: the loss is that of the prefix, and of the whole solution
for a share of the prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stages.emission.gather import Gathered
from stages.emission.sample import IntArray
from stages.rows import group_id

IGNORED = -100
"""Label of a token without a loss, as PyTorch's cross entropy has it."""

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("attention_mask", pa.list_(pa.int8())),
        ("labels", pa.list_(pa.int32())),
        ("id", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("text", pa.string()),
    ]
)
"""Ids of prompt and solution; labels are the solution's ids. `text` is for people."""


@dataclass(frozen=True)
class PrefixFacts:
    """Numbers of the data set of prefixes.

    Attributes:
        lines: by split.
        kinds: lines by `prefix` or `full`.
        trained: tokens with a loss, ends included.
        prompts: tokens of the prompts.
        whole: mean trained tokens of a whole solution, None where there is none.
        sampled: tokens drawn, for all rows that the stage was asked for.
        solved: rows that it drew something for.
    """

    lines: Mapping[str, int]
    kinds: Mapping[str, int]
    trained: int
    prompts: int
    whole: float | None
    sampled: int
    solved: int

    @property
    def full_trained(self) -> float | None:
        """Tokens with a loss, had every prompt kept its whole solution (estimated)."""
        return None if self.whole is None else self.whole * sum(self.lines.values())

    @property
    def trained_saving(self) -> float | None:
        """Share of trained tokens saved against whole solutions."""
        full = self.full_trained
        return None if not full else 1 - self.trained / full

    @property
    def sampled_saving(self) -> float | None:
        """Share of drawn tokens saved against whole solutions."""
        if self.whole is None or not self.solved:
            return None
        return 1 - self.sampled / (self.whole * self.solved)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "lines": dict(self.lines),
            "kinds": dict(self.kinds),
            "trained_tokens": self.trained,
            "prompt_tokens": self.prompts,
            "mean_whole_tokens": self.whole,
            "estimated_whole_tokens": self.full_trained,
            "trained_saving": self.trained_saving,
            "sampled_tokens": self.sampled,
            "sampled_saving": self.sampled_saving,
        }


def prefix_tables(gathered: Gathered, splits: Mapping[str, IntArray]) -> dict[str, pa.Table]:
    """Lines by split, in the order of the rows; splits without a line are left out.

    Of rows that share a prompt the first one's is taken.

    Args:
        gathered: the emitted rows.
        splits: emitted row numbers, by split.
    """
    tables: dict[str, pa.Table] = {}
    if not gathered.holds("prefix_kind"):
        return tables
    for split, order in splits.items():
        _, first = np.unique(order, return_index=True)
        rows = order[np.sort(first)]
        seen: set[str] = set()
        pieces = [
            _lines(gathered.rows(rows[start : start + _ROWS], _READ), seen)
            for start in range(0, len(rows), _ROWS)
        ]
        table = pa.concat_tables(pieces).combine_chunks()
        if table.num_rows:
            tables[split] = table
    return tables


def prefix_facts(tables: Mapping[str, pa.Table], gathered: Gathered) -> PrefixFacts | None:
    """Numbers of these lines; None where there are none.

    A whole solution's length is the mean over the prompts that kept theirs: a hash drew them, so
    they are a sample of all. Solutions that had no end are missing from it.
    """
    if not tables:
        return None
    kinds: Counter[str] = Counter()
    trained, prompts, wholes = 0, 0, []
    for table in tables.values():
        for kind, labels in zip(table["kind"].to_pylist(), table["labels"], strict=True):
            count = int(np.count_nonzero(labels.values.to_numpy() != IGNORED))
            kinds[kind] += 1
            trained += count
            prompts += len(labels) - count
            if kind == "full":
                wholes.append(count)
    return PrefixFacts(
        lines={split: table.num_rows for split, table in tables.items()},
        kinds=dict(sorted(kinds.items())),
        trained=trained,
        prompts=prompts,
        whole=float(np.mean(wholes)) if wholes else None,
        sampled=gathered.spent["prefix_sampled_tokens"],
        solved=gathered.valued["prefix_sampled_tokens"],
    )


_ROWS = 1_024
"""Rows that are held as Python objects at once."""
_READ = (
    "id",
    "source",
    "effective",
    "prefix_kind",
    "prefix_prompt_ids",
    "prefix_ids",
    "prefix_text",
)


def _lines(rows: pa.Table, seen: set[str]) -> pa.Table:
    """Lines of the rows whose prompt hasn't been seen."""
    lines: list[dict[str, Any]] = []
    for row in rows.to_pylist():
        prompt = group_id(row["effective"], None)
        if row["prefix_kind"] is not None and prompt not in seen:
            seen.add(prompt)
            lines.append(_line(row))
    return pa.Table.from_pylist(lines, schema=SCHEMA)


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, solution = row["prefix_prompt_ids"], row["prefix_ids"]
    return {
        "input_ids": prompt + solution,
        "attention_mask": [1] * (len(prompt) + len(solution)),
        "labels": [IGNORED] * len(prompt) + solution,
        "id": row["id"],
        "source": row["source"],
        "kind": row["prefix_kind"],
        "text": row["prefix_text"],
    }
