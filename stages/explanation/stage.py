"""The explanation stage: why some of the selected rows are like the targets."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.base import NO_ARTIFACTS, Artifact, Columns, EngineSpec, ShardedColumns
from stages.dictionary.settings import DictionarySettings
from stages.engines.settings import ModelSettings
from stages.explanation.settings import ExplanationSettings
from stages.features.settings import FeaturesSettings
from stages.rows import LABEL, canonical_json, key_hash
from stages.storage import Store

EXPLANATIONS = "explanations.json"

_PLACE = pa.struct(
    [
        ("before", pa.string()),
        ("token", pa.string()),
        ("after", pa.string()),
        ("activation", pa.float64()),
    ]
)
_LATENT = pa.struct(
    [
        ("latent", pa.int64()),
        ("share", pa.float64()),
        ("row", pa.float64()),
        ("prototype", pa.float64()),
        ("places", pa.list_(_PLACE)),
    ]
)
EXPLAINED = pa.schema(
    [
        ("id", pa.string()),
        ("source", LABEL),
        ("task", pa.string()),
        ("similarity", pa.float64()),
        ("latents", pa.list_(_LATENT)),
    ]
)
"""The explanations as a table."""


class ExplanationStage:
    """Explains a sample of the rows that selection kept, for the report."""

    name = "explanation"
    version = 1
    on_targets = False

    def __init__(
        self,
        settings: ExplanationSettings,
        features: FeaturesSettings,
        dictionary: DictionarySettings,
        models: Mapping[str, ModelSettings],
        seed: int,
    ) -> None:
        """Keep what rows were read with."""
        self.settings = settings
        self._features = features
        self._layer = dictionary.layer
        self._student = models[features.student]
        self._seed = seed

    def columns(self) -> Columns:
        """Reads the text that stands after reflection, and what features found."""
        needs = ("id", "source", "effective_messages", "similarity", "nearest_task")
        return Columns(needs, pa.schema([]))

    def engines(self) -> Mapping[str, EngineSpec]:
        """The student's activations."""
        return {"student": EngineSpec("reader", self._features.student, self._student)}

    def artifacts(self) -> tuple[str, ...]:
        """What rows were measured with, and which of them were kept."""
        return ("dictionary", "prototypes", "selection")

    async def fit(
        self,
        columns: ShardedColumns,
        targets: ShardedColumns,
        engines: Mapping[str, Any],
        artifacts: Mapping[str, Store] = NO_ARTIFACTS,
    ) -> Artifact:
        """`explanations.json`: a list of rows with the latents that they share with their task.

        Kept rows that features wasn't asked for, or failed on, aren't explained.
        """
        from stages.explanation.explainer import Explainer

        explainer = Explainer(
            self.settings,
            self._features,
            self._layer,
            self._student,
            artifacts["dictionary"],
            artifacts["prototypes"],
        )
        decisions = artifacts["selection"].read_table("decisions.parquet", ["id", "keep"])
        kept = decisions.filter(decisions["keep"])["id"]
        chosen = self._chosen(columns, kept)
        explained = []
        for row in chosen:
            latents = await explainer.row(
                row["effective_messages"], row["nearest_task"], engines["student"]
            )
            explained.append(
                {
                    "id": row["id"],
                    "source": row["source"],
                    "task": row["nearest_task"],
                    "similarity": row["similarity"],
                    "latents": [asdict(latent) for latent in latents],
                }
            )
        data = canonical_json(explained).encode()
        return Artifact({EXPLANATIONS: data}, {"rows": len(explained)})

    def _chosen(self, columns: ShardedColumns, kept: pa.ChunkedArray) -> list[dict[str, Any]]:
        """Kept rows with a similarity, of lowest hash."""
        rows: list[tuple[int, str, dict[str, Any]]] = []
        for table in columns.iter(self.columns().needs):
            there = pc.and_(
                pc.is_in(table["id"], value_set=kept.combine_chunks()),
                pc.is_valid(table["similarity"]),
            )
            mine = table.filter(there).to_pylist()
            hashed = ((key_hash(f"explain:{r['id']}", self._seed), r["id"], r) for r in mine)
            rows = heapq.nsmallest(self.settings.rows, [*rows, *hashed])
        return [row for _, _, row in rows]
