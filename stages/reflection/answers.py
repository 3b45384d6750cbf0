"""Whether a new response still gives the row's reference answer."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\w])")


def gives_answer(response: str, answer: str) -> bool:
    """Whether a response ends on a numeric answer, or states any other answer word for word.

    Doubt keeps the original: `620` isn't given by "620 cents, after 2 steps", nor `1/2` by "0.5".
    """
    wanted = " ".join(answer.split())
    if not wanted:
        return True
    if _NUMBER.fullmatch(wanted):
        numbers = _NUMBER.findall(response)
        return bool(numbers) and _value(numbers[-1]) == _value(wanted)
    alone = rf"(?<!\w){re.escape(wanted)}(?!\w)"
    return re.search(alone, " ".join(response.split()), re.IGNORECASE) is not None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
