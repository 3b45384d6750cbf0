"""`lineage.json`: what the data set was made of, for programs; equal runs give equal bytes."""

from __future__ import annotations

import json
from typing import Any

from stages.emission.facts import Facts, SourceFacts

SCHEMA = 2
"""Of the file: goes up when fields change their meaning or go."""


def lineage_json(facts: Facts, version: int) -> bytes:
    """The lineage as readable JSON with sorted keys.

    Times and what was reused are left out: they differ between runs of one recipe.

    Args:
        facts: of the data set.
        version: of the emission stage.
    """
    stages = [
        {
            "stage": stage.name,
            "version": stage.version,
            "fingerprint": stage.fingerprint,
            "statuses": dict(stage.statuses),
        }
        for stage in facts.stages
    ]
    value = {
        "schema": SCHEMA,
        "recipe": facts.name,
        "seed": facts.seed,
        "stages": [*stages, {"stage": "emission", "version": version}],
        "settings": facts.settings.model_dump(),
        "counts": {
            "records": facts.total("records"),
            "rejected": facts.reasons("rejected"),
            "ingested": facts.total("kept"),
            "dropped": facts.reasons("dropped"),
            "selected": facts.total("selected"),
            "emitted": facts.rows,
            "rewritten": facts.rewritten,
            "tokens": facts.tokens,
        },
        "sources": [_source(source) for source in facts.sources],
        "targets": dict(facts.tasks),
        "mixture": dict(facts.mixture) if facts.mixture is not None else None,
        "splits": {
            name: {"rows": rows, "prompts": prompts}
            for name, (rows, prompts) in facts.splits.items()
        },
        "prefix": facts.prefix.as_dict() if facts.prefix else None,
        "licenses": {
            source: {name or "not stated": rows for name, rows in counts.items()}
            for source, counts in facts.licenses.items()
        },
        "models": [vars(model) for model in facts.models],
        "windows": [vars(window) for window in facts.windows],
        "warnings": facts.warnings,
        "columns": list(facts.columns),
        "shards": [vars(shard) for shard in facts.shards],
    }
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _source(source: SourceFacts) -> dict[str, Any]:
    return {
        "name": source.name,
        "role": source.role,
        "stated_license": source.license,
        "files": list(source.paths),
        "records": source.records,
        "rejected": dict(source.rejected),
        "ingested": source.kept,
        "selected": source.selected,
        "dropped": dict(source.dropped),
        "weight": source.weight,
        "quota": source.quota,
        "emitted": source.rows,
        "emitted_distinct": source.distinct,
        "tokens": source.tokens,
        "shortfall": source.shortfall,
    }
