"""One row's story: its record, its scores, what was rewritten, and why it was kept or dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.flow import folder_of
from pipeline.rundir import opened_run, parts, read_manifest, row_stages_of
from stages.errors import ConfigError
from stages.storage import Store

_LONGEST = 400
_MOST = 10


def story(url: str, row: str) -> str:
    """What happened to a row, as text; of a row that ingest rejected, why.

    Args:
        url: the run directory.
        row: the row's id, or enough of its first digits.

    Raises:
        ConfigError: no run is there, or the id fits no row or several.
    """
    run = opened_run(url)
    found = _found(run, row)
    if found is None:
        return "\n".join(_rejected(run, row))
    part, place, record = found
    lines = [
        f"row       {record['id']}",
        f"source    {_origin(record)}",
        *_turns("text", record["messages"]),
        *_instead_of(run, record["id"]),
    ]
    for stage in row_stages_of(run):
        name = f"{folder_of(stage)}/{part}"
        if not run.exists(name):
            continue
        values = run.read_table(name).slice(place, 1).to_pylist()[0]
        lines.append(f"{stage:<10}{_values(stage, values)}")
        if values.get("messages_reflected"):
            lines += _turns("rewritten", values["messages_reflected"])
    lines += _decision(run, record["id"])
    return "\n".join(lines)


def _found(run: Store, row: str) -> tuple[str, int, dict[str, Any]] | None:
    """Shard, place and record of the row whose id begins so; None where no row's does."""
    hits: list[tuple[str, int, str]] = []
    for part in parts(run, "ingest"):
        ids = run.read_table(f"ingest/{part}", ["id"])["id"]
        places = pc.indices_nonzero(pc.starts_with(ids, row)).to_pylist()
        hits += [(part, place, ids[place].as_py()) for place in places]
    if not hits:
        return None
    if len(hits) > 1:
        raise ConfigError(f"{len(hits)} rows begin with {row}: {', '.join(h[2] for h in hits[:5])}")
    part, place, _ = hits[0]
    record = run.read_table(f"ingest/{part}").slice(place, 1).to_pylist()[0]
    return part, place, record


def _rejected(run: Store, row: str) -> list[str]:
    """The story of a row that ingest rejected."""
    hits = _rejects(run, lambda rejects: pc.starts_with(rejects["id"], row))
    ids = sorted({hit["id"] for hit in hits})
    if not hits:
        raise ConfigError(
            f"{run.url} holds no row whose id begins with {row}; a record that could not be read "
            "has no id: look in ingest/rejects"
        )
    if len(ids) > 1:
        raise ConfigError(f"{len(ids)} rejected rows begin with {row}: {', '.join(ids[:5])}")
    lines = [f"row       {ids[0]}"]
    for hit in hits:
        lines += [f"source    {_origin(hit)}", f"ingest    rejected: {hit['reason']}"]
        if hit["overlap"] is not None:
            lines.append(f"          they share: {_shown(hit['overlap'])}")
    kept = _found(run, hits[0]["kept"]) if hits[0]["kept"] is not None else None
    if kept is not None:
        lines.append(f"kept      {kept[2]['id']}: {_origin(kept[2])}")
        lines += _turns("", kept[2]["messages"])
    return [*lines, f"record    {_shown(hits[0]['raw'])}"]


def _instead_of(run: Store, row: str) -> list[str]:
    """Rows that ingest rejected as duplicates of this one."""
    hits = _rejects(run, lambda rejects: pc.equal(rejects["kept"], row))
    lines = [f"{_origin(hit)}: {hit['reason']}" for hit in hits[:_MOST]]
    if len(hits) > _MOST:
        lines.append(f"and {len(hits) - _MOST} more")
    return [f"{'instead of' if number == 0 else '':<11}{line}" for number, line in enumerate(lines)]


def _rejects(run: Store, wanted: Callable[[pa.Table], pa.ChunkedArray]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in parts(run, "ingest/rejects"):
        name = f"ingest/rejects/{part}"
        places = pc.indices_nonzero(wanted(run.read_table(name, ["id", "kept"])))
        if len(places):
            found += run.read_table(name).take(places).to_pylist()
    return found


def _origin(record: Mapping[str, Any]) -> str:
    return f"{record['source']}: {record['file']}, record {record['record']}"


def _turns(title: str, messages: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for number, turn in enumerate(messages):
        shown = _shown(turn["content"])
        lines.append(f"{title if number == 0 else '':<10}{turn['role']}: {shown}")
    return lines


def _shown(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text)} characters)"


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
