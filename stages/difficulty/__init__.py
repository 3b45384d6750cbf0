"""Difficulty: how hard each row is for the student, before any tuning.

Instruction-Following Difficulty (IFD) compares how well the student predicts a response with and
without its prompt; near 1 the prompt hardly helps.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["DifficultySettings", "DifficultyStage", "reference_losses"]

_HOME = {
    "DifficultySettings": "settings",
    "DifficultyStage": "stage",
    "reference_losses": "compat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
