"""Reasoning: the structure of a response's chain of thought.

How long it is, how much of it looks back (review ratio), and how much of it belongs to attempts
that it gives up (failed-step fraction), after "What Characterizes Effective Reasoning?" (arXiv
2509.19284). Steps are split by rule; a judge model says what each one is.
"""

from __future__ import annotations

from stages.lazy import lazy_names

__all__ = [
    "ReasoningSettings",
    "ReasoningStage",
    "chain_of_thought",
    "failed_step_fraction",
    "reasoning_characters",
    "reasoning_steps",
    "review_ratio",
    "within_group_zscores",
]

__getattr__ = lazy_names(
    __name__,
    {
        "ReasoningSettings": "settings",
        "ReasoningStage": "stage",
        "chain_of_thought": "trace",
        "failed_step_fraction": "structure",
        "reasoning_characters": "structure",
        "reasoning_steps": "steps",
        "review_ratio": "structure",
        "within_group_zscores": "zscores",
    },
)
