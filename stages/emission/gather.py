"""One pass over the run's columns: the emitted rows, and the scores of all rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.base import ShardedColumns
from stages.emission.audit import EXCHANGES, ReflectionAudit
from stages.emission.decisions import Decisions
from stages.emission.sample import FloatArray, IntArray
from stages.errors import StageError
from stages.licenses import license_name
from stages.rows import MESSAGES, ROWS, effective_messages, instruction

_HEAVY = re.compile(
    r"(^|_)(vector|embedding|code|latent|activation|indices|feature|by_target)s?($|_(?!similarity))"
)
_CHARTED = re.compile(
    r"^(r?ifd|ifd_before|ifd_effective|loss_conditional|p_think|pass_rate|budgeted_pass_rate"
    r"|failed_step_fraction|similarity.*)$"
)
_COUNTED = re.compile(r"(_status|outcome)$")
_CUT = re.compile(r"_truncated$|^embedding_chunks$")
_SPENT = re.compile(r"^(.+_)?tokens$")
PREFIX = ("prefix_kind", "prefix_prompt_ids", "prefix_ids", "prefix_text", "prefix_sampled_tokens")
"""Columns of the prefixes stage that make up a data set of their own."""
CONCEPTS = (
    "concept_input_ids",
    "concept_ids",
    "concept_scores",
    "concept_row_ids",
    "concept_row_scores",
)
"""The same of the concepts stage."""
APART = (*PREFIX, *CONCEPTS)


@dataclass
class Gathered:
    """What the pass keeps in memory: the emitted rows whole, and 4 bytes a row and chart.

    Attributes:
        chunks: row numbers (ascending) and columns of the emitted rows, shard by shard; the text
            is in `effective`, and in `original` that of a row which was rewritten.
        shown: the same of rows that the report shows, emitted or not.
        scores: charted columns of all rows, float32 [n], NaN where null.
        rewritten: bool [n].
        audit: of reflection.
        counts: outcomes and statuses of all rows, by column and value.
        cut: rows that have a value of a column on what a window held, and those that were cut.
        spent: sums over all rows, by column of tokens.
        valued: rows that have a value there.
        licenses: rows by source and licence (its name, None where none is stated).
    """

    chunks: list[tuple[IntArray, pa.Table]]
    shown: list[tuple[IntArray, pa.Table]]
    scores: dict[str, npt.NDArray[np.float32]]
    rewritten: npt.NDArray[np.bool_]
    audit: ReflectionAudit
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    cut: dict[str, tuple[int, int]] = field(default_factory=dict)
    spent: Counter[str] = field(default_factory=Counter)
    valued: Counter[str] = field(default_factory=Counter)
    licenses: dict[str, Counter[str | None]] = field(default_factory=dict)

    def rows(self, wanted: IntArray, names: Sequence[str] | None = None) -> pa.Table:
        """Columns (all, or those named) of emitted rows by number, in the order asked for."""
        if names is None:
            return _taken(self.chunks, wanted)
        return _taken([(rows, table.select(list(names))) for rows, table in self.chunks], wanted)

    def holds(self, name: str) -> bool:
        """Whether the emitted rows have a column."""
        return any(name in table.column_names for _, table in self.chunks)

    def shown_rows(self, wanted: IntArray) -> pa.Table:
        """The columns of shown rows, by row number, in the order asked for."""
        return _taken(self.shown, wanted)


def provenance_columns(present: Sequence[str]) -> tuple[str, ...]:
    """Columns added by stages that are small enough to travel with a row: no vectors."""
    own = {*ROWS.names, "messages_reflected", "answer_effective", "task"}
    return tuple(
        name
        for name in present
        if name not in own
        and name not in CONCEPTS
        and not _HEAVY.search(name)
        and not name.startswith("prefix")
    )


def audited_columns(present: Sequence[str]) -> tuple[str, ...]:
    """Columns that are counted over all rows, whether or not they travel with one."""
    return tuple(
        name
        for name in present
        if _COUNTED.search(name)
        or _CUT.search(name)
        or _SPENT.match(name)
        or re.fullmatch(r"reflection_\w+_result", name)
        or name == EXCHANGES
    )


def read_scores(columns: ShardedColumns, name: str) -> FloatArray:
    """A numeric column of all rows as float64 [n], NaN where null."""
    return np.concatenate([_numbers(table[name]) for table in columns.iter([name])])


def gather(
    columns: ShardedColumns,
    names: Sequence[str],
    decisions: Decisions,
    wanted: IntArray,
    shown: IntArray,
    seed: int,
) -> Gathered:
    """Stream the columns and keep the wanted rows.

    Args:
        columns: of the run.
        names: columns to read; `id` and `messages` among them.
        decisions: of the run, in the same order.
        wanted: numbers of the rows to keep, distinct and ascending, int64.
        shown: numbers of the rows that the report shows, likewise.
        seed: of the sample of rewrites.

    Raises:
        StageError: the rows aren't those that selection decided on.
    """
    total = len(decisions.keep)
    found = Gathered([], [], {}, np.zeros(total, dtype=bool), ReflectionAudit(seed))
    start = 0
    for table in columns.iter(names):
        stop = start + table.num_rows
        ids = table["id"].combine_chunks() if table.num_rows else decisions.ids.slice(0, 0)
        if not ids.equals(decisions.ids.slice(start, table.num_rows)):
            raise StageError(
                f"emission: rows {start} to {stop - 1} aren't those that selection decided on; "
                "run again from selection",
                stage="emission",
            )
        _count(found, table, slice(start, stop))
        found.audit.see(table, start)
        for numbers, chunks in ((wanted, found.chunks), (shown, found.shown)):
            first, last = np.searchsorted(numbers, (start, stop))
            if last > first:
                local = pa.array(numbers[first:last] - start)
                chunks.append((numbers[first:last], _compact(table.take(local))))
        start = stop
    if start != total:
        raise StageError(
            f"emission: selection decided on {total} rows and the run has {start}; "
            "run again from selection",
            stage="emission",
        )
    return found


def _taken(chunks: Sequence[tuple[IntArray, pa.Table]], wanted: IntArray) -> pa.Table:
    distinct = np.unique(wanted)
    parts = []
    for numbers, table in chunks:
        inside = np.isin(numbers, distinct, assume_unique=True)
        if inside.any():
            parts.append(table.filter(pa.array(inside)))
    merged = pa.concat_tables(parts).combine_chunks()
    return merged.take(pa.array(np.searchsorted(distinct, wanted)))


def _count(found: Gathered, table: pa.Table, here: slice) -> None:
    for name in table.column_names:
        kind = table.schema.field(name).type
        if _CHARTED.match(name) and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            scores = found.scores.setdefault(
                name, np.full(len(found.rewritten), np.nan, dtype=np.float32)
            )
            scores[here] = _numbers(table[name])
        if _COUNTED.search(name) and _is_label(kind):
            counted = found.counts.setdefault(name, Counter())
            for pair in table[name].cast(pa.string()).value_counts().to_pylist():
                if pair["values"] is not None:
                    # What comes after the code belongs to one row alone.
                    counted[": ".join(pair["values"].split(": ")[:2])] += pair["counts"]
        if _CUT.search(name):
            asked, cut = found.cut.get(name, (0, 0))
            over = pc.greater(table[name].cast(pa.int32()), 1 if name == "embedding_chunks" else 0)
            found.cut[name] = (
                asked + len(over) - over.null_count,
                cut + (pc.sum(over).as_py() or 0),
            )
        if _SPENT.match(name) and pa.types.is_integer(kind):
            found.spent[name] += pc.sum(table[name]).as_py() or 0
            found.valued[name] += table.num_rows - table[name].null_count
    _count_licenses(found, table)
    if "messages_reflected" in table.column_names:
        found.rewritten[here] = pc.is_valid(table["messages_reflected"]).to_numpy()


def _count_licenses(found: Gathered, table: pa.Table) -> None:
    if "license" not in table.column_names:
        return
    pairs = pa.table({name: table[name].cast(pa.string()) for name in ("source", "license")})
    counted = pairs.group_by(["source", "license"]).aggregate([([], "count_all")])
    for source, stated, count in zip(
        *(counted[name].to_pylist() for name in ("source", "license", "count_all")), strict=True
    ):
        found.licenses.setdefault(source, Counter())[license_name(stated)] += count


def _compact(table: pa.Table) -> pa.Table:
    """The emitted text, the original where it differs, and scalar columns in plain types."""
    columns: dict[str, Any] = {"effective": effective_messages(table)}
    if "messages_reflected" in table.column_names:
        rewritten = pc.is_valid(table["messages_reflected"])
        nothing = pa.nulls(table.num_rows, MESSAGES)
        columns["original"] = pc.if_else(rewritten, table["messages"], nothing)
    for name in table.column_names:
        column = table[name]
        if _is_label(column.type):
            columns[name] = column.cast(pa.string())
        elif (
            pa.types.is_integer(column.type)
            or pa.types.is_floating(column.type)
            or pa.types.is_boolean(column.type)
            or name in APART
        ):
            columns[name] = column
    if "answer_effective" in columns:
        # Rows that reflection wasn't asked for have no answer_effective, and keep their answer.
        effective = columns.pop("answer_effective")
        rewritten = pc.is_valid(table["messages_reflected"])
        columns["answer"] = pc.if_else(rewritten, effective, columns["answer"])
    elif "answer" in columns and "original" in columns:
        columns["answer"] = _answers(columns)
    return pa.table(columns).combine_chunks()


def _answers(columns: dict[str, Any]) -> pa.Array:
    """Answers, without those of questions that were rewritten."""
    answers = columns["answer"].to_pylist()
    for i in np.flatnonzero(pc.is_valid(columns["original"]).to_numpy()).tolist():
        asked = instruction(columns["original"][i].as_py())
        if asked != instruction(columns["effective"][i].as_py()):
            answers[i] = None
    return pa.array(answers, pa.string())


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_label(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _numbers(column: pa.ChunkedArray) -> FloatArray:
    numbers: FloatArray = column.cast(pa.float64()).to_numpy()
    return np.asarray(numbers, dtype=np.float64)
