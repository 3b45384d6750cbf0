"""The valuation stage: every row's value, by the potentials of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.base import Columns, EngineSpec
from stages.mixture.problem import vectors_of
from stages.rows import OK, status_field
from stages.storage import Store
from stages.valuation.potentials import read_potentials
from stages.valuation.settings import ValuationSettings
from stages.valuation.values import row_values

_ADDS = pa.schema([("transport_value", pa.float32()), status_field("valuation")])


class ValuationStage:
    """One pass of a c-transform: rows needn't be in the sample that was solved."""

    name = "valuation"
    version = 1
    on_targets = False

    def __init__(self, settings: ValuationSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    def columns(self) -> Columns:
        """Reads vectors."""
        return Columns(("id", "embedding"), _ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """None."""
        return {}

    def artifacts(self) -> tuple[str, ...]:
        """The potentials."""
        return ("potentials",)

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """A value for every row that has a vector."""
        potentials = read_potentials(artifacts["potentials"])
        there = rows["embedding"].is_valid()
        values = np.full(rows.num_rows, np.nan)
        if pc.any(there).as_py():
            vectors = vectors_of(rows.filter(there))
            values[there.to_numpy()] = row_values(vectors, potentials, self.settings.metric)
        status = [OK if valid else "failed: no_embedding" for valid in there.to_pylist()]
        table = pa.table(
            {
                "transport_value": pa.array(values, pa.float32(), from_pandas=True),
                "valuation_status": pa.array(status, pa.string()),
            }
        )
        return table.cast(_ADDS)
