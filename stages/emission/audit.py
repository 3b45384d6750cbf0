"""What reflection did, over all rows of the run: counts, cost, distributions, and a sample."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.emission.diffs import Piece, word_diff
from stages.rows import NOT_REQUESTED, Message, instruction, key_hash, messages_of, response

SAMPLED = 10
"""Rewrites shown of each outcome."""
LONGEST = 4_000
"""Characters of a text that is compared."""

_TOKENS = re.compile(r"^teacher_(\w+_)?tokens$")
_RESULT = re.compile(r"reflection_(\w+)_result")
EXCHANGES = "reflection_exchanges"
"""Column of all exchanges of a row, of which the row's own verdicts are those of the last."""

_PAIRS = {"ifd": ("ifd_before", "ifd_effective"), "rifd": ("rifd_before", "rifd_effective")}


@dataclass(frozen=True)
class Rewrite:
    """A rewritten row of the sample.

    Attributes:
        row: number in the run.
        id: of the row.
        source: its source.
        outcome: which rewrites stand.
        asked: the instruction that stands.
        scores: name, before, after.
        turns: role and word-level difference of every turn that changed.
        cut: whether a text was too long to be compared whole.
    """

    row: int
    id: str
    source: str
    outcome: str
    asked: str
    scores: list[tuple[str, float | None, float | None]]
    turns: list[tuple[str, list[Piece]]]
    cut: bool


@dataclass
class ReflectionAudit:
    """Fed shard by shard; keeps counts, SAMPLED rows an outcome, and 32 bytes a rewritten row.

    Attributes:
        seed: of the sample.
        asked: rows that reflection was asked for.
        rewritten: rows whose text it changed.
        outcomes: rows by outcome.
        results: verdicts and failures, by `instruction` or `response`, of every exchange.
        failures: failed rows by code.
        tokens: teacher tokens by column.
    """

    seed: int
    asked: int = 0
    rewritten: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    results: dict[str, Counter[str]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    _pairs: dict[str, list[npt.NDArray[np.float32]]] = field(default_factory=dict)
    _sample: dict[str, list[tuple[int, dict[str, Any]]]] = field(default_factory=dict)

    def see(self, table: pa.Table, start: int) -> None:
        """Take in a shard whose first row has the number `start`."""
        if "reflection_status" not in table.column_names:
            return
        status = table["reflection_status"].cast(pa.string())
        asked = table.filter(pc.not_equal(status, NOT_REQUESTED))
        self.asked += asked.num_rows
        for name in asked.column_names:
            if _TOKENS.match(name):
                self.tokens[name] += pc.sum(asked[name]).as_py() or 0
        for part, verdicts in _verdicts(asked).items():
            self.results.setdefault(part, Counter()).update(_counted(verdicts))
        self.outcomes.update(_counted(asked["reflection_outcome"]))
        failed = [text for text in asked["reflection_status"].to_pylist() if text != "ok"]
        self.failures.update(text.removeprefix("failed: ").split(":")[0] for text in failed)
        changed = pc.is_valid(table["messages_reflected"])
        numbers = start + np.flatnonzero(changed.to_numpy())
        self._rewritten(table.filter(changed), numbers.tolist())

    def pairs(self, name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Values of the rewritten rows before and after, both finite.

        Args:
            name: `ifd`, `rifd`, or `instruction` and `response` for their lengths in characters.
        """
        kept = self._pairs.get(name) or [np.zeros((2, 0), np.float32)]
        before, after = np.concatenate(kept, axis=1)
        both = np.isfinite(before) & np.isfinite(after)
        return before[both], after[both]

    def sample(self) -> dict[str, list[Rewrite]]:
        """Rewrites by outcome, those of lowest hash of id and seed."""
        return {
            outcome: [_compared(values) for _, values in kept]
            for outcome, kept in sorted(self._sample.items())
        }

    def _rewritten(self, table: pa.Table, numbers: list[int]) -> None:
        if not table.num_rows:
            return
        self.rewritten += table.num_rows
        both = list(zip(messages_of(table), messages_of(table, "messages_reflected"), strict=True))
        for name, text in (("instruction", instruction), ("response", response)):
            texts = [(text(a or []) or "", text(b or []) or "") for a, b in both]
            lengths = [[len(a), len(b)] for a, b in texts if a != b]
            found = np.array(lengths, dtype=np.float32).reshape(-1, 2).T
            self._pairs.setdefault(name, []).append(found)
        for name, ends in _PAIRS.items():
            if set(ends) <= set(table.column_names):
                found = np.stack([_numbers(table[end]) for end in ends])
                self._pairs.setdefault(name, []).append(found)
        shown = ["id", "source", "reflection_outcome", "messages", "messages_reflected"]
        shown += [end for ends in _PAIRS.values() for end in ends if end in table.column_names]
        hashes = [key_hash(f"diff:{row}", self.seed) for row in table["id"].to_pylist()]
        outcomes = table["reflection_outcome"].to_pylist()
        for place in sorted(range(table.num_rows), key=hashes.__getitem__):
            kept = self._sample.setdefault(outcomes[place] or "unknown", [])
            if len(kept) < SAMPLED or hashes[place] < kept[-1][0]:
                values = table.select(shown).slice(place, 1).to_pylist()[0]
                kept.append((hashes[place], {"row": numbers[place], **values}))
                kept.sort(key=lambda item: item[0])
                del kept[SAMPLED:]


def _compared(values: dict[str, Any]) -> Rewrite:
    before: list[Message] = values["messages"]
    after: list[Message] = values["messages_reflected"]
    turns, cut = [], False
    for old, new in zip_longest(before, after, fillvalue=Message(role="", content="")):
        texts = old["content"], new["content"]
        if texts[0] != texts[1]:
            cut |= max(map(len, texts)) > LONGEST
            turns.append(
                (new["role"] or old["role"], word_diff(texts[0][:LONGEST], texts[1][:LONGEST]))
            )
    scores = [
        (name, values[ends[0]], values[ends[1]])
        for name, ends in _PAIRS.items()
        if ends[0] in values and ends[1] in values
    ]
    return Rewrite(
        row=values["row"],
        id=values["id"],
        source=values["source"],
        outcome=values["reflection_outcome"],
        asked=instruction(after) or "",
        scores=scores,
        turns=turns,
        cut=cut,
    )


def _verdicts(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Verdicts of every exchange where they are known, else of the last, by what was rewritten."""
    parts = {
        match.group(1): name for name in table.column_names if (match := _RESULT.fullmatch(name))
    }
    if EXCHANGES not in table.column_names:
        return {part: table[name] for part, name in parts.items()}
    exchanges = pc.list_flatten(table[EXCHANGES])
    return {part: pc.struct_field(exchanges, f"{part}_result") for part in parts}


def _counted(column: pa.ChunkedArray) -> Counter[str]:
    pairs = column.cast(pa.string()).drop_null().value_counts().to_pylist()
    return Counter({pair["values"]: pair["counts"] for pair in pairs})


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float32)
