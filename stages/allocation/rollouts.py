"""The rollouts stage: draws what each row was allocated, beyond its pilot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.allocation.settings import RolloutsSettings
from stages.allocation.stage import ALLOCATION
from stages.base import Columns, EngineSpec
from stages.engines import TextGenerator
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import RowError
from stages.pass_rate.checker import AnswerChecker
from stages.pass_rate.rollouts import (
    Problem,
    Tally,
    drawn_rollouts,
    problems_of,
    sampling_of,
)
from stages.pass_rate.settings import PassRateSettings
from stages.rows import OK, status_field
from stages.storage import Store

_ADDS = pa.schema(
    [
        ("budgeted_rollouts", pa.int32()),
        ("budgeted_correct", pa.int32()),
        ("budgeted_truncated", pa.int32()),
        ("budgeted_unverified", pa.int32()),
        ("budgeted_verdicts", pa.list_(pa.string())),
        ("budgeted_pass_rate", pa.float32()),
        ("budgeted_pass_rate_low", pa.float32()),
        ("budgeted_pass_rate_high", pa.float32()),
        status_field("rollouts"),
    ]
)


class RolloutsStage:
    """Adds the pass rate of pilot and further rollouts together.

    A further rollout is the one that a larger `pass_rate.rollouts` would have drawn. Rows without
    any keep the pilot's figures; rows whose pilot failed or wasn't requested keep its status.
    """

    name = "rollouts"
    version = 1
    on_targets = False

    def __init__(
        self,
        settings: RolloutsSettings,
        pass_rate: PassRateSettings,
        models: Mapping[str, ModelSettings],
        seed: int,
    ) -> None:
        """Keep the settings.

        Args:
            settings: the recipe's section.
            pass_rate: the section of the pilot, whose model, sampling, request and check are used.
            models: the recipe's models by name.
            seed: the run's.
        """
        self.settings = settings
        self._pilot = pass_rate
        self._model = models[pass_rate.model]
        self._seed = seed

    def columns(self) -> Columns:
        """Needs what the pilot needed, and its verdicts."""
        pilot = ("rollout_verdicts", "pass_rate_status")
        return Columns(("id", "source", "messages", "answer", *pilot), _ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The pilot's model."""
        return {"model": EngineSpec("generator", self._pilot.model, self._model)}

    def artifacts(self) -> tuple[str, ...]:
        """The numbers of further rollouts."""
        return ("allocation",)

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """Pilot and further rollouts of every row, in order.

        Raises:
            StageError: answers can't be checked at all.
        """
        numbers = allocated_numbers(rows["id"], artifacts["allocation"])
        pilots: list[list[str] | None] = rows["rollout_verdicts"].to_pylist()
        asked = [
            place for place, pilot in enumerate(pilots) if pilot is not None and numbers[place]
        ]
        drawn = await self._drawn(
            rows.take(pa.array(asked, pa.int64())),
            [_further(pilots[place] or [], numbers[place]) for place in asked],
            engines["model"],
        )
        further = dict(zip(asked, drawn, strict=True))
        records = [
            _record(pilot, further.get(place, []), status)
            for place, (pilot, status) in enumerate(
                zip(pilots, rows["pass_rate_status"].to_pylist(), strict=True)
            )
        ]
        return pa.Table.from_pylist(records, schema=_ADDS)

    async def _drawn(
        self, rows: pa.Table, numbers: Sequence[range], generator: TextGenerator
    ) -> list[list[str] | RowError]:
        """Verdicts of the rollouts of these numbers, or why a row couldn't be asked."""
        tokenizer = cached_tokenizer(self._model)
        with AnswerChecker(self._pilot.timeout_s) as checker:
            found = await problems_of(rows, tokenizer, self._model, self._pilot, checker)
            pairs = [
                (problem, wanted)
                for problem, wanted in zip(found, numbers, strict=True)
                if isinstance(problem, Problem)
            ]
            rollouts = await drawn_rollouts(
                [problem for problem, _ in pairs],
                [wanted for _, wanted in pairs],
                generator,
                checker,
                sampling_of(self._pilot),
                self._seed,
            )
        verdicts = iter([rollout.verdict for rollout in drawn] for drawn in rollouts)
        return [
            problem if isinstance(problem, RowError) else list(next(verdicts)) for problem in found
        ]


def allocated_numbers(ids: pa.ChunkedArray, allocation: Store) -> list[int]:
    """Further rollouts of each row, 0 for a row that was allocated none."""
    table = allocation.read_table(ALLOCATION)
    places = pc.index_in(ids, value_set=table["id"])
    numbers: list[int] = pc.fill_null(table["rollouts"].take(places), 0).to_pylist()
    return numbers


def _further(pilot: Sequence[str], number: int) -> range:
    """Numbers of the rollouts that come after the pilot's."""
    return range(len(pilot), len(pilot) + number)


def _record(
    pilot: list[str] | None, further: list[str] | RowError, pilot_status: str
) -> dict[str, Any]:
    if pilot is None:
        return {"rollouts_status": pilot_status}
    if isinstance(further, RowError):
        return {"rollouts_status": f"failed: {further}"}
    verdicts = [*pilot, *further]
    tally = Tally.of(verdicts)
    low, high = tally.interval or (None, None)
    return {
        "budgeted_rollouts": tally.rollouts,
        "budgeted_correct": tally.correct,
        "budgeted_truncated": tally.truncated,
        "budgeted_unverified": tally.unverified,
        "budgeted_verdicts": verdicts,
        "budgeted_pass_rate": tally.pass_rate,
        "budgeted_pass_rate_low": low,
        "budgeted_pass_rate_high": high,
        "rollouts_status": f"undecided: {tally.undecided}" if tally.undecided else OK,
    }
