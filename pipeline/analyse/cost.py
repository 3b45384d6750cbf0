"""`tamis analyse cost`: what one correct solution costs, by model and source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import yaml
from pydantic import Field, ValidationError
from rich.table import Table

from pipeline.analyse.runs import ScoredRun, integers, scored_runs
from pipeline.analyse.tables import figure, finite, percent, plain_table
from stages.base import Settings
from stages.errors import ConfigError
from stages.groups.cost import (
    attempt_price,
    attempt_tokens,
    cost_of_pass,
    median_cost_of_solved,
    pooled_cost_of_pass,
    success_rate,
)
from stages.storage import read_file

FloatArray = npt.NDArray[np.float64]

_COLUMNS = ("source", "rollouts", "correct", "truncated", "rollout_tokens", "prompt_tokens")


class TokenPrice(Settings):
    """Price of a million tokens of one model."""

    input: float = Field(ge=0, allow_inf_nan=False, description="Of a million prompt tokens.")
    output: float = Field(ge=0, allow_inf_nan=False, description="Of a million generated tokens.")


class PriceList(Settings):
    """A file of prices: the currency, and a price for every model by its reference in a recipe."""

    currency: str = Field(min_length=1)
    per_million_tokens: dict[str, TokenPrice] = Field(min_length=1)


@dataclass(frozen=True)
class Cost:
    """Expected cost of one correct solution: pooled over rows, and the median of solved rows."""

    pooled: float
    median_solved: float


@dataclass(frozen=True)
class SourceCost:
    """What one model's correct solutions of one source cost.

    Attributes:
        run: the model's run.
        source: its name; None for all sources together.
        rows: rows with at least one rollout.
        unsolved: share of these rows with no correct rollout; their own cost is infinite.
        truncated: share of all rollouts that were cut off. They are paid for and not correct.
        tokens: input and output tokens together.
        money: in the currency of the price list; None without one.
    """

    run: ScoredRun
    source: str | None
    rows: int
    unsolved: float
    truncated: float
    tokens: Cost
    money: Cost | None


def read_prices(url: str) -> PriceList:
    """A price list from a YAML file.

    Raises:
        ConfigError: it isn't there, or isn't a price list.
    """
    try:
        return PriceList.model_validate(yaml.safe_load(read_file(url)))
    except FileNotFoundError as error:
        raise ConfigError(f"no price list at {url}; check the path") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{url} is no YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(
            f"{url}: {place}: {first['msg']}; a price list has `currency` and, under "
            "`per_million_tokens`, `MODEL: {input: PRICE, output: PRICE}`"
        ) from error


def analysed_costs(urls: Sequence[str], prices: PriceList | None) -> list[SourceCost]:
    """Costs of every run's model, by source in alphabetical order, then over all sources.

    Raises:
        ConfigError: a run has no pass rates, no rollouts, or no price in the list.
        StageError: a run's shards don't belong together.
    """
    runs = scored_runs(urls, _COLUMNS)
    return [cost for run in runs for cost in _run_costs(run, _price(run, prices))]


def cost_table(costs: Sequence[SourceCost], currency: str | None) -> Table:
    """One line a model and source."""
    units = ["tokens", *([currency] if currency else [])]
    prices = [name for unit in units for name in (f"{unit} a solution", "median of solved")]
    lines = (
        [
            cost.run.name,
            "all sources" if cost.source is None else cost.source,
            str(cost.rows),
            percent(cost.unsolved),
            percent(cost.truncated),
            *(
                figure(value)
                for each in (cost.tokens, cost.money)
                if each is not None
                for value in (each.pooled, each.median_solved)
            ),
        ]
        for cost in costs
    )
    return plain_table(
        ["model", "source"], ["rows", "never solved", "truncated", *prices], [], lines
    )


def cost_report(costs: Sequence[SourceCost], currency: str | None) -> dict[str, Any]:
    """The same as JSON; null is an infinite cost (pooled), or no solved row (median)."""
    return {
        "currency": currency,
        "costs": [
            {
                "name": cost.run.name,
                "model": cost.run.model,
                "run": cost.run.url,
                "source": cost.source,
                "rows": cost.rows,
                "never_solved": cost.unsolved,
                "truncated": cost.truncated,
                "tokens": _json(cost.tokens),
                "money": _json(cost.money) if cost.money else None,
            }
            for cost in costs
        ],
    }


def _json(cost: Cost) -> Mapping[str, float | None]:
    return {
        "one_correct_solution": finite(cost.pooled),
        "median_of_solved_rows": finite(cost.median_solved),
    }


def _price(run: ScoredRun, prices: PriceList | None) -> TokenPrice | None:
    if prices is None:
        return None
    if run.model not in prices.per_million_tokens:
        raise ConfigError(
            f"the price list has no price for {run.model} (model of {run.url}); it names "
            f"{', '.join(sorted(prices.per_million_tokens))}"
        )
    return prices.per_million_tokens[run.model]


def _run_costs(run: ScoredRun, price: TokenPrice | None) -> list[SourceCost]:
    table = run.table.filter(pc.greater(run.table["rollouts"], 0))
    if not table.num_rows:
        raise ConfigError(f"{run.url}: no row has a rollout, so nothing was paid or solved")
    rollouts, correct, truncated, generated, prompt = (
        integers(table[name])
        for name in ("rollouts", "correct", "truncated", "rollout_tokens", "prompt_tokens")
    )
    taken_in, given_out = attempt_tokens(prompt, rollouts, generated)
    paid = (
        attempt_price(taken_in, given_out, price.input, price.output) if price is not None else None
    )
    success = success_rate(correct, rollouts)
    sources = np.array(table["source"].to_pylist(), dtype=object)
    names = sorted(set(sources.tolist()))
    pools: list[tuple[str | None, npt.NDArray[np.bool_]]] = [
        (name, np.equal(sources, name).astype(bool)) for name in names
    ]
    if len(pools) > 1:
        pools.append((None, np.ones(len(sources), dtype=bool)))
    return [
        SourceCost(
            run=run,
            source=name,
            rows=int(rows.sum()),
            unsolved=float((correct[rows] == 0).mean()),
            truncated=float(truncated[rows].sum() / rollouts[rows].sum()),
            tokens=_cost(taken_in[rows] + given_out[rows], success[rows]),
            money=None if paid is None else _cost(paid[rows], success[rows]),
        )
        for name, rows in pools
    ]


def _cost(attempts: FloatArray, success: FloatArray) -> Cost:
    return Cost(
        pooled_cost_of_pass(attempts, success),
        median_cost_of_solved(cost_of_pass(attempts, success)),
    )
