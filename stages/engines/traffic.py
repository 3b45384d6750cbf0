"""How fast an endpoint is asked: rates a minute, pauses that it asks for, waits between tries."""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from datetime import UTC
from email.utils import parsedate_to_datetime


def backoff_wait_s(seed: int, tries: int, longest_s: float) -> float:
    r"""Seconds before another try: exponential backoff with full jitter.

    .. math:: w_k \sim U\bigl(0,\ \min(c,\ 2^{k-1})\bigr)

    Args:
        seed: of the request; the same request waits equally long every time.
        tries: made so far, :math:`k \ge 1`.
        longest_s: :math:`c`, seconds.

    Source: M. Brooker, Exponential Backoff and Jitter, AWS Architecture Blog, 2015 ("full jitter").
    """
    ceiling = min(longest_s, 2.0 ** min(tries - 1, 60))
    return random.Random(f"{seed}:{tries}").uniform(0, ceiling)


def retry_after_s(header: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, not below 0; None where it asks for none.

    Args:
        header: seconds, or an HTTP date (RFC 9110, section 10.2.3); anything else asks for nothing.
        now: seconds since the epoch.
    """
    if header is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        moment = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - now)


class Pace:
    """An amount a minute, kept by waiting: what was spent has to be made up for before more is."""

    def __init__(self, per_minute: float) -> None:
        """Start with nothing spent."""
        self._seconds_each = 60 / per_minute
        self._free_at = 0.0

    def wait_s(self, now: float) -> float:
        """Seconds until more may be spent; 0 where it may be now."""
        return max(0.0, self._free_at - now)

    def spend(self, now: float, amount: float) -> None:
        """Note what is spent at a moment."""
        self._free_at = max(self._free_at, now) + amount * self._seconds_each


class Traffic:
    """When the next request may be sent."""

    def __init__(
        self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None
    ) -> None:
        """Set the rates; None is no limit."""
        self._requests = Pace(requests_per_minute) if requests_per_minute else None
        self._tokens = Pace(tokens_per_minute) if tokens_per_minute else None
        self._most_tokens = tokens_per_minute or math.inf
        self._paused_until = 0.0

    async def turn(self) -> None:
        """Wait until one more request may be sent, and count it."""
        while (wait := self._wait_s(time.monotonic())) > 0:
            await asyncio.sleep(wait)
        if self._requests:
            self._requests.spend(time.monotonic(), 1)

    def spend_tokens(self, tokens: float) -> None:
        """Count what a request took, of which no more than one minute has to be made up for.

        An endpoint may report any number, and a wrong one mustn't stop the run for hours.
        """
        if self._tokens:
            self._tokens.spend(time.monotonic(), min(tokens, self._most_tokens))

    def pause(self, seconds: float) -> None:
        """Send nothing for some time, as the endpoint asked."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def _wait_s(self, now: float) -> float:
        paces = [pace.wait_s(now) for pace in (self._requests, self._tokens) if pace]
        return max(self._paused_until - now, *paces, 0.0)
