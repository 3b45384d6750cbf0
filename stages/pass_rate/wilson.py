"""Wilson's score interval of a proportion."""

from __future__ import annotations

import math


def wilson_interval(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    r"""Bounds of a proportion of which `correct` of `n` were seen, within 0 to 1.

    .. math:: \frac{c + z^2/2}{n + z^2} \pm \frac{z}{n + z^2} \sqrt{\frac{c (n - c)}{n} +
        \frac{z^2}{4}}

    Args:
        correct: c, from 0 to n.
        n: independent trials, at least 1.
        z: normal quantile of the confidence; the default is that of 95 %.

    Raises:
        ValueError: `n` is below 1, or `correct` isn't from 0 to `n`.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, Journal of
    the American Statistical Association 22(158), 1927.
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"{correct} correct of {n}: no proportion")
    middle = (correct + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(correct * (n - correct) / n + z * z / 4)
    # Exact at the ends, where rounding would leave a bound just beyond the proportion itself.
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == n else middle + half
    return low, high
