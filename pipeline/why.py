"""One row's story: its record, its scores, what was rewritten, and why it was kept or dropped."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.flow import folder_of
from pipeline.rundir import opened_run, parts, read_manifest, row_stages_of
from stages.emission.diffs import word_diff
from stages.errors import ConfigError
from stages.rows import instruction
from stages.storage import Store

_LONGEST = 400
_MOST = 10
_LISTED = 40
_MARKS = {"equal": "{}", "delete": "[-{}-]", "insert": "{{+{}+}}"}
_OWN = ("id", "key", "messages_reflected", "embedding", "prefix_prompt_ids", "prefix_ids")
"""Columns that are shown otherwise, or say nothing to a person."""

_TARGETS = "ingest/targets"
_NAMED = ["id", "source", "file", "record"]
_RECORD = re.compile(r"(.+):(\d+)")
_BESIDE = ("prefix", "concepts")
"""Folders of a data set whose lines are of emitted rows too."""

Turns = list[Mapping[str, Any]]


def story(url: str, row: str, *, full: bool = False) -> str:
    """What happened to a row, as text; of a record that ingest rejected, why.

    Args:
        url: the run directory.
        row: the row's id, or enough of its first digits; or `SOURCE:N` or `FILE:N`, the number of a
            record as reports and rejects have it, for records that never had an id too.
        full: show whole texts; else long ones are cut.

    Raises:
        ConfigError: no run is there, or what was named fits no row or several.
    """
    return "\n".join(_Story(opened_run(url), full).lines(row))


def found_row(
    run: Store, row: str, folder: str = "ingest"
) -> tuple[str, int, dict[str, Any]] | None:
    """Shard, place and record of the row that is named so; None where none is.

    Args:
        run: the run.
        row: the first digits of its id, or its source or file and the number of its record.
        folder: where the shards are.

    Raises:
        ConfigError: several rows are named so.
    """
    hits: list[tuple[str, int, str]] = []
    for part in parts(run, folder):
        names = run.read_table(f"{folder}/{part}", _NAMED)
        places = pc.indices_nonzero(_are_named(names, row)).to_pylist()
        hits += [(part, place, names["id"][place].as_py()) for place in places]
    if not hits:
        return None
    if len(hits) > 1:
        raise ConfigError(f"{len(hits)} rows fit {row}: {', '.join(h[2] for h in hits[:5])}")
    part, place, _ = hits[0]
    record = run.read_table(f"{folder}/{part}").slice(place, 1).to_pylist()[0]
    return part, place, record


def _are_named(rows: pa.Table, name: str) -> pa.ChunkedArray:
    """Of each row, whether it is named so; bool."""
    record = _RECORD.fullmatch(name)
    if record is None:
        return pc.fill_null(pc.starts_with(rows["id"], name), False)
    of, number = record.groups()
    held = pc.or_(pc.equal(rows["source"], of), pc.equal(rows["file"], of))
    return pc.and_(held, pc.equal(rows["record"], int(number)))


@dataclass(frozen=True)
class _Story:
    """Reads a run to tell of one row."""

    run: Store
    full: bool

    def lines(self, row: str) -> list[str]:
        found = found_row(self.run, row)
        if found is None:
            return self._rejected(row) or self._target(row)
        part, place, record = found
        lines = [
            _line("row", record["id"]),
            _line("source", f"{_origin(record)}, licence {record['license'] or 'not stated'}"),
            *self._turns("text", record["messages"]),
            *self._instead_of(record["id"]),
        ]
        if record["answer"] is not None:
            lines.append(_line("answer", record["answer"]))
        for stage in row_stages_of(self.run):
            name = f"{folder_of(stage)}/{part}"
            if not self.run.exists(name):
                continue
            values = self.run.read_table(name).slice(place, 1).to_pylist()[0]
            lines.append(_line(stage, _values(stage, values)))
            if values.get("messages_reflected"):
                lines += self._changes(record["messages"], values["messages_reflected"])
        return lines + self._decision(record)

    def _rejected(self, row: str) -> list[str]:
        """The story of a record that ingest rejected."""
        hits = self._rejects(lambda rejects: _are_named(rejects, row))
        if not hits:
            return []
        # A record's copies are rejected under the same id.
        rows = sorted({hit["id"] or _origin(hit) for hit in hits})
        if len(rows) > 1:
            raise ConfigError(f"{len(rows)} rejected records fit {row}: {', '.join(rows[:5])}")
        lines = [_line("row", hits[0]["id"] or "no id: it never was a row")]
        for hit in hits:
            lines.append(_line("source", _origin(hit)))
            lines.append(_line("ingest", f"rejected: {hit['reason']}"))
            if hit["overlap"] is not None:
                lines.append(_line("", f"they share: {self._cut(hit['overlap'])}"))
        if hits[0]["kept"] is not None:
            lines += self._kept(hits[0]["kept"], hits)
        return [*lines, _line("record", self._cut(hits[0]["raw"]))]

    def _kept(self, row: str, told: list[dict[str, Any]]) -> list[str]:
        """The row that stays in the place of rejects that name this one."""
        lines = []
        found = found_row(self.run, row) or found_row(self.run, row, _TARGETS)
        if found is None:
            # Copies name the row that they equal, which was later rejected as a near duplicate.
            equal = self._rejects(lambda rejects: pc.equal(rejects["id"], row))
            near = next(hit for hit in equal if hit["kept"] != row)
            if near not in told:
                lines.append(_line("", f"{_origin(near)}, is rejected too: {near['reason']}"))
            found = found_row(self.run, near["kept"])
        if found is not None:
            lines.append(_line("kept", f"{found[2]['id']}: {_origin(found[2])}"))
            lines += self._turns("", found[2]["messages"])
        return lines

    def _target(self, row: str) -> list[str]:
        """The story of a target's row."""
        found = found_row(self.run, row, _TARGETS)
        if found is None:
            raise ConfigError(
                f"{self.run.url} holds no row whose id begins with {row}, and no source or file "
                "with a record of that name; a record that could not be read has no id: name it as "
                "SOURCE:NUMBER, counted from 0"
            )
        record = found[2]
        what = f"{_origin(record)}, task {record['task']}"
        return [
            _line("row", record["id"]),
            _line("target", f"{what}; rows are compared with it, and it is never emitted"),
            *self._turns("text", record["messages"]),
        ]

    def _instead_of(self, row: str) -> list[str]:
        """Rows that ingest rejected as duplicates of this one, and copies of those."""
        hits = self._rejects(lambda rejects: pc.equal(rejects["kept"], row))
        near = [hit["id"] for hit in hits if hit["id"] != row]
        if near:
            hits += self._rejects(lambda rejects: pc.is_in(rejects["kept"], pa.array(near)))
        told = [f"{_origin(hit)}: {hit['reason']}" for hit in hits[:_MOST]]
        if len(hits) > _MOST:
            told.append(f"and {len(hits) - _MOST} more")
        return [_line("" if number else "instead of", text) for number, text in enumerate(told)]

    def _rejects(self, wanted: Callable[[pa.Table], pa.ChunkedArray]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for part in parts(self.run, "ingest/rejects"):
            name = f"ingest/rejects/{part}"
            places = pc.indices_nonzero(wanted(self.run.read_table(name, [*_NAMED, "kept"])))
            if len(places):
                found += self.run.read_table(name).take(places).to_pylist()
        return found

    def _turns(self, title: str, messages: Turns) -> list[str]:
        return [
            _line("" if number else title, f"{turn['role']}: {self._cut(turn['content'])}")
            for number, turn in enumerate(messages)
        ]

    def _changes(self, before: Turns, after: Turns) -> list[str]:
        """The turns that were rewritten: whole, and what was [-deleted-] and {+inserted+}."""
        lines = []
        for old, new in zip(before, after, strict=True):
            if old["content"] == new["content"]:
                continue
            lines.append(_line("rewritten", f"{new['role']}: {self._cut(new['content'])}"))
            changed = "".join(
                _MARKS[piece.kind].format(piece.text)
                for piece in word_diff(old["content"], new["content"])
            )
            lines.append(_line("changes", f"{new['role']}: {self._cut(changed)}"))
        return lines

    def _decision(self, record: Mapping[str, Any]) -> list[str]:
        """What selection, mixture and emission made of a row."""
        if read_manifest(self.run, "selection") is None:
            return [_line("selection", "not done yet")]
        decisions = self.run.read_table("selection/decisions.parquet")
        found = _all(decisions, record["id"])
        if not found:
            return [_line("selection", "made before this row was ingested; run again")]
        keep, reason, score = (found[0][name] for name in ("keep", "reason", "score"))
        ranked = "" if score is None else f" (score {score:.4g})"
        lines = [_line("selection", f"{'kept' if keep else 'dropped'}: {reason}{ranked}")]
        other = re.search(r"\b[0-9a-f]{32}\b", reason)
        named = found_row(self.run, other.group()) if other else None
        if named is not None:
            asked = self._cut(instruction(named[2]["messages"]) or "")
            lines.append(_line("", f"that row is of {_origin(named[2])}: {asked}"))
        return [*lines, *self._drawn(record)] if keep else lines

    def _drawn(self, record: Mapping[str, Any]) -> list[str]:
        """The weight of a kept row's source, and where the row was emitted."""
        lines, source = [], record["source"]
        mixture = read_manifest(self.run, "mixture")
        if mixture is not None:
            weight = mixture["report"]["weights"].get(source, 0.0)
            lines.append(_line("mixture", f"{source} has the weight {weight:.4f}"))
        emission = read_manifest(self.run, "emission")
        if emission is None:
            return [*lines, _line("emission", "not done yet")]
        found = _all(self.run.read_table("dataset/emitted.parquet"), record["id"])
        for place in found:
            split = place["shard"].rpartition("/")[2].partition("-")[0]
            where = f"{split}: {place['shard']}, line {place['position']}"
            lines.append(_line("emission", where))
        if not found:
            report = emission["report"]
            facts = report["sources"][source]
            told = f"{source} gives {facts['quota']:,} {report['unit']} of {facts['available']:,}"
            lines.append(_line("emission", f"not drawn: {told}, and others were taken"))
        for path in (file["path"] for file in emission["files"]):
            kind = path.partition("/")[0]
            if kind in _BESIDE and path.endswith(".parquet"):
                ids = self.run.read_table(f"dataset/{path}", ["id"])["id"].to_pylist()
                if record["id"] in ids:
                    lines.append(_line(kind, f"{path}, line {ids.index(record['id'])}"))
        return lines

    def _cut(self, text: str) -> str:
        if self.full or len(text) <= _LONGEST:
            return text
        return f"{text[:_LONGEST]} … ({len(text)} characters)"


def _line(title: str, text: str) -> str:
    """A line of the story; further lines of its text stand under its first."""
    return f"{title:<12}" + text.replace("\n", "\n" + " " * 12)


def _origin(record: Mapping[str, Any]) -> str:
    return f"{record['source']}: {record['file']}, record {record['record']}"


def _values(stage: str, values: Mapping[str, Any]) -> str:
    shown = [str(values[f"{stage}_status"])]
    for name, value in values.items():
        if name in (*_OWN, f"{stage}_status") or value is None:
            continue
        long = isinstance(value, list) and len(value) > _LISTED
        shown.append(f"{name} {f'{len(value)} values' if long else _number(value)}")
    return ", ".join(shown)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(_number(item) for item in value) + "]"
    return str(value)


def _all(table: pa.Table, row: str) -> list[dict[str, Any]]:
    matching: list[dict[str, Any]] = table.filter(pc.equal(table["id"], row)).to_pylist()
    return matching
