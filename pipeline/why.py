"""One row's story: its record, its scores, what was rewritten, and why it was kept or dropped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.flow import ROW_STAGES, folder_of
from pipeline.rundir import opened_run, parts, read_manifest
from stages.emission.diffs import word_diff
from stages.errors import ConfigError
from stages.storage import Store

_LONGEST = 400
_MARKS = {"equal": "{}", "delete": "[-{}-]", "insert": "{{+{}+}}"}
_OWN = ("id", "key", "messages_reflected", "embedding", "prefix_prompt_ids", "prefix_ids")
"""Columns that are shown otherwise, or say nothing to a person."""


def story(url: str, row: str, *, full: bool = False) -> str:
    """What happened to a row, as text: its record, every stage, and where it is now.

    Args:
        url: the run directory.
        row: the row's id, or enough of its first digits.
        full: show whole texts; else long ones are cut.

    Raises:
        ConfigError: no run is there, or the id fits no row or several.
    """
    run = opened_run(url)
    part, place, record = _found(run, row)
    licence = f", licence {record['license']}" if record["license"] else ", no licence stated"
    lines = [
        _line("row", record["id"]),
        _line(
            "source", f"{record['source']}: {record['file']}, record {record['record']}{licence}"
        ),
        *_turns("text", record["messages"], full),
    ]
    if record["answer"] is not None:
        lines.append(_line("answer", record["answer"]))
    for stage in ROW_STAGES:
        name = f"{folder_of(stage)}/{part}"
        if not run.exists(name):
            continue
        values = run.read_table(name).slice(place, 1).to_pylist()[0]
        lines.append(_line(stage, _values(stage, values)))
        if values.get("messages_reflected"):
            lines += _changes(record["messages"], values["messages_reflected"], full)
    lines += _decision(run, record)
    return "\n".join(lines)


def _found(run: Store, row: str) -> tuple[str, int, dict[str, Any]]:
    hits: list[tuple[str, int, str]] = []
    for part in parts(run, "ingest"):
        ids = run.read_table(f"ingest/{part}", ["id"])["id"]
        places = pc.indices_nonzero(pc.starts_with(ids, row)).to_pylist()
        hits += [(part, place, ids[place].as_py()) for place in places]
    if not hits:
        raise ConfigError(
            f"{run.url} holds no row whose id begins with {row}; a record that was rejected has no "
            "id: look in ingest/rejects"
        )
    if len(hits) > 1:
        raise ConfigError(f"{len(hits)} rows begin with {row}: {', '.join(h[2] for h in hits[:5])}")
    part, place, _ = hits[0]
    record = run.read_table(f"ingest/{part}").slice(place, 1).to_pylist()[0]
    return part, place, record


def _turns(title: str, messages: list[Mapping[str, Any]], full: bool) -> list[str]:
    lines = []
    for number, turn in enumerate(messages):
        shown = _cut(turn["content"], full)
        lines.append(_line(title if number == 0 else "", f"{turn['role']}: {shown}"))
    return lines


def _changes(
    before: list[Mapping[str, Any]], after: list[Mapping[str, Any]], full: bool
) -> list[str]:
    """The turns that were rewritten: whole, and what was [-deleted-] and {+inserted+}."""
    lines = []
    for old, new in zip(before, after, strict=True):
        if old["content"] == new["content"]:
            continue
        lines.append(_line("rewritten", f"{new['role']}: {_cut(new['content'], full)}"))
        changed = "".join(
            _MARKS[piece.kind].format(piece.text)
            for piece in word_diff(old["content"], new["content"])
        )
        lines.append(_line("changes", f"{new['role']}: {_cut(changed, full)}"))
    return lines


def _line(title: str, text: str) -> str:
    """A line of the story; further lines of its text stand under its first."""
    return f"{title:<12}" + text.replace("\n", "\n" + " " * 12)


def _cut(text: str, full: bool) -> str:
    if full or len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} … ({len(text)} characters)"


def _values(stage: str, values: Mapping[str, Any]) -> str:
    shown = [str(values[f"{stage}_status"])]
    for name, value in values.items():
        if name in (*_OWN, f"{stage}_status") or value is None:
            continue
        shown.append(f"{name} {_number(value)}")
    return ", ".join(shown)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(_number(item) for item in value) + "]"
    return str(value)


def _decision(run: Store, record: Mapping[str, Any]) -> list[str]:
    """What selection, mixture and emission made of a row."""
    if read_manifest(run, "selection") is None:
        return [_line("selection", "not done yet")]
    row, source = record["id"], record["source"]
    decision = _only(run.read_table("selection/decisions.parquet"), row)
    if decision is None:
        return [_line("selection", "made before this row was ingested; run again")]
    ranked = "" if decision["score"] is None else f" (score {decision['score']:.4g})"
    verdict = "kept" if decision["keep"] else "dropped"
    lines = [_line("selection", f"{verdict}: {decision['reason']}{ranked}")]
    other = re.search(r"\b[0-9a-f]{32}\b", decision["reason"])
    if other and other.group() != row:
        lines += _other(run, other.group())
    if not decision["keep"]:
        return lines
    mixture = read_manifest(run, "mixture")
    if mixture is not None:
        weight = mixture["report"]["weights"].get(source, 0.0)
        lines.append(_line("mixture", f"{source} has the weight {weight:.4f}"))
    emission = read_manifest(run, "emission")
    if emission is None:
        return [*lines, _line("emission", "not done yet")]
    return [*lines, *_emitted(run, emission, row, source)]


def _other(run: Store, row: str) -> list[str]:
    """The row that another one's reason names."""
    _, _, record = _found(run, row)
    asked = next((t["content"] for t in reversed(record["messages"]) if t["role"] == "user"), "")
    return [_line("", f"that row is of {record['source']}: {_cut(asked, False)}")]


def _emitted(run: Store, manifest: Mapping[str, Any], row: str, source: str) -> list[str]:
    paths = [file["path"] for file in manifest["files"]]
    found = _all(run.read_table("dataset/emitted.parquet"), row)
    if not found:
        facts = manifest["report"]["sources"][source]
        unit = manifest["report"]["unit"]
        said = (
            f"not drawn: {source} gives {facts['quota']:,} {unit} of {facts['available']:,}, and "
            "others were taken"
        )
        return [_line("emission", said)]
    lines = []
    for place in found:
        split = place["shard"].rpartition("/")[2].partition("-")[0]
        lines.append(_line("emission", f"{split}: {place['shard']}, line {place['position']}"))
    for path in paths:
        if path.startswith("prefix/"):
            ids = run.read_table(f"dataset/{path}", ["id"])["id"].to_pylist()
            lines += [
                _line("prefix", f"{path}, line {i}") for i, name in enumerate(ids) if name == row
            ]
    return lines


def _only(table: pa.Table, row: str) -> dict[str, Any] | None:
    found = _all(table, row)
    return found[0] if found else None


def _all(table: pa.Table, row: str) -> list[dict[str, Any]]:
    matching: list[dict[str, Any]] = table.filter(pc.equal(table["id"], row)).to_pylist()
    return matching
