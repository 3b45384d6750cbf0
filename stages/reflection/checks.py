"""What a rewrite must not do, whatever the student says of it.

It must not bring in a text of the targets or of an evaluation set, and a new response must still
give the row's reference answer. Doubt keeps the original: an answer that can't be compared counts
as not given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import lru_cache

import pyarrow as pa

from stages.overlap import OverlapIndex, are_telling
from stages.pass_rate.checker import AnswerChecker
from stages.pass_rate.checks import Case
from stages.reflection.record import ReflectedRow
from stages.rows import messages_of
from stages.sources.answers import extract_answer, last_boxed
from stages.storage import Store
from stages.words import words


class RewriteChecks:
    """Checks rewrites of many rows at once."""

    def __init__(self, checker: AnswerChecker, unseen: OverlapIndex) -> None:
        """Keep what compares answers, and the texts that must stay unseen."""
        self._checker = checker
        self._unseen = unseen

    def overlap(self, *texts: str) -> str | None:
        """Why these texts can't be used, `overlaps: SET`, or None where they can."""
        for text in texts:
            found = self._unseen.match(text)
            if found:
                return f"overlaps: {found.set}"
        return None

    async def unreadable_answers(self, rows: Sequence[ReflectedRow]) -> list[bool]:
        """Whether the answer that stands can't be compared with anything (no answer: False)."""
        answers = [(row.check, row.current.answer) for row in rows]
        asked = [(check, answer) for check, answer in answers if answer is not None]
        reasons = iter(await asyncio.to_thread(self._checker.unusable, asked))
        return [answer is not None and next(reasons) is not None for _, answer in answers]

    async def answer_problems(
        self, rows: Sequence[ReflectedRow], responses: Sequence[str]
    ) -> list[str | None]:
        """Why a new response can't be trusted with the answer that stands, or None; in order."""
        cases = [
            (place, case)
            for place, (row, text) in enumerate(zip(rows, responses, strict=True))
            for case in _cases(row, text)
        ]
        verdicts = await asyncio.to_thread(self._checker.verdicts, [case for _, case in cases])
        problems: list[str | None] = [None] * len(rows)
        for (place, _), verdict in zip(cases, verdicts, strict=True):
            problems[place] = problems[place] or _PROBLEMS[verdict]
        return problems


def _cases(row: ReflectedRow, response: str) -> list[Case]:
    """What must give the answer that stands: the response, and what its source reads from it.

    A response may end on a number other than the one where the source keeps its answers.
    """
    answer = row.current.answer
    if answer is None:
        return []
    cases = [Case(row.check, answer, response)]
    if row.answer_pattern is not None:
        found = extract_answer(response, row.answer_pattern, by_line=True)
        if found is not None and found != answer.strip():
            boxed = found if last_boxed(found) is not None else rf"\boxed{{{found}}}"
            cases.append(Case(row.check, answer, boxed))
    return cases


_PROBLEMS = {
    "correct": None,
    "wrong": "answer_missing",
    "unreadable": "answer_missing",
    "truncated": "answer_missing",
    "unverified": "answer_unverified",
}


def unseen_texts(rows: pa.Table) -> Iterator[tuple[str, str]]:
    """Pairs of a set's name and a text of it: questions, and answers long enough to be known.

    Args:
        rows: of targets and evaluation sets, with the columns source and messages.
    """
    for name, messages in zip(rows["source"].to_pylist(), messages_of(rows), strict=True):
        for turn in messages or []:
            telling = turn["role"] == "assistant" and are_telling(words(turn["content"]))
            if turn["role"] == "user" or telling:
                yield name, turn["content"]


@lru_cache(maxsize=2)
def unseen_index(url: str, digest: str, ngram: int, short: int) -> OverlapIndex:
    """The index of ingest's folder of unseen rows, kept between shards.

    Args:
        url: of the folder.
        digest: of its content, so that a folder which was written anew is read anew.
        ngram: words in a run that two texts may not share.
        short: fewest words of an unseen text that may not stand inside a longer one.
    """
    store = Store(url)
    pairs = (
        pair
        for name in store.names()
        if name.startswith("part-")
        for pair in unseen_texts(store.read_table(name, ["source", "messages"]))
    )
    return OverlapIndex(pairs, n=ngram, short=short)


def folder_digest(store: Store) -> str:
    """What identifies the content of ingest's folder of unseen rows."""
    return ":".join(store.sha256(name) for name in store.names() if name.startswith("part-"))
