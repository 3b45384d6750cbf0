"""Rejected records that the report shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.rows import key_hash
from stages.storage import Store

PER_REASON = 5
LONGEST = 600
"""Characters of a record that are shown."""


def rejected_examples(ingest: Store, seed: int) -> list[Mapping[str, Any]]:
    """A few records of each reason, those of lowest hash, by reason; read file by file.

    Args:
        ingest: the stage's folder.
        seed: the recipe's.

    Returns:
        `source`, `file`, `record`, `reason` and `raw` (cut) of each.
    """
    kept: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for name in ingest.names("rejects"):
        if not name.endswith(".parquet"):
            continue
        table = ingest.read_table(f"rejects/{name}")
        keys = zip(*(table[column].to_pylist() for column in _KEY), strict=True)
        for place, (source, file, record, reason) in enumerate(keys):
            found = kept.setdefault(reason.split(":")[0], [])
            rank = key_hash(f"reject:{source}:{file}:{record}", seed)
            if len(found) < PER_REASON or rank < found[-1][0]:
                values = table.slice(place, 1).to_pylist()[0]
                raw = values["raw"] or ""
                cut = raw[:LONGEST] + (" …" if len(raw) > LONGEST else "")
                found.append((rank, {**values, "raw": cut}))
                found.sort(key=lambda item: item[0])
                del found[PER_REASON:]
    return [values for code in sorted(kept) for _, values in kept[code]]


_KEY = ("source", "file", "record", "reason")
