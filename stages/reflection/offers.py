"""What the teacher offers: rewrites of many rows that can be read and pass the checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stages.errors import StageError
from stages.reflection.checks import RewriteChecks
from stages.reflection.parsing import ParseFailure, Rewrite
from stages.reflection.record import ReflectedRow, Version
from stages.reflection.teacher import Teacher
from stages.rows import with_turns


class Offers:
    """Asks for rewrites of what stands, and puts those that can be used among a row's versions."""

    def __init__(
        self, teacher: Teacher, checks: RewriteChecks, model: str, max_failed_share: float
    ) -> None:
        """Keep whom to ask (and what it's called), what to check, and how much may fail."""
        self._teacher = teacher
        self._checks = checks
        self._model = model
        self._max_failed_share = max_failed_share

    async def instructions(self, rows: Sequence[ReflectedRow]) -> list[ReflectedRow]:
        """Phase 1: the rows that have a version `instruction` now.

        The reference answer stays with the new pair where its response gives it.

        Raises:
            StageError: more rewrites failed than may.
        """
        rows = [row for row in rows if row.unanswered is None]
        replies = await self._teacher.instructions(rows)
        self._check_failures(replies)
        read: list[tuple[ReflectedRow, Rewrite]] = []
        for row, new in zip(rows, replies, strict=True):
            if isinstance(new, ParseFailure):
                row.refused["instruction"] = new.code
            elif overlap := self._checks.overlap(*new):
                row.refused["instruction"] = overlap
            else:
                read.append((row, new))
        problems = await self._checks.answer_problems(
            [row for row, _ in read], [new.response for _, new in read]
        )
        for (row, new), problem in zip(read, problems, strict=True):
            turns = with_turns(row.messages, instruction=new.instruction, response=new.response)
            row.versions["instruction"] = Version(turns, None if problem else row.current.answer)
        return [row for row, _ in read]

    async def responses(self, rows: Sequence[ReflectedRow]) -> list[ReflectedRow]:
        """Phase 2: the rows that have a version with a new response now.

        It is called `response` or `both`, by whose instruction it answers.

        Raises:
            StageError: more rewrites failed than may.
        """
        rows = [row for row in rows if row.unanswered is None]
        asked: list[ReflectedRow] = []
        unreadable = await self._checks.unreadable_answers(rows)
        for row, without in zip(rows, unreadable, strict=True):
            # No response could be accepted, so none is paid for.
            if without:
                row.refused[row.offer] = "answer_unreadable"
            else:
                asked.append(row)
        replies = await self._teacher.responses(asked)
        self._check_failures(replies)
        read: list[tuple[ReflectedRow, str]] = []
        for row, new in zip(asked, replies, strict=True):
            if isinstance(new, ParseFailure):
                row.refused[row.offer] = new.code
            elif overlap := self._checks.overlap(new):
                row.refused[row.offer] = overlap
            else:
                read.append((row, new))
        problems = await self._checks.answer_problems(
            [row for row, _ in read], [new for _, new in read]
        )
        offered: list[ReflectedRow] = []
        for (row, new), problem in zip(read, problems, strict=True):
            if problem:
                row.refused[row.offer] = problem
                continue
            turns = with_turns(row.messages, response=new)
            row.versions[row.offer] = Version(turns, row.current.answer)
            offered.append(row)
        return offered

    def _check_failures(self, replies: Sequence[object]) -> None:
        failures = [reply for reply in replies if isinstance(reply, ParseFailure)]
        limit = self._max_failed_share
        if len(failures) <= limit * len(replies):
            return
        codes = Counter(failure.code for failure in failures).most_common()
        raise StageError(
            f"reflection: {len(failures)} of {len(replies)} rewrites by {self._model} failed "
            f"({', '.join(f'{code} {n}' for code, n in codes)}), more than "
            f"max_failed_share={limit}; for example: {failures[0].detail}. Choose another reply "
            "form or teacher, raise max_new_tokens, or raise the share",
            stage="reflection",
        )
