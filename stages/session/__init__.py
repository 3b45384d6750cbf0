"""Stages as functions of rows in memory: for notebooks and scripts, without a run directory."""

from __future__ import annotations

from stages.lazy import lazy_names

__all__ = ["Emitted", "Fitted", "Ingested", "Mixed", "Selected", "Session"]

__getattr__ = lazy_names(
    __name__,
    {
        "Emitted": "results",
        "Fitted": "results",
        "Ingested": "results",
        "Mixed": "results",
        "Selected": "results",
        "Session": "session",
    },
)
