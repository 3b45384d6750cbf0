"""Cost-of-pass: what one correct solution is expected to cost, in tokens or money.

Source of the idea: Cost-of-Pass (arXiv 2504.13359), the expected cost of an attempt over the
probability that it is correct. Every attempt counts, also a truncated one: it was paid for and gave
no correct solution.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def attempt_tokens(
    prompt_tokens: IntArray, rollouts: IntArray, rollout_tokens: IntArray
) -> tuple[FloatArray, FloatArray]:
    r"""Tokens that one attempt at each row takes in, and gives out on average.

    .. math:: C^{in}_i = \ell_i, \qquad C^{out}_i = t_i / n_i

    Source: definition; each of the row's n attempts reads the prompt anew.

    Args:
        prompt_tokens: l, int64 [rows].
        rollouts: n, int64 [rows], at least 1.
        rollout_tokens: t, generated tokens of all rollouts of a row, int64 [rows].

    Returns:
        Input and output tokens, each float64 [rows].
    """
    return prompt_tokens.astype(np.float64), rollout_tokens / rollouts


def attempt_price(
    input_tokens: FloatArray, output_tokens: FloatArray, input_price: float, output_price: float
) -> FloatArray:
    r"""Money that one attempt at each row costs.

    .. math:: C_i = \bigl(C^{in}_i\, p^{in} + C^{out}_i\, p^{out}\bigr) / 10^6

    Source: Cost-of-Pass (arXiv 2504.13359).

    Args:
        input_tokens: of one attempt, float64 [rows].
        output_tokens: of one attempt, float64 [rows].
        input_price: of a million input tokens.
        output_price: of a million output tokens.

    Returns:
        float64 [rows], in the unit of the prices.
    """
    return (input_tokens * input_price + output_tokens * output_price) / 1e6


def success_rate(correct: IntArray, rollouts: IntArray) -> FloatArray:
    r"""The chance that an attempt which was paid for gave a correct solution.

    .. math:: r_i = c_i / n_i

    It isn't the pass rate, which leaves truncated rollouts out of the denominator: dividing the
    cost of all attempts by that rate would make a model that is often cut off look cheap.

    Source: Cost-of-Pass (arXiv 2504.13359).

    Args:
        correct: c, int64 [rows].
        rollouts: n, int64 [rows], at least 1.

    Returns:
        float64 [rows].
    """
    rate: FloatArray = correct / rollouts
    return rate


def cost_of_pass(attempt_cost: FloatArray, success: FloatArray) -> FloatArray:
    r"""Expected cost of one correct solution of each row; infinite where none was correct.

    .. math:: v_i = C_i / r_i

    Source: Cost-of-Pass (arXiv 2504.13359): attempts until the first success are geometric.

    Args:
        attempt_cost: C, float64 [rows], in tokens or money.
        success: r, float64 [rows].

    Returns:
        float64 [rows].
    """
    solved = success > 0
    return np.where(solved, attempt_cost / np.where(solved, success, 1.0), np.inf)


def pooled_cost_of_pass(attempt_cost: FloatArray, success: FloatArray) -> float:
    r"""Expected cost of one correct solution when each attempt is at a row drawn uniformly.

    .. math:: v = \sum_i C_i \Big/ \sum_i r_i

    With the same number of rollouts for each row it is everything paid over everything correct.
    Unlike the mean of :math:`v_i`, it is finite when a row was never solved; such rows' cost counts
    in full.

    Source: Wald's identity for the attempts until the first success. The paper averages
    :math:`v_i` instead, each capped by a human's price.

    Args:
        attempt_cost: C, float64 [rows], in tokens or money.
        success: r, float64 [rows].

    Returns:
        Infinite where no row was ever solved.
    """
    total = float(success.sum())
    return float(attempt_cost.sum()) / total if total > 0 else float("inf")


def median_cost_of_solved(costs: FloatArray) -> float:
    """Median cost-of-pass of the rows that were solved at least once; NaN where none was.

    Source: definition. It says nothing without the share of rows that it leaves out.

    Args:
        costs: v, float64 [rows], infinite for rows that were never solved.
    """
    solved = costs[np.isfinite(costs)]
    return float(np.median(solved)) if solved.size else float("nan")
