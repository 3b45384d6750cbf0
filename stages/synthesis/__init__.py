"""Synthesis: new problems from a generator, solutions from a teacher, and what is kept of them.

After ScaleDiff (arXiv 2509.21070). A model that was trained on difficult problems writes problems
when it is given nothing but the header of a user's turn; a teacher solves each; rules, and a
student that mustn't solve it too, decide which pairs become rows of a new source.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = [
    "FilterSettings",
    "GeneratorSettings",
    "REASONS",
    "Sample",
    "StudentSettings",
    "TeacherSettings",
    "end_of_turn_ids",
    "training_example",
    "user_header_ids",
]

_HOME = {
    "FilterSettings": "settings",
    "GeneratorSettings": "settings",
    "REASONS": "sample",
    "Sample": "sample",
    "StudentSettings": "settings",
    "TeacherSettings": "settings",
    "end_of_turn_ids": "headers",
    "training_example": "training",
    "user_header_ids": "headers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
