"""The selection stage: filters, then the best rows by a method, with a reason for every row."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stages.base import Columns, Outcome, ShardedColumns
from stages.errors import ConfigError, StageError
from stages.licenses import LicensePolicy, license_name
from stages.overlap import TELLING_WORDS
from stages.rows import LABEL, Message, row_id
from stages.rules import rule_columns, rule_mask
from stages.selection.activation_coverage import ACTIVE, coverage_report
from stages.selection.methods import method_of
from stages.selection.overrides import DROPPED_BY, KEPT_BY, overrides_digest, read_overrides
from stages.selection.ranking import FloatArray, IntArray, best_rows, id_order
from stages.selection.semantic import SemanticDuplicates, vectors_of
from stages.selection.settings import SelectionSettings
from stages.selection.strata import length_strata, stratum_quotas
from stages.storage import Store
from stages.words import words

KEPT = "kept"
BY_TARGET = "_by_target"
"""How the names of columns end that hold one score a target row."""

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

_OUTCOME = "reflection_outcome"
_REWRITTEN = ("instruction", "response", "both")
"""Outcomes of reflection after which a teacher's response stands."""

_BYTES_PER_TOKEN = 4
_WITH_DETAIL = ("duplicate_text", "duplicate_response", "semantic_duplicate", DROPPED_BY, KEPT)
"""Reasons that end in something of one row alone."""


@dataclass(frozen=True)
class _Rows:
    """What the pass over the shards keeps of every row, in order.

    Attributes:
        ids: string [n].
        sources: name of each row's source.
        reasons: why a row is dropped before any ranking; None where it isn't.
        scores: float64 [n], NaN where there is none.
        lacking: rows without what the method ranks by, bool [n].
        tokens: int64 [n].
        estimated: rows whose tokens no stage counted, bool [n].
        lists: the list column that the method ranks by, of the rows that it can rank.
    """

    ids: pa.ChunkedArray
    sources: list[str]
    reasons: list[str | None]
    scores: FloatArray
    lacking: NDArray[np.bool_]
    tokens: IntArray
    estimated: NDArray[np.bool_]
    lists: pa.ChunkedArray | None


class SelectionStage:
    """Keeps or drops every row; ties go to the lower id."""

    name = "selection"
    version = 3

    def __init__(
        self,
        settings: SelectionSettings,
        anchors: frozenset[str],
        present: frozenset[str],
        policy: LicensePolicy | None = None,
    ) -> None:
        """Keep the settings, the names of anchor sources and of the columns there are, the policy.

        Raises:
            ConfigError: a rule or the score names a column that no stage adds, or one that the
                method can't rank by.
        """
        self.settings = settings
        self._anchors = anchors
        self._policy = policy
        self._measured_tokens = "tokens" in present
        self._counts_features = ACTIVE in present
        self._is_reflected = _OUTCOME in present
        self._score, self._lists = _ranked_by(settings, present)
        ranked_by = {name for name in (self._score, self._lists) if name is not None}
        named = ranked_by.union(*(rule_columns(item.rule) for item in settings.filters))
        absent = sorted(named - present)
        if absent:
            raise ConfigError(
                f"selection names the column {absent[0]!r}, which no stage of this recipe adds; "
                f"there are {', '.join(sorted(present))}"
            )
        if settings.semantic_duplicates is not None and "embedding" not in present:
            raise ConfigError("selection.semantic_duplicates needs an embedding section")
        self._named = tuple(sorted(named))
        self._overrides = read_overrides(settings.overrides) if settings.overrides else {}

    def file_contents(self) -> Mapping[str, str | None]:
        """What people decided counts, wherever its file lies."""
        chosen = self.settings.overrides
        return {"overrides": overrides_digest(self._overrides) if chosen else None}

    def columns(self) -> Columns:
        """Ids, sources, effective texts, and the columns that it ranks by and its rules name."""
        tokens = ("tokens",) if self._measured_tokens else ()
        licenses = ("license",) if self._policy else ()
        vectors = () if self.settings.semantic_duplicates is None else ("embedding",)
        rewritten = (_OUTCOME,) if self.settings.duplicates and self._is_reflected else ()
        optional = (*tokens, *licenses, *vectors, *rewritten)
        needs = dict.fromkeys(("id", "source", "effective_messages", *self._named, *optional))
        return Columns(tuple(needs), pa.schema([]))

    def decide(
        self, columns: ShardedColumns, targets: ShardedColumns, artifacts: Mapping[str, Store]
    ) -> Outcome:
        """Decisions of all rows.

        Holds about 100 bytes a row. Of every row that is ranked it holds beside that, for method
        round_robin, 12 bytes a target row, and for coverage and mixed 8 bytes an active feature
        and about 130; with `semantic_duplicates` the vector of each kept row.
        """
        rows = self._passed(columns)
        self._check_overrides(rows.ids)
        reasons = list(rows.reasons)
        for place in self._beyond_the_cut(rows):
            reasons[place] = "below_cut"
        for place in np.flatnonzero(rows.lacking).tolist():
            if reasons[place] is None:
                reasons[place] = "kept: no score"
        keep = np.array([reason is None or reason.startswith(KEPT) for reason in reasons], bool)
        if not keep.any():
            counted = Counter(_code(reason) for reason in reasons)
            raise StageError(
                f"selection left no row of {len(keep)}: {dict(counted)}; loosen the filters",
                stage=self.name,
            )
        decisions = pa.table(
            {
                "id": rows.ids,
                "source": rows.sources,
                "keep": keep,
                "reason": [reason or KEPT for reason in reasons],
                "score": pa.array(rows.scores, pa.float32(), from_pandas=True),
                "tokens": rows.tokens,
            }
        ).cast(DECISIONS)
        report = self._report(rows.sources, reasons, keep)
        report["tokens_are"] = _how_counted(int(keep.sum()), int((keep & rows.estimated).sum()))
        if self._counts_features:
            report["activation_coverage"] = coverage_report(columns, targets, keep)
        return Outcome({"decisions.parquet": decisions}, report)

    def _passed(self, columns: ShardedColumns) -> _Rows:
        """One pass: what the filters say of every row, and what the rest is ranked by."""
        ids: list[pa.Array] = []
        sources: list[str] = []
        reasons: list[str | None] = []
        scores: list[FloatArray] = []
        lacking: list[NDArray[np.bool_]] = []
        tokens: list[IntArray] = []
        estimated: list[NDArray[np.bool_]] = []
        lists: list[pa.ChunkedArray] = []
        seen = self._anchor_texts(columns)
        responses: dict[bytes, str] = {}
        semantic = self._anchor_vectors(columns)
        for table in columns.iter(self.columns().needs):
            missing = self._missing(table)
            shard = self._shard_reasons(table, missing)
            if self.settings.duplicates:
                self._drop_duplicates(table, shard, seen, responses)
            if semantic is not None:
                _drop_semantic_duplicates(table, shard, semantic)
            ids += table["id"].chunks
            sources += table["source"].to_pylist()
            reasons += shard
            scores.append(self._scores(table))
            lacking.append(np.array([name is not None for name in missing], dtype=bool))
            uncounted = self._uncounted(table)
            estimated.append(uncounted)
            tokens.append(_tokens(table, uncounted))
            if self._lists is not None:
                able = [not (reason or none) for reason, none in zip(shard, missing, strict=True)]
                lists.append(table[self._lists].filter(pa.array(able, pa.bool_())))
        return _Rows(
            pa.chunked_array(ids, pa.string()),
            sources,
            reasons,
            np.concatenate(scores),
            np.concatenate(lacking),
            np.concatenate(tokens),
            np.concatenate(estimated),
            pa.chunked_array([chunk for column in lists for chunk in column.chunks], lists[0].type)
            if lists
            else None,
        )

    def _check_overrides(self, ids: pa.ChunkedArray) -> None:
        """Refuse decisions about rows that there aren't.

        Raises:
            StageError: naming them.
        """
        wanted = pa.array(sorted(self._overrides), pa.string())
        absent = wanted.filter(pc.invert(pc.is_in(wanted, ids.combine_chunks()))).to_pylist()
        if absent:
            raise StageError(
                f"selection.overrides decides about {len(absent)} rows that there aren't, such as "
                f"{', '.join(absent[:3])}; their sources changed, or ingest rejected them "
                "(`tamis why RUN ID` says): take them out of the file",
                stage=self.name,
            )

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

    def _shard_reasons(self, table: pa.Table, missing: Sequence[str | None]) -> list[str | None]:
        """Why each row of a shard is dropped by itself; None where it isn't."""
        reasons: list[str | None] = [
            "anchor" if source in self._anchors else None for source in table["source"].to_pylist()
        ]
        if self._policy:
            for place, stated in enumerate(table["license"].to_pylist()):
                if reasons[place] is None and not self._policy.allows(stated):
                    reasons[place] = f"license: {license_name(stated) or 'not stated'}"
        for place, row in enumerate(table["id"].to_pylist() if self._overrides else ()):
            if row in self._overrides and reasons[place] is None:
                reasons[place] = self._overrides[row].reason
        for item in self.settings.filters:
            for place, met in enumerate(rule_mask(item.rule, table).to_pylist()):
                if not met and reasons[place] is None:
                    reasons[place] = f"filter: {item.reason or item.rule}"
        if self.settings.missing == "drop":
            for place, name in enumerate(missing):
                if name is not None and reasons[place] is None:
                    reasons[place] = f"missing_score: {name}"
        return reasons

    def _drop_duplicates(
        self,
        table: pa.Table,
        reasons: list[str | None],
        seen: dict[bytes, str],
        responses: dict[bytes, str],
    ) -> None:
        """Put a reason where a row that has none yet repeats an earlier one's text or response.

        Args:
            table: rows of a shard.
            reasons: theirs.
            seen: the earlier rows' ids by their text; grows.
            responses: the same of rewritten rows by their response, where it is a telling one.
        """
        ids, texts = table["id"].to_pylist(), table["effective_messages"].to_pylist()
        outcomes = table[_OUTCOME].to_pylist() if self._is_reflected else [None] * len(ids)
        for place, (row, messages, outcome) in enumerate(zip(ids, texts, outcomes, strict=True)):
            text = _text_key(messages)
            if (reason := reasons[place]) is not None:
                if reason.startswith(KEPT):
                    seen.setdefault(text, row)
                continue
            response = _response_key(messages) if outcome in _REWRITTEN else None
            if text in seen:
                reasons[place] = f"duplicate_text: {seen[text]}"
            elif response in responses:
                reasons[place] = f"duplicate_response: {responses[response]}"
            else:
                seen[text] = row
                if response is not None:
                    responses[response] = row

    def _missing(self, table: pa.Table) -> list[str | None]:
        """By row, a column that it should be ranked by and hasn't; None where it has all."""
        missing: list[str | None] = [None] * table.num_rows
        for name in (self._lists, self._score):
            if name is not None:
                nulls = table[name].is_null(nan_is_null=name == self._score).to_numpy()
                for place in np.flatnonzero(nulls).tolist():
                    missing[place] = name
        return missing

    def _scores(self, table: pa.Table) -> FloatArray:
        if self._score is None:
            return np.full(table.num_rows, math.nan)
        column = table[self._score]
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            raise ConfigError(f"selection.score {self._score} is no number: {column.type}")
        return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)

    def _uncounted(self, table: pa.Table) -> NDArray[np.bool_]:
        """Rows whose tokens no stage counted, bool [n]."""
        if not self._measured_tokens:
            return np.ones(table.num_rows, bool)
        return np.asarray(table["tokens"].is_null().to_numpy(), bool)

    def _beyond_the_cut(self, rows: _Rows) -> list[int]:
        """Places of passing rows that rank behind the wanted number."""
        if not self.settings.ranks:
            return []
        passing = np.array([reason is None for reason in rows.reasons], bool)
        able = np.flatnonzero(passing & ~rows.lacking).astype(np.int64)
        number = np.cumsum(passing & ~rows.lacking) - 1
        pick = method_of(
            self.settings, rows.ids.take(pa.array(able)), rows.scores[able], rows.lists
        )
        beyond: list[int] = []
        for places, count in self._groups(rows, np.flatnonzero(passing).astype(np.int64)):
            lacking = rows.lacking[places]
            ranked, last = number[places[~lacking]], places[lacking]
            kept = able[pick(ranked, min(count, len(ranked)))]
            if count > len(ranked):
                order = best_rows(
                    np.zeros(len(last)), rows.ids.take(pa.array(last)), count - len(ranked)
                )
                kept = np.concatenate([kept, last[order]])
            beyond += np.setdiff1d(places, kept, assume_unique=True).tolist()
        return beyond

    def _groups(self, rows: _Rows, places: IntArray) -> list[tuple[IntArray, int]]:
        """Passing places that are ranked against each other, and how many of them to keep."""
        groups = [places]
        if self.settings.per_source:
            sources = np.array(rows.sources, dtype=object)[places]
            names = dict.fromkeys(sources.tolist())
            groups = [places[np.equal(sources, name).astype(bool)] for name in names]
        if self.settings.length_bins is None:
            return [(group, self._kept_number(len(group))) for group in groups]
        binned: list[tuple[IntArray, int]] = []
        for group in groups:
            ordered = group[id_order(rows.ids.take(pa.array(group)))]
            strata = length_strata(rows.tokens[ordered], self.settings.length_bins)
            quotas = stratum_quotas(strata, min(self._kept_number(len(group)), len(group)))
            binned += [(ordered[part], n) for part, n in zip(strata, quotas, strict=True)]
        return binned

    def _kept_number(self, passing: int) -> int:
        if self.settings.rows is not None:
            return self.settings.rows
        return max(1, math.floor(passing * (self.settings.share or 1.0) + 0.5))

    def _report(
        self, sources: list[str], reasons: list[str | None], keep: NDArray[np.bool_]
    ) -> dict[str, Any]:
        by_source: dict[str, Counter[str]] = {}
        for source, reason in zip(sources, reasons, strict=True):
            by_source.setdefault(source, Counter())[_code(reason)] += 1
        return {
            "rows": len(keep),
            "kept": int(keep.sum()),
            "reasons": dict(sorted(Counter(_code(reason) for reason in reasons).items())),
            "by_source": {name: dict(sorted(found.items())) for name, found in by_source.items()},
        }


def _tokens(table: pa.Table, uncounted: NDArray[np.bool_]) -> IntArray:
    """Tokens of each row's text, int64 [n]: as counted, else estimated from its bytes."""
    if uncounted.all():
        tokens = np.zeros(table.num_rows, np.int64)
    else:
        tokens = np.array(table["tokens"].fill_null(0).to_numpy(), np.int64)
    texts = table["effective_messages"].filter(pa.array(uncounted)).to_pylist()
    tokens[uncounted] = [
        sum(len(turn["content"].encode()) for turn in messages) // _BYTES_PER_TOKEN + 1
        for messages in texts
    ]
    return tokens


def _how_counted(kept: int, estimated: int) -> str:
    """Where the tokens of kept rows come from."""
    if not estimated:
        return "measured"
    some = "" if estimated == kept else f" for {estimated:,} of {kept:,} kept rows"
    return f"estimated{some}: UTF-8 bytes / {_BYTES_PER_TOKEN}"


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


def _ranked_by(
    settings: SelectionSettings, present: frozenset[str]
) -> tuple[str | None, str | None]:
    """The column of numbers and the column of lists that the method ranks by.

    Raises:
        ConfigError: the method needs a column of another kind, or one that isn't asked for.
    """
    score = settings.score
    if settings.method == "round_robin":
        if score is not None and not score.endswith(BY_TARGET):
            raise ConfigError(
                f"selection.method round_robin ranks by scores of every target row, and {score} is "
                f"one score; name a column that ends in {BY_TARGET}, which features and baselines "
                "add with by_target: true"
            )
        return None, score
    if score is not None and score.endswith(BY_TARGET):
        raise ConfigError(
            f"selection.score {score} holds a score of every target row; method {settings.method} "
            "ranks by one score (for these: method: round_robin)"
        )
    if settings.method == "top":
        return score, None
    if ACTIVE not in present:
        raise ConfigError(
            f"selection.method {settings.method} needs the column {ACTIVE}; set "
            "features.active_above, the activation above which a feature counts as active"
        )
    return score, ACTIVE


def _text_key(messages: Sequence[Message]) -> bytes:
    return bytes.fromhex(row_id(messages, None))


def _response_key(messages: Sequence[Message]) -> bytes | None:
    """What identifies the words of the last response; None where many rows may well share them."""
    responses = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    found = words(responses[-1]) if responses else []
    if len(found) < TELLING_WORDS:
        return None
    return hashlib.sha256(" ".join(found).encode()).digest()


def _code(reason: str | None) -> str:
    """The reason without what belongs to one row alone."""
    if reason is None:
        return KEPT
    if reason.startswith(KEPT_BY):
        return KEPT_BY
    return reason.split(":")[0] if reason.startswith(_WITH_DETAIL) else reason
