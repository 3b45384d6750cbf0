"""One row's story: its record, its scores, what was rewritten, and why it was kept or dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.flow import ROW_STAGES, folder_of
from pipeline.rundir import opened_run, parts, read_manifest
from stages.errors import ConfigError
from stages.storage import Store

_LONGEST = 400


def story(url: str, row: str) -> str:
    """What happened to a row, as text.

    Args:
        url: the run directory.
        row: the row's id, or enough of its first digits.

    Raises:
        ConfigError: no run is there, or the id fits no row or several.
    """
    run = opened_run(url)
    part, place, record = _found(run, row)
    lines = [
        f"row       {record['id']}",
        f"source    {record['source']}: {record['file']}, record {record['record']}",
        *_turns("text", record["messages"]),
    ]
    for stage in ROW_STAGES:
        name = f"{folder_of(stage)}/{part}"
        if not run.exists(name):
            continue
        values = run.read_table(name).slice(place, 1).to_pylist()[0]
        lines.append(f"{stage:<10}{_values(stage, values)}")
        if values.get("messages_reflected"):
            lines += _turns("rewritten", values["messages_reflected"])
    lines += _decision(run, record["id"])
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


def _turns(title: str, messages: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for number, turn in enumerate(messages):
        text = turn["content"]
        shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text)} characters)"
        lines.append(f"{title if number == 0 else '':<10}{turn['role']}: {shown}")
    return lines


def _values(stage: str, values: Mapping[str, Any]) -> str:
    shown = [str(values[f"{stage}_status"])]
    for name, value in values.items():
        if name in ("id", f"{stage}_status", "messages_reflected", "embedding") or value is None:
            continue
        shown.append(f"{name} {_number(value)}")
    return ", ".join(shown)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(_number(item) for item in value) + "]"
    return str(value)


def _decision(run: Store, row: str) -> list[str]:
    lines = []
    if read_manifest(run, "selection") is not None:
        decision = _only(run.read_table("selection/decisions.parquet"), row)
        if decision:
            verdict = "kept" if decision["keep"] else "dropped"
            score = decision["score"]
            ranked = "" if score is None else f" (score {score:.4g})"
            lines.append(f"selection {verdict}: {decision['reason']}{ranked}")
            if decision["keep"] and read_manifest(run, "emission") is not None:
                lines.append(f"emission  {_emitted(run, row)}")
    return lines


def _emitted(run: Store, row: str) -> str:
    manifest = read_manifest(run, "emission") or {}
    tables = [f["path"] for f in manifest["files"] if f["path"].startswith("emitted")]
    found = [r for name in tables for r in _all(run.read_table(f"dataset/{name}"), row)]
    if not found:
        return "not drawn: its source's quota was filled by other rows"
    return "; ".join(f"{r['shard']}, line {r['position']}" for r in found)


def _only(table: pa.Table, row: str) -> dict[str, Any] | None:
    found = _all(table, row)
    return found[0] if found else None


def _all(table: pa.Table, row: str) -> list[dict[str, Any]]:
    matching: list[dict[str, Any]] = table.filter(pc.equal(table["id"], row)).to_pylist()
    return matching
