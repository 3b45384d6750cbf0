"""Rows that hold text of targets or evaluation sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stages.dictionary.settings import Part
from stages.ingest.parse import Reject, Row
from stages.ingest.settings import ContaminationSettings
from stages.overlap import Overlap, OverlapIndex, are_telling
from stages.rows import Message, response
from stages.words import words


def unseen_texts(messages: Sequence[Message], part: Part) -> list[str]:
    """The turns of a target's or evaluation set's row that training must not see.

    Of the prompt the user's turns: other ones are often the same for every row of a set. A response
    only where it can be told from any other.
    """
    asked = [turn["content"] for turn in messages if turn["role"] == "user"]
    said = response(messages)
    answered = [said] if said is not None and are_telling(words(said)) else []
    return {"prompt": asked, "response": answered, "both": [*asked, *answered]}[part]


def unseen_index(
    texts: Iterable[tuple[str, str]], settings: ContaminationSettings
) -> OverlapIndex | None:
    """Texts by the name of their target or set, to match rows with; None where there are none."""
    pairs = list(texts)
    if not pairs:
        return None
    return OverlapIndex(pairs, n=settings.ngram, short=settings.short)


def first_overlaps(records: Sequence[Row | Reject], index: OverlapIndex) -> list[Overlap | None]:
    """For every record the overlap of the first of its turns that has one.

    A reject has turns only where it lacks nothing but a response: a question without an answer
    is one that training must not see all the same.
    """
    found: list[Overlap | None] = [None] * len(records)
    texts: list[str] = []
    places: list[int] = []
    for place, record in enumerate(records):
        for turn in record.messages if isinstance(record, Row) else record.asked:
            said = [text for text in (turn["content"], turn.get("reasoning")) if text]
            texts += said
            places += [place] * len(said)
    for place, overlap in zip(places, index.matches(texts), strict=True):
        found[place] = found[place] or overlap
    return found
