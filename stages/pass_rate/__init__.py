"""Pass rate: the share of a model's own answers to each row that are correct.

A row's prompt is answered several times, every answer is checked against the row's reference
answer, and the share of correct ones comes with its Wilson interval.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["AnswerChecker", "Case", "PassRateSettings", "PassRateStage", "wilson_interval"]

_HOME = {
    "AnswerChecker": "checker",
    "Case": "checks",
    "PassRateSettings": "settings",
    "PassRateStage": "stage",
    "wilson_interval": "wilson",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
