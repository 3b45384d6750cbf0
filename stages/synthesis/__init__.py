"""Synthesis: new problems from a generator, solutions from a teacher, and what is kept of them.

After ScaleDiff (arXiv 2509.21070). A model that was trained on difficult problems writes problems
when it is given nothing but the header of a user's turn; a teacher solves each; rules, and a
student that mustn't solve it too, decide which pairs become rows of a new source.
"""

from __future__ import annotations

from stages.lazy import lazy_names

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

__getattr__ = lazy_names(
    __name__,
    {
        "FilterSettings": "settings",
        "GeneratorSettings": "settings",
        "REASONS": "sample",
        "Sample": "sample",
        "StudentSettings": "settings",
        "TeacherSettings": "settings",
        "end_of_turn_ids": "headers",
        "training_example": "training",
        "user_header_ids": "headers",
    },
)
