"""The potentials stage: transport between a sample of the pool and the targets, solved once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load, save

from stages.base import NO_ARTIFACTS, Artifact, Columns, EngineSpec, ShardedColumns
from stages.errors import StageError
from stages.mixture.problem import target_cloud, vectors_of
from stages.mixture.simplex import FloatArray
from stages.mixture.transport import TransportNotSolved
from stages.sampling import sampled_ids
from stages.storage import Store
from stages.valuation.settings import PotentialsSettings, ValuationSettings
from stages.valuation.values import Potentials, calibrated_gradient, selection_potentials

FILE = "potentials.safetensors"


class PotentialsStage:
    """Solves the transport that values of rows come from; runs wherever valuation does."""

    name = "potentials"
    version = 1
    on_targets = True

    def __init__(self, settings: ValuationSettings, seed: int) -> None:
        """Keep what bears on potentials."""
        fields = PotentialsSettings.model_fields
        self.settings = PotentialsSettings(**{name: getattr(settings, name) for name in fields})
        self._seed = seed

    def columns(self) -> Columns:
        """Reads ids and vectors."""
        return Columns(("id", "embedding"), pa.schema([]))

    def engines(self) -> Mapping[str, EngineSpec]:
        """None."""
        return {}

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def fit(
        self,
        columns: ShardedColumns,
        targets: ShardedColumns,
        engines: Mapping[str, Any],
        artifacts: Mapping[str, Store] = NO_ARTIFACTS,
    ) -> Artifact:
        """Potentials of the targets.

        Raises:
            StageError: no row or no target has a vector, or the solver failed.
        """
        settings = self.settings
        sample, rows = self._sample(columns)
        cloud = target_cloud(targets, settings.target_rows, self._seed, settings.task_weights)
        try:
            if settings.share is None:
                solved = calibrated_gradient(sample, cloud.vectors, cloud.mass, settings.metric)
            else:
                solved = selection_potentials(
                    sample, cloud.vectors, cloud.mass, settings.metric, settings.share
                )
        except (TransportNotSolved, ValueError) as error:
            raise StageError(f"values can't be solved: {error}", stage=self.name) from error
        found = solved.potentials
        tensors = {
            "targets": found.targets,
            "potentials": found.potentials,
            "level": np.array([found.level]),
        }
        report = {
            "sampled_rows": rows,
            "distinct_vectors": len(sample),
            "target_points": len(cloud.mass),
            "transport": solved.transport,
            "positive_share": float((solved.values > 0).mean()),
        }
        data = save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
        return Artifact({FILE: data}, report)

    def _sample(self, columns: ShardedColumns) -> tuple[FloatArray, int]:
        """Distinct vectors of the sampled rows, and how many rows those are.

        Rows with one vector are one row: repeated, it would take up what the targets can hold, and
        make a common row look worse than it is.
        """
        wanted = sampled_ids(columns, self.settings.sample_rows, self._seed)
        found = []
        for table in columns.iter(("id", "embedding")):
            mine = [row in wanted for row in table["id"].to_pylist()]
            table = table.filter(pa.array(mine, pa.bool_()))
            table = table.filter(table["embedding"].is_valid())
            if table.num_rows:
                found.append(vectors_of(table))
        if not found:
            raise StageError("no sampled row has an embedding", stage=self.name)
        vectors = np.concatenate(found)
        return np.unique(vectors, axis=0), len(vectors)


def read_potentials(store: Store) -> Potentials:
    """The potentials in an artifact's folder."""
    tensors = load(store.read_bytes(FILE))
    return Potentials(tensors["targets"], tensors["potentials"], float(tensors["level"][0]))
