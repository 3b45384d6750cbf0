"""The explanation stage: why some of the selected rows are like the targets."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.base import NO_ARTIFACTS, Artifact, Columns, EngineSpec, ShardedColumns
from stages.dictionary.settings import DictionarySettings
from stages.engines.settings import ModelSettings
from stages.explanation.settings import ExplanationSettings
from stages.features.settings import FeaturesSettings
from stages.rows import LABEL, canonical_json, key_hash
from stages.storage import Store

if TYPE_CHECKING:
    from stages.engines import FeatureReader
    from stages.explanation.explainer import Explainer

EXPLANATIONS = "explanations.json"
TOP_ROWS = "latents.json"

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
    version = 2
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
        """Rows with the latents that they share with their task, and those latents' top rows.

        `explanations.json` is a list of the former, `latents.json` of the latter. Kept rows that
        features wasn't asked for, or failed on, aren't read.
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
        sample = self._sample(columns, kept, max(self.settings.rows, self.settings.read))
        explained = []
        for row in sample[: self.settings.rows]:
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
        top_rows = await self._top_rows(
            explainer, explained, sample[: self.settings.read], engines["student"]
        )
        return Artifact(
            {
                EXPLANATIONS: canonical_json(explained).encode(),
                TOP_ROWS: canonical_json(top_rows).encode(),
            },
            {"rows": len(explained), "latents": len(top_rows)},
        )

    async def _top_rows(
        self,
        explainer: Explainer,
        explained: Sequence[Mapping[str, Any]],
        rows: Sequence[Mapping[str, Any]],
        reader: FeatureReader,
    ) -> list[dict[str, Any]]:
        """The latents that explain most in sum, each with the rows where it is strongest."""
        shares: Counter[int] = Counter()
        for row in explained:
            shares.update({one["latent"]: one["share"] for one in row["latents"]})
        named = sorted(shares, key=lambda latent: (-shares[latent], latent))
        named = named[: self.settings.latents]
        if not named:
            return []
        found = await explainer.latents(named, [row["effective_messages"] for row in rows], reader)
        return [
            {
                "latent": latent,
                "read": len(rows),
                "active": len(inside),
                "rows": [
                    {
                        "id": rows[one.number]["id"],
                        "source": rows[one.number]["source"],
                        "peak": one.peak,
                        "places": [asdict(place) for place in one.places],
                    }
                    for one in inside[: self.settings.top_rows]
                ],
            }
            for latent, inside in zip(named, found, strict=True)
        ]

    def _sample(
        self, columns: ShardedColumns, kept: pa.ChunkedArray, number: int
    ) -> list[dict[str, Any]]:
        """Kept rows with a similarity, of lowest hash."""
        rows: list[tuple[int, str, dict[str, Any]]] = []
        for table in columns.iter(self.columns().needs):
            there = pc.and_(
                pc.is_in(table["id"], value_set=kept.combine_chunks()),
                pc.is_valid(table["similarity"]),
            )
            mine = table.filter(there).to_pylist()
            hashed = ((key_hash(f"explain:{r['id']}", self._seed), r["id"], r) for r in mine)
            rows = heapq.nsmallest(number, [*rows, *hashed])
        return [row for _, _, row in rows]
