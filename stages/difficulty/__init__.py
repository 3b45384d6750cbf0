"""Difficulty: how hard each row is for the student, before any tuning.

Instruction-Following Difficulty (IFD) compares how well the student predicts a response with and
without its prompt; near 1 the prompt hardly helps.
"""

from __future__ import annotations

from stages.lazy import lazy_names

__all__ = ["DifficultySettings", "DifficultyStage", "reference_losses"]

__getattr__ = lazy_names(
    __name__,
    {
        "DifficultySettings": "settings",
        "DifficultyStage": "stage",
        "reference_losses": "compat",
    },
)
