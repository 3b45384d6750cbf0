"""Pass rate: the share of a model's own answers to each row that are correct.

A row's prompt is answered several times, every answer is checked against the row's reference
answer, and the share of correct ones comes with its Wilson interval.
"""

from __future__ import annotations

from stages.lazy import lazy_names

__all__ = ["AnswerChecker", "Case", "PassRateSettings", "PassRateStage", "wilson_interval"]

__getattr__ = lazy_names(
    __name__,
    {
        "AnswerChecker": "checker",
        "Case": "checks",
        "PassRateSettings": "settings",
        "PassRateStage": "stage",
        "wilson_interval": "wilson",
    },
)
