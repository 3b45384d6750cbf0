"""The selection stage: filters, then the top by a named score, with a reason for every row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.base import Columns, Outcome, ShardedColumns
from stages.errors import ConfigError, StageError
from stages.licenses import LicensePolicy, license_name
from stages.rows import LABEL, Message, row_id
from stages.rules import rule_columns, rule_mask
from stages.selection.semantic import SemanticDuplicates, vectors_of
from stages.selection.settings import SelectionSettings
from stages.storage import Store

KEPT = "kept"

DECISIONS = pa.schema(
    [
        ("id", pa.string()),
        ("source", LABEL),
        ("keep", pa.bool_()),
        ("reason", pa.string()),
        ("score", pa.float32()),
        ("tokens", pa.int32()),
    ]
)
"""One row per ingested row, in the order of the shards."""

_BYTES_PER_TOKEN = 4
_WITH_DETAIL = ("duplicate_text", "semantic_duplicate", KEPT)
"""Reasons that end in something of one row alone."""


class SelectionStage:
    """Keeps or drops every row; ties go to the lower id."""

    name = "selection"
    version = 1

    def __init__(
        self,
        settings: SelectionSettings,
        anchors: frozenset[str],
        present: frozenset[str],
        policy: LicensePolicy | None = None,
    ) -> None:
        """Keep the settings, the names of anchor sources and of the columns there are, the policy.

        Raises:
            ConfigError: a rule or the score names a column that no stage adds.
        """
        self.settings = settings
        self._anchors = anchors
        self._policy = policy
        self._measured_tokens = "tokens" in present
        named = set().union(*(rule_columns(item.rule) for item in settings.filters))
        if settings.score:
            named.add(settings.score)
        absent = sorted(named - present)
        if absent:
            raise ConfigError(
                f"selection names the column {absent[0]!r}, which no stage of this recipe adds; "
                f"there are {', '.join(sorted(present))}"
            )
        if settings.semantic_duplicates is not None and "embedding" not in present:
            raise ConfigError("selection.semantic_duplicates needs an embedding section")
        self._named = tuple(sorted(named))

    def columns(self) -> Columns:
        """Ids, sources, effective texts, and the columns that its rules name."""
        tokens = ("tokens",) if self._measured_tokens else ()
        licenses = ("license",) if self._policy else ()
        vectors = () if self.settings.semantic_duplicates is None else ("embedding",)
        needs = dict.fromkeys(
            ("id", "source", "effective_messages", *self._named, *tokens, *licenses, *vectors)
        )
        return Columns(tuple(needs), pa.schema([]))

    def decide(
        self, columns: ShardedColumns, targets: ShardedColumns, artifacts: Mapping[str, Store]
    ) -> Outcome:
        """Decisions of all rows.

        Holds about 100 bytes a row, and with `semantic_duplicates` the vector of each kept one.
        """
        ids: list[str] = []
        sources: list[str] = []
        reasons: list[str | None] = []
        scores: list[float] = []
        tokens: list[int] = []
        seen = self._anchor_texts(columns)
        semantic = self._anchor_vectors(columns)
        for table in columns.iter(self.columns().needs):
            shard = self._shard_reasons(table, seen)
            if semantic is not None:
                _drop_semantic_duplicates(table, shard, semantic)
            ids += table["id"].to_pylist()
            sources += table["source"].to_pylist()
            reasons += shard
            scores += self._scores(table)
            tokens += self._tokens(table)
        for place in self._beyond_the_cut(ids, sources, reasons, scores):
            reasons[place] = "below_cut"
        for place, (reason, score) in enumerate(zip(reasons, scores, strict=True)):
            if reason is None and self.settings.score and math.isnan(score):
                reasons[place] = "kept: no score" if self.settings.missing == "keep_last" else None
        keep = [reason is None or reason.startswith(KEPT) for reason in reasons]
        if not any(keep):
            counted = Counter(_code(reason) for reason in reasons)
            raise StageError(
                f"selection left no row of {len(ids)}: {dict(counted)}; loosen the filters",
                stage=self.name,
            )
        decisions = pa.table(
            {
                "id": ids,
                "source": sources,
                "keep": keep,
                "reason": [reason or KEPT for reason in reasons],
                "score": pa.array(scores, pa.float32(), from_pandas=True),
                "tokens": tokens,
            }
        ).cast(DECISIONS)
        return Outcome({"decisions.parquet": decisions}, self._report(sources, reasons, keep))

    def _anchor_texts(self, columns: ShardedColumns) -> dict[bytes, str]:
        """Texts that the user already trains on: they count as seen wherever they stand."""
        seen: dict[bytes, str] = {}
        if not (self._anchors and self.settings.duplicates):
            return seen
        for table in columns.iter(("id", "source", "effective_messages")):
            for row, source, messages in zip(
                *(table[name].to_pylist() for name in table.column_names), strict=True
            ):
                if source in self._anchors:
                    seen[_text_key(messages)] = row
        return seen

    def _anchor_vectors(self, columns: ShardedColumns) -> SemanticDuplicates | None:
        """What rows are compared with by meaning, the anchors' vectors in it; None where off."""
        if self.settings.semantic_duplicates is None:
            return None
        found = SemanticDuplicates(self.settings.semantic_duplicates)
        for table in columns.iter(("id", "source", "embedding")) if self._anchors else ():
            anchors = pc.is_in(table["source"].cast(pa.string()), pa.array(sorted(self._anchors)))
            mine = table.filter(pc.and_(anchors, pc.is_valid(table["embedding"])))
            found.add(mine["id"].to_pylist(), vectors_of(mine["embedding"]))
        return found

    def _shard_reasons(self, table: pa.Table, seen: dict[bytes, str]) -> list[str | None]:
        """Why each row of a shard is dropped before any ranking; None where it isn't."""
        reasons: list[str | None] = [
            "anchor" if source in self._anchors else None for source in table["source"].to_pylist()
        ]
        if self._policy:
            for place, stated in enumerate(table["license"].to_pylist()):
                if reasons[place] is None and not self._policy.allows(stated):
                    reasons[place] = f"license: {license_name(stated) or 'not stated'}"
        for item in self.settings.filters:
            for place, met in enumerate(rule_mask(item.rule, table).to_pylist()):
                if not met and reasons[place] is None:
                    reasons[place] = f"filter: {item.reason or item.rule}"
        if self.settings.score and self.settings.missing == "drop":
            for place, score in enumerate(self._scores(table)):
                if math.isnan(score) and reasons[place] is None:
                    reasons[place] = f"missing_score: {self.settings.score}"
        if self.settings.duplicates:
            rows = zip(
                table["id"].to_pylist(), table["effective_messages"].to_pylist(), strict=True
            )
            for place, (row, messages) in enumerate(rows):
                if reasons[place] is None:
                    first = seen.setdefault(_text_key(messages), row)
                    if first != row:
                        reasons[place] = f"duplicate_text: {first}"
        return reasons

    def _scores(self, table: pa.Table) -> list[float]:
        if not self.settings.score:
            return [math.nan] * table.num_rows
        column = table[self.settings.score]
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            raise ConfigError(f"selection.score {self.settings.score} is no number: {column.type}")
        return [math.nan if value is None else float(value) for value in column.to_pylist()]

    def _tokens(self, table: pa.Table) -> list[int]:
        if self._measured_tokens:
            return [value or 0 for value in table["tokens"].to_pylist()]
        return [
            sum(len(turn["content"].encode()) for turn in messages) // _BYTES_PER_TOKEN + 1
            for messages in table["effective_messages"].to_pylist()
        ]

    def _beyond_the_cut(
        self, ids: list[str], sources: list[str], reasons: list[str | None], scores: list[float]
    ) -> list[int]:
        """Places of passing rows that rank behind the wanted number."""
        if not self.settings.score:
            return []
        sign = -1.0 if self.settings.order == "highest" else 1.0
        values = np.asarray(scores) * sign
        passing = [place for place, reason in enumerate(reasons) if reason is None]
        groups: dict[str, list[int]] = {}
        for place in passing:
            groups.setdefault(sources[place] if self.settings.per_source else "", []).append(place)
        beyond: list[int] = []
        for places in groups.values():
            ranked = sorted(places, key=lambda i: (math.isnan(values[i]), values[i], ids[i]))
            beyond += ranked[self._kept_number(len(ranked)) :]
        return beyond

    def _kept_number(self, passing: int) -> int:
        if self.settings.rows is not None:
            return self.settings.rows
        return max(1, math.floor(passing * (self.settings.share or 1.0) + 0.5))

    def _report(
        self, sources: list[str], reasons: list[str | None], keep: list[bool]
    ) -> dict[str, Any]:
        by_source: dict[str, Counter[str]] = {}
        for source, reason in zip(sources, reasons, strict=True):
            by_source.setdefault(source, Counter())[_code(reason)] += 1
        return {
            "rows": len(keep),
            "kept": sum(keep),
            "reasons": dict(sorted(Counter(_code(reason) for reason in reasons).items())),
            "by_source": {name: dict(sorted(found.items())) for name, found in by_source.items()},
            "tokens_are": "measured" if self._measured_tokens else "estimated: UTF-8 bytes / 4",
        }


def _drop_semantic_duplicates(
    table: pa.Table, reasons: list[str | None], kept: SemanticDuplicates
) -> None:
    """Put a reason where a row that has none yet, and a vector, duplicates a kept one."""
    there = table["embedding"].is_valid().to_pylist()
    places = [i for i, reason in enumerate(reasons) if reason is None and there[i]]
    rows = table.select(["id", "embedding"]).take(pa.array(places, pa.int64()))
    mates = kept.mates(rows["id"].to_pylist(), vectors_of(rows["embedding"]))
    for place, mate in zip(places, mates, strict=True):
        if mate is not None:
            reasons[place] = f"semantic_duplicate: {mate.id} (cosine {mate.cosine:.3f})"


def _text_key(messages: Sequence[Message]) -> bytes:
    return bytes.fromhex(row_id(messages, None))


def _code(reason: str | None) -> str:
    """The reason without what belongs to one row alone."""
    if reason is None:
        return KEPT
    return reason.split(":")[0] if reason.startswith(_WITH_DETAIL) else reason
