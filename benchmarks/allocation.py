r"""Variance of an estimated gradient: budgeted rollouts against as many for every prompt.

    python benchmarks/allocation.py [--json FILE] [--check] [--run DIR]

Prompt i is solved by a share p_i of its rollouts. The gradient of a correct rollout is a random
vector u of fixed norm G_i and mean mu_i with |mu_i| = rho G_i; all loss gradients are

    g = -sum_i mu_i,    estimated by    g^ = -sum_i 1 / (n_i p_i) sum_(correct j) u_ij

from n_i >= 1 rollouts a prompt. One rollout contributes A u / p_i with A ~ Bernoulli(p_i), of mean
mu_i and second moment E|A u / p_i|^2 = G_i^2 / p_i. Hence g^ is unbiased and

    E|g^ - g|^2 = sum_i 1 / n_i (G_i^2 / p_i - |mu_i|^2) = sum_i G_i^2 / n_i (1 / p_i - rho^2).

GVM-RAFT (arXiv 2505.02391, section 3.1) minimises the bound that leaves out rho^2. The factor that
it predicts for real-valued n_i in proportion to the weights w_i, at the same sum of n_i, is

    k sum_i G_i^2 / p_i  /  (sum_i w_i sum_i G_i^2 / (p_i w_i)).

`--check` exits 1 where the 95 % interval of the measured factor lies below that prediction. The
rule's numbers are the whole ones of `stages.allocation`.

In the first row of the table p and G are known, as the rule assumes: it tests the prediction. The
others take them from 8 pilot rollouts a prompt, drawn anew each time, as a user has them; the
estimate still divides by the true p_i, so that only the allocation differs. There, prompts that the
pilot never solved get `floor` rollouts. With a floor of 0 their share of g is lost (the squared
bias is part of the error); "equal, solved only" loses the same and shows what leaving prompts out
does without the rule.

`--run DIR` takes p and G from the pass_rate columns of a finished run instead of a made-up
population (a measured pass rate stands for the true one; rows never solved have no gradient).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages.allocation.integers import allocated
from stages.allocation.weights import allocation_weights, predicted_ratio
from stages.storage import Store

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ALPHA, BETA = 1e-3, 2.0
PILOT = 8
MEAN_SHARE = 0.3
"""rho: the norm of a prompt's mean gradient over that of one rollout's."""


@dataclass(frozen=True)
class Population:
    """Prompts with what only a simulation knows.

    Attributes:
        pass_rates: p, float64 [k].
        norms: G, float64 [k].
        directions: of mu, unit vectors, float64 [k, d].
    """

    pass_rates: FloatArray
    norms: FloatArray
    directions: FloatArray

    @property
    def gradient(self) -> FloatArray:
        """The true g, float64 [d]."""
        return -(MEAN_SHARE * self.norms) @ self.directions

    def variance(self, rollouts: IntArray) -> float:
        """E|g^ - g|^2 for n of at least 1 each, in closed form."""
        return float(np.sum(self.norms**2 / rollouts * (1 / self.pass_rates - MEAN_SHARE**2)))


@dataclass(frozen=True)
class Comparison:
    """One row of the table: an allocation against uniform numbers at the same budget.

    Attributes:
        allocation: its name.
        error: mean of |g^ - g|^2.
        bias_share: the squared bias' part of it.
        exact: factor in closed form; None where a prompt may get no rollout.
        factor: uniform's error over this one's, as measured.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    allocation: str
    error: float
    bias_share: float
    exact: float | None
    factor: float
    low: float
    high: float


def made_up(prompts: int, width: int, rng: np.random.Generator) -> Population:
    """Prompts of all difficulties, some with gradients many times as large as others'."""
    pass_rates = np.clip(rng.beta(0.8, 1.2, prompts), 0.01, 1.0)
    return Population(pass_rates, rng.lognormal(0.0, 0.8, prompts), directions(prompts, width, rng))


def of_run(url: str, width: int, rng: np.random.Generator) -> Population:
    """The rows of a run that have a pass rate above 0 and a gradient norm.

    Raises:
        SystemExit: there are none.
    """
    store = Store(url).child("pass_rate")
    parts = [name for name in store.names() if name.startswith("part-")]
    tables = [store.read_table(part, ["pass_rate", "gradient_norm"]) for part in parts]
    pairs = [
        (row["pass_rate"], row["gradient_norm"])
        for table in tables
        for row in table.to_pylist()
        if row["pass_rate"] and row["gradient_norm"]
    ]
    if not pairs:
        raise SystemExit(
            f"{url} has no row with a pass rate above 0 and a gradient norm; run its recipe with "
            "pass_rate.gradient: true"
        )
    p, g = np.array(pairs, dtype=np.float64).T
    return Population(p, g, directions(len(p), width, rng))


def directions(count: int, width: int, rng: np.random.Generator) -> FloatArray:
    """Uniformly random unit vectors, float64 [count, width]."""
    vectors = rng.normal(size=(count, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def estimates(population: Population, rollouts: IntArray, rng: np.random.Generator) -> FloatArray:
    """Independent draws of g^, float64 [repetitions, d].

    Args:
        population: the prompts.
        rollouts: n of every repetition and prompt, int64 [repetitions, k].
        rng: draws which rollouts are correct, and their gradients.
    """
    found = np.zeros((len(rollouts), population.directions.shape[1]))
    prompts = zip(
        population.pass_rates, population.norms, population.directions, rollouts.T, strict=True
    )
    for p, norm, mean, numbers in prompts:
        correct = rng.binomial(numbers, p)
        sums = sums_of_gradients(correct, mean, rng)
        drawn = numbers > 0
        found[drawn] -= norm * sums[drawn] / (numbers[drawn, None] * p)
    return found


def sums_of_gradients(counts: IntArray, mean: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Sums of `counts` unit gradients each: rho along `mean`, the rest in a random direction."""
    across = rng.standard_normal((int(counts.sum()), len(mean)), dtype=np.float32)
    along = mean.astype(np.float32)
    across -= np.outer(across @ along, along)
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    # Prefix sums, because reduceat can't sum empty groups.
    prefix = np.concatenate([np.zeros((1, len(mean))), np.cumsum(across, axis=0, dtype=np.float64)])
    ends = np.cumsum(counts)
    return MEAN_SHARE * np.outer(counts, mean) + np.sqrt(1 - MEAN_SHARE**2) * (
        prefix[ends] - prefix[ends - counts]
    )


def rule(pass_rates: FloatArray, norms: FloatArray, total: int, floor: int) -> IntArray:
    """The rule's whole numbers of rollouts, int64 [k]."""
    return allocated(allocation_weights(pass_rates, norms, ALPHA, BETA), total, floor=floor)


def plans(
    population: Population, per_prompt: int, repetitions: int, rng: np.random.Generator
) -> dict[str, IntArray]:
    """Allocations by name, int64 [repetitions, k]; the first knows p and G."""
    p, g = population.pass_rates, population.norms
    total = per_prompt * len(p)
    # A pilot's G is exact: correct rollouts of a prompt all have the same norm here.
    rates = rng.binomial(PILOT, p, (repetitions, len(p))) / PILOT
    norms = np.where(rates > 0, g, np.nan)
    pairs = list(zip(rates, norms, strict=True))
    found = {"rule, p and G known": np.tile(rule(p, g, total, 1), (repetitions, 1))}
    found["equal, solved only"] = np.array([allocated((r > 0) * 1.0, total) for r in rates])
    for floor in (0, 1, per_prompt // 2):
        found[f"rule, floor {floor}"] = np.array([rule(*pair, total, floor) for pair in pairs])
    return found


def assert_unbiased(name: str, draws: FloatArray, gradient: FloatArray) -> None:
    """See that the mean of the draws is the true gradient, to 1 in 1,000 by chance.

    Raises:
        SystemExit: it isn't.
    """
    deviations = (draws.mean(axis=0) - gradient) / (draws.std(axis=0, ddof=1) / len(draws) ** 0.5)
    limit = NormalDist().inv_cdf(1 - 0.001 / (2 * len(gradient)))
    if np.abs(deviations).max() > limit:
        raise SystemExit(
            f"{name}: the estimate's mean is {np.abs(deviations).max():.1f} standard errors from "
            f"the true gradient, more than {limit:.1f}: it isn't unbiased"
        )


def squared_errors(draws: FloatArray, gradient: FloatArray) -> FloatArray:
    """|g^ - g|^2 of every draw, float64 [repetitions]."""
    return np.sum((draws - gradient) ** 2, axis=1)


def ratio_interval(
    above: FloatArray, below: FloatArray, rng: np.random.Generator, resamples: int = 2000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of mean(above) / mean(below)."""

    def means(values: FloatArray) -> FloatArray:
        places = (rng.integers(0, len(values), len(values)) for _ in range(resamples))
        return np.array([values[drawn].mean() for drawn in places])

    low, high = np.quantile(means(above) / means(below), [0.025, 0.975])
    return float(low), float(high)


def compared(
    population: Population, per_prompt: int, repetitions: int, rng: np.random.Generator
) -> tuple[float, list[Comparison]]:
    """Uniform's mean error, and every allocation against it.

    Raises:
        SystemExit: an estimate that should be unbiased isn't.
    """
    uniform = np.full(len(population.norms), per_prompt)
    draws = estimates(population, np.tile(uniform, (repetitions, 1)), rng)
    assert_unbiased("uniform", draws, population.gradient)
    errors = squared_errors(draws, population.gradient)
    rows: list[Comparison] = []
    for name, plan in plans(population, per_prompt, repetitions, rng).items():
        draws = estimates(population, plan, rng)
        exact = None
        if (plan > 0).all():
            assert_unbiased(name, draws, population.gradient)
            mean_variance = np.mean([population.variance(numbers) for numbers in plan])
            exact = float(population.variance(uniform) / mean_variance)
        own = squared_errors(draws, population.gradient)
        # The mean of the draws is off by chance too, by a share of 1 / repetitions of the error.
        bias = np.sum((draws.mean(axis=0) - population.gradient) ** 2) / own.mean()
        rows.append(
            Comparison(
                name,
                float(own.mean()),
                float(bias),
                exact,
                float(errors.mean() / own.mean()),
                *ratio_interval(errors, own, rng),
            )
        )
    return float(errors.mean()), rows


def print_table(population: Population, per_prompt: int, predicted: float, uniform: float,
                rows: list[Comparison]) -> None:  # fmt: skip
    """The comparison, for a person."""
    p, g = population.pass_rates, population.norms
    print(
        f"{len(p)} prompts, {per_prompt} rollouts a prompt on average; mean p {p.mean():.2f}, "
        f"largest G {g.max() / g.mean():.1f} times the mean"
    )
    print(f"error of uniform numbers {uniform:.4g}; predicted factor {predicted:.3f}\n")
    print(f"{'allocation':<22}{'error':>9}{'of it bias':>12}{'exact':>8}{'factor':>8}  95 %")
    for row in rows:
        exact = "" if row.exact is None else f"{row.exact:.3f}"
        print(
            f"{row.allocation:<22}{row.error:>9.4g}{row.bias_share:>12.1%}{exact:>8}"
            f"{row.factor:>8.3f}  {row.low:.3f} to {row.high:.3f}"
        )


def main() -> None:
    """Measure, print, and check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--check", action="store_true", help="exit 1 below the predicted factor")
    parser.add_argument("--run", metavar="DIR", help="take p and G from a run's pass_rate columns")
    parser.add_argument("--prompts", type=int, default=200, help="size of the made-up population")
    parser.add_argument("--width", type=int, default=32, help="entries of a gradient")
    parser.add_argument("--per-prompt", type=int, default=16, help="rollouts over prompts")
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    rng = np.random.default_rng(options.seed)
    population = (
        of_run(options.run, options.width, rng)
        if options.run
        else made_up(options.prompts, options.width, rng)
    )
    p, g = population.pass_rates, population.norms
    predicted = predicted_ratio(p, g, allocation_weights(p, g, ALPHA, BETA))
    uniform, rows = compared(population, options.per_prompt, options.repetitions, rng)
    print_table(population, options.per_prompt, predicted, uniform, rows)
    seconds = time.monotonic() - started
    print(f"\n{seconds:.1f} s")
    if options.json:
        folder, _, name = options.json.rpartition("/")
        Store(folder or ".").write_json(
            name,
            {
                "prompts": len(p),
                "per_prompt": options.per_prompt,
                "width": options.width,
                "repetitions": options.repetitions,
                "seed": options.seed,
                "predicted": predicted,
                "uniform_error": uniform,
                "rows": [asdict(row) for row in rows],
                "seconds": round(seconds, 1),
            },
        )
    if options.check and rows[0].high < predicted:
        raise SystemExit(
            f"the measured factor {rows[0].factor:.3f} ({rows[0].low:.3f} to {rows[0].high:.3f}) "
            f"is below the predicted {predicted:.3f}"
        )


if __name__ == "__main__":
    main()
