"""What a run may spend, and what it has spent: hours, generated tokens, money.

Totals are those of all executions of a run directory, kept there in `spent.json`, so that a job
that is tried again doesn't begin to count anew. They are looked at before a shard is begun: what is
under way then is finished, which a budget may be exceeded by.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import Field

from stages.base import EngineSpec, Settings
from stages.engines.spent import Spent
from stages.storage import Store

SPENT = "spent.json"
_HOUR_S = 3600


class Budgets(Settings):
    """The `execution.budgets` section of a recipe."""

    max_hours: float | None = Field(
        default=None, gt=0, description="Hours that all executions of the run may take together."
    )
    max_generated_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that the run's models may generate (teacher, judge, rollouts, "
        "prefixes); what the cache holds isn't counted, nor the probe of reply forms.",
    )
    max_cost: float | None = Field(
        default=None,
        gt=0,
        description="Price of all requests to endpoints, in the currency of their `price_in` and "
        "`price_out`, which each endpoint of the recipe then needs.",
    )


class Total(NamedTuple):
    """What a run has spent.

    Attributes:
        seconds: of all its executions.
        generated_tokens: of all models; those of endpoints as they count them.
        cost: of the endpoints that have prices.
    """

    seconds: float = 0.0
    generated_tokens: int = 0
    cost: float = 0.0


class Ledger:
    """Adds up what a run spends, and says when a budget is used up."""

    def __init__(self, run: Store, budgets: Budgets) -> None:
        """Go on from what earlier executions noted."""
        self._run, self._budgets = run, budgets
        self._before = Total(**run.read_json(SPENT)) if run.exists(SPENT) else Total()
        self._generated, self._cost = 0, 0.0
        self._started = time.monotonic()

    @property
    def total(self) -> Total:
        """What the run has spent up to now."""
        return Total(
            round(self._before.seconds + time.monotonic() - self._started, 3),
            self._before.generated_tokens + self._generated,
            self._before.cost + self._cost,
        )

    def add(self, spent: Mapping[str, Spent], engines: Mapping[str, EngineSpec]) -> None:
        """Note what a shard's models generated, by role."""
        for role, one in spent.items():
            self._generated += one.generated_tokens
            endpoint = engines[role].settings.endpoint
            if endpoint is not None:
                self._cost += endpoint.cost(one.prompt_tokens, one.generated_tokens) or 0.0
        self.write()

    def write(self) -> None:
        """Keep the total for the next execution."""
        self._run.write_json(SPENT, self.total._asdict())

    def used_up(self, engines: Mapping[str, EngineSpec]) -> str | None:
        """The budget that leaves nothing for a stage with these engines, in words."""
        total, most = self.total, self._budgets
        if most.max_hours is not None and total.seconds >= most.max_hours * _HOUR_S:
            return f"max_hours {most.max_hours:g}: {total.seconds / _HOUR_S:.2f} hours are spent"
        generators = [spec.settings for spec in engines.values() if spec.kind == "generator"]
        if not generators:
            return None
        tokens = most.max_generated_tokens
        if tokens is not None and total.generated_tokens >= tokens:
            return f"max_generated_tokens {tokens:,}: {total.generated_tokens:,} were generated"
        pays = any(settings.endpoint is not None for settings in generators)
        if most.max_cost is not None and pays and total.cost >= most.max_cost:
            return f"max_cost {most.max_cost:g}: {total.cost:.4g} are spent"
        return None
