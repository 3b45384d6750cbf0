"""Reflection: a teacher rewrites rows, the student decides whether each rewrite stands.

Two phases, after Selective Reflection-Tuning (arXiv 2402.10110). First the teacher offers a new
instruction with its response, and the pair of higher IFD (harder for the student) stands. Then it
offers a new response to what stands, and the response of lower r-IFD (from which the student tells
the instruction more easily) stands. In the released code's mode the teacher offers all four
versions of a row, and one is chosen. A reply that can't be read, a text that can't be scored, and a
rewrite that loses the row's answer or brings in a target's text leave the row as it was.
"""

from __future__ import annotations

from stages.lazy import lazy_names

__all__ = ["ReflectionSettings", "ReflectionStage"]

__getattr__ = lazy_names(__name__, {"ReflectionSettings": "settings", "ReflectionStage": "stage"})
