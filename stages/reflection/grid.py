"""The released selection: four versions of a row, all scored, of which one stands.

Besides the original there are the teacher's pair, its response to the original instruction, and its
response to the instruction of its pair, so a row takes three rewrites.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.reflection.decision import Scores, choose_in_grid
from stages.reflection.offers import Offers
from stages.reflection.record import ReflectedRow, Version
from stages.reflection.settings import ReflectionSettings
from stages.reflection.student import Student


async def reflect_in_grid(
    rows: Sequence[ReflectedRow], offers: Offers, student: Student, settings: ReflectionSettings
) -> None:
    """All rewrites of rows whose original is scored, and the choice among the versions."""
    paired = await offers.instructions(rows)
    await offers.responses(rows)
    for row in paired:
        row.standing = "instruction"  # what the teacher is shown next
    await offers.responses(paired)
    versions = [version for row in rows for version in row.versions.values()]
    await student.score_responses(versions)
    await student.score_instructions(versions)
    for row in rows:
        _choose(row, settings)


def _choose(row: ReflectedRow, settings: ReflectionSettings) -> None:
    pair, alone, both = (row.versions.get(name) for name in ("instruction", "response", "both"))
    choice = choose_in_grid(
        _scores(row.original),
        _scores(pair) if pair and not _too_long(pair) else None,
        _scores(alone) if alone and not _too_long(alone, row.original) else None,
        _scores(both) if both and not _too_long(both, pair) else None,
        margin=settings.margin,
        max_ifd=settings.max_ifd,
        max_rifd=settings.max_rifd,
    )
    row.standing = choice.version
    row.instruction_result = row.refused.get("instruction", choice.instruction)
    if pair and _too_long(pair):
        row.instruction_result = "too_long"
    harder = choice.instruction in ("accepted", "misaligned")
    row.response_result = row.refused.get("both" if harder else "response", choice.response)
    candidate, base = (both, pair) if harder else (alone, row.original)
    if candidate and _too_long(candidate, base):
        row.response_result = "too_long"


def _scores(version: Version) -> Scores:
    return Scores(
        version.ifd.ifd if version.ifd else None, version.rifd.rifd if version.rifd else None
    )


def _too_long(version: Version, base: Version | None = None) -> bool:
    """Whether a rewrite was scored in part, or on fewer instruction tokens than what it follows."""
    if version.ifd and version.ifd.truncated:
        return True
    return bool(base and base.rifd and version.rifd and base.rifd.tokens != version.rifd.tokens)
