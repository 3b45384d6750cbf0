"""Selective Reflection-Tuning as the paper has it: the instruction, then the response.

The response is rewritten for the pair that stands after phase 1, so a row takes two rewrites.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.reflection.decision import (
    ACCEPTED,
    Choice,
    choose_instruction,
    choose_response,
    unfit_pair,
)
from stages.reflection.offers import Offers
from stages.reflection.record import ReflectedRow
from stages.reflection.settings import ReflectionSettings
from stages.reflection.student import Student


async def reflect_in_sequence(
    rows: Sequence[ReflectedRow], offers: Offers, student: Student, settings: ReflectionSettings
) -> None:
    """Both phases, or the one that the settings name, over rows whose original is scored."""
    if settings.phases != "response":
        await _rewrite_instructions(rows, offers, student, settings)
    if settings.phases != "instruction":
        await _rewrite_responses(rows, offers, student, settings)


async def _rewrite_instructions(
    rows: Sequence[ReflectedRow], offers: Offers, student: Student, settings: ReflectionSettings
) -> None:
    """Phase 1: the harder of the row and the teacher's pair stands."""
    offered = await offers.instructions(rows)
    await student.score_responses(row.versions["instruction"] for row in offered)
    for row in offered:
        choice = ACCEPTED
        if not settings.no_selection:
            choice = choose_instruction(
                row.original.ifd,
                row.versions["instruction"].ifd,
                margin=settings.margin,
                max_ifd=settings.max_ifd,
            )
        row.instruction_result = choice.reason
        if choice.accepted:
            row.standing = "instruction"
    for row in rows:
        row.instruction_result = row.refused.get("instruction", row.instruction_result)
    if settings.scores_rifd:
        await student.score_instructions(row.versions["instruction"] for row in offered)


async def _rewrite_responses(
    rows: Sequence[ReflectedRow], offers: Offers, student: Student, settings: ReflectionSettings
) -> None:
    """Phase 2: the response that tells the student more about the instruction stands."""
    offered = await offers.responses(rows)
    if settings.scores_rifd or not settings.no_selection:
        await student.score_instructions(
            version for row in offered for version in (row.current, row.offered)
        )
    for row in rows:
        row.response_result = row.refused.get(row.offer)
    won: list[ReflectedRow] = []
    for row in offered:
        choice = ACCEPTED if settings.no_selection else _chosen(row, settings)
        row.response_result = choice.reason
        if choice.accepted:
            won.append(row)
    # Only a winner needs its IFD: to report it, and to refuse a response that doesn't fit.
    await student.score_responses(row.offered for row in won)
    for row in won:
        unfit = unfit_pair(row.offered.ifd, max_ifd=settings.max_ifd)
        if unfit and not settings.no_selection:
            row.response_result = unfit
        else:
            row.standing = row.offer


def _chosen(row: ReflectedRow, settings: ReflectionSettings) -> Choice:
    choice = choose_response(row.current.rifd, row.offered.rifd, margin=settings.margin)
    ratio = row.offered.rifd.rifd if row.offered.rifd else None
    if choice.accepted and settings.max_rifd and not (ratio and ratio < settings.max_rifd):
        return Choice(False, "uninformative")
    return choice
