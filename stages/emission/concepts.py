"""The data set of concepts: latents by token and by row, one line an emitted row.

Source: CoCoMix (arXiv 2502.08524), section 2.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.emission.gather import Gathered
from stages.emission.publication import ModelFacts
from stages.emission.sample import IntArray
from stages.storage import Store

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("concept_ids", pa.list_(pa.list_(pa.int32()))),
        ("concept_scores", pa.list_(pa.list_(pa.float32()))),
        ("row_concepts", pa.list_(pa.int32())),
        ("row_scores", pa.list_(pa.float32())),
        ("id", pa.string()),
        ("source", pa.string()),
    ]
)
"""The student's ids of the conversation; of each, latents and attributions, -1 and 0 where none."""

IDENTITY = "concepts/dictionary.json"

_READ = (
    "concept_input_ids",
    "concept_ids",
    "concept_scores",
    "concept_row_ids",
    "concept_row_scores",
    "id",
    "source",
)


def concept_tables(gathered: Gathered, splits: Mapping[str, IntArray]) -> dict[str, pa.Table]:
    """Lines by split, in the order of the rows, each row once; splits without one are left out.

    Rows that the stage wasn't asked for, or that failed, have no line.

    Args:
        gathered: the emitted rows.
        splits: emitted row numbers, by split.
    """
    tables: dict[str, pa.Table] = {}
    if not gathered.holds(_READ[0]):
        return tables
    for split, order in splits.items():
        _, first = np.unique(order, return_index=True)
        rows = gathered.rows(order[np.sort(first)], _READ)
        lines = rows.filter(pc.is_valid(rows[_READ[0]]))
        if lines.num_rows:
            tables[split] = lines.rename_columns(SCHEMA.names).cast(SCHEMA)
    return tables


def concept_identity(
    recipe: Mapping[str, Any], dictionary: Store, models: Sequence[ModelFacts]
) -> bytes:
    """What the ids mean, as JSON: the autoencoder, the student that it reads, and where.

    Args:
        recipe: the resolved recipe, with a `concepts` section.
        dictionary: folder of the autoencoder.
        models: of the recipe.
    """
    settings, layer = recipe["concepts"], recipe["dictionary"]["layer"]
    student = next(model for model in models if model.name == settings["student"])
    value = {
        "autoencoder": dictionary.read_json("cfg.json"),
        "autoencoder_sha256": dictionary.sha256("sae_weights.safetensors"),
        "student": {"reference": student.reference, "weights": student.weights},
        "layer": layer,
        "hidden_states": layer + 1,
        "settings": settings,
    }
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
