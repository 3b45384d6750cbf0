"""The allocation stage: further rollouts for every row, by the variance-minimising rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stages.allocation.integers import allocated, water_filled
from stages.allocation.settings import AllocationSettings
from stages.allocation.weights import allocation_weights, predicted_ratio
from stages.base import NO_ARTIFACTS, Artifact, Columns, EngineSpec, ShardedColumns
from stages.errors import ConfigError, StageError
from stages.pass_rate.settings import PassRateSettings
from stages.rows import NOT_REQUESTED, OK
from stages.storage import Store, parquet_bytes

ALLOCATION = "allocation.parquet"

_SCHEMA = pa.schema([("id", pa.string()), ("rollouts", pa.int32())])


@dataclass(frozen=True)
class _Pilot:
    """What the pilot says of all rows, in order of their ids.

    Attributes:
        ids: string [n].
        pass_rates: float64 [n], NaN where unknown.
        gradient_norms: float64 [n], NaN where unknown.
        statuses: how many rows have each pass_rate_status, reasons cut to their code.
    """

    ids: pa.ChunkedArray
    pass_rates: NDArray[np.float64]
    gradient_norms: NDArray[np.float64]
    statuses: Counter[str]


class AllocationStage:
    """Shares out a budget of rollouts after a pilot on every row.

    Source: GVM-RAFT (arXiv 2505.02391), Prop. 1 and Alg. 2.
    """

    name = "allocation"
    version = 1
    on_targets = False

    def __init__(self, settings: AllocationSettings, pass_rate: PassRateSettings) -> None:
        """Keep the settings.

        Args:
            settings: the recipe's section.
            pass_rate: the section of the pilot.

        Raises:
            ConfigError: the rule needs gradient norms that the pilot doesn't measure, or the
                pilot's rollouts are greedy.
        """
        if pass_rate.temperature == 0:
            raise ConfigError(
                "allocation draws further rollouts, and at pass_rate.temperature 0 all of a row "
                "are the same; set a temperature above 0, or remove the section allocation"
            )
        if settings.gradient == "measured" and not pass_rate.gradient:
            raise ConfigError(
                "allocation.gradient is measured, and pass_rate measures none; set "
                "pass_rate.gradient: true, or allocation.gradient: one"
            )
        self.settings = settings

    def columns(self) -> Columns:
        """Reads what the pilot found."""
        needs = ("id", "pass_rate", "gradient_norm", "pass_rate_status")
        return Columns(needs, pa.schema([]))

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
        """`allocation.parquet`: id and number of further rollouts of every row that gets any.

        Rows are taken in order of their ids, so that ties fall alike however the rows are sharded.
        Holds about 60 bytes a row.

        Raises:
            StageError: no row can be given a rollout, or the budget can't pay the floors.
        """
        pilot = self._pilot(columns)
        known = np.isfinite(pilot.pass_rates)
        # As the column holds it: 4 of 5 in float32 is a little more than 0.8.
        highest = np.float64(np.float32(self.settings.max_pass_rate))
        eligible = known & (pilot.pass_rates <= highest)
        p, g = pilot.pass_rates[eligible], pilot.gradient_norms[eligible]
        weights = allocation_weights(p, g, self.settings.alpha, self.settings.beta)
        self._check(pilot, eligible)
        bounds = (self.settings.total, self.settings.cap, self.settings.floor)
        numbers = np.zeros(len(known), np.int64)
        numbers[eligible] = allocated(weights, *bounds)
        if not numbers.any():
            raise StageError(
                f"no row can be given a rollout: of {len(known)} rows {int(known.sum())} have a "
                f"pass rate, {int(eligible.sum())} up to max_pass_rate="
                f"{self.settings.max_pass_rate:g}, and none of these both a rate above 0 and a "
                "gradient; draw more pilot rollouts, take a stronger model, or set "
                "allocation.floor",
                stage=self.name,
            )
        given = numbers > 0
        table = pa.table(
            {"id": pilot.ids.filter(pa.array(given)), "rollouts": numbers[given]}, schema=_SCHEMA
        )
        shares = water_filled(weights, *bounds)
        weighted = weights > 0
        report = {
            "rows": len(known),
            "pilot": dict(sorted(pilot.statuses.items())),
            "never_solved": int(np.count_nonzero(pilot.pass_rates == 0)),
            "above_max_pass_rate": int(np.count_nonzero(known & ~eligible)),
            "without_gradient": int(np.count_nonzero((p > 0) & ~weighted)),
            "allocated_rows": int(given.sum()),
            "budget": self.settings.total,
            "allocated": int(numbers.sum()),
            "most_for_one_row": int(numbers.max()),
            # Of real-valued shares: a share that is rounded to 0 leaves its row out altogether.
            "predicted_ratio": predicted_ratio(p[weighted], g[weighted], shares[weighted])
            if weighted.any()
            else None,
            "weighted_rows_rounded_to_none": int(
                np.count_nonzero(weighted & (numbers[eligible] == 0))
            ),
        }
        return Artifact({ALLOCATION: parquet_bytes(table)}, report)

    def _check(self, pilot: _Pilot, eligible: NDArray[np.bool_]) -> None:
        """Refuse a gradient that isn't finite, and a budget that can't pay the floors."""
        infinite = np.flatnonzero(np.isinf(pilot.gradient_norms))
        if infinite.size:
            raise StageError(
                f"the gradient norm of row {pilot.ids[infinite[0]]} isn't finite (and of "
                f"{infinite.size - 1} more); measure it in float32, or set allocation.gradient: "
                "one",
                stage=self.name,
            )
        floors = self.settings.floor * int(eligible.sum())
        if floors > self.settings.total:
            raise StageError(
                f"a total of {self.settings.total} rollouts can't pay the floor of "
                f"{self.settings.floor} for each of {int(eligible.sum())} rows; raise "
                f"allocation.total to {floors} or more, or lower allocation.floor",
                stage=self.name,
            )

    def _pilot(self, columns: ShardedColumns) -> _Pilot:
        tables: list[pa.Table] = []
        statuses: Counter[str] = Counter()
        for table in columns.iter(self.columns().needs):
            statuses.update(_code(status) for status in table["pass_rate_status"].to_pylist())
            tables.append(table.select(["id", "pass_rate", "gradient_norm"]))
        every = pa.concat_tables(tables)
        every = every.take(pc.sort_indices(every["id"]))
        rates = _float64(every["pass_rate"])
        if self.settings.gradient == "one":
            return _Pilot(every["id"], rates, np.ones(len(rates)), statuses)
        return _Pilot(every["id"], rates, _float64(every["gradient_norm"]), statuses)


def _float64(column: pa.ChunkedArray) -> NDArray[np.float64]:
    values: NDArray[np.float64] = column.cast(pa.float64()).to_numpy()
    return values


def _code(status: str) -> str:
    """The status without what belongs to one row alone."""
    return status if status in (OK, NOT_REQUESTED) else ": ".join(status.split(": ")[:2])
