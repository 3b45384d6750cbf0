"""What generating models were asked for."""

from __future__ import annotations

from typing import NamedTuple


class Spent(NamedTuple):
    """What was asked of a model beside what the cache held; tokens as an endpoint counts them."""

    requests: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def plus(self, other: Spent) -> Spent:
        """The sum, field by field."""
        return Spent(*(a + b for a, b in zip(self, other, strict=True)))
