"""Why a record is rejected: every code, its meaning, and what a person can do about it.

A reason is a code alone or `code: detail`. Reports count codes; rejects keep the whole reason.
"""

from __future__ import annotations

REASONS: dict[str, str] = {
    "unparsable": (
        "not JSON or CSV, or it holds what JSON has no form for, such as infinity, a date beyond "
        "the year 9999 or two columns of one name; mend or remove the record"
    ),
    "damaged_file": (
        "the rest of the file cannot be read, so that more records may be lost than this one; "
        "fetch the file again"
    ),
    "invalid_unicode": "bytes that are not UTF-8, or a lone surrogate; mend the encoding",
    "wrong_type": "a value has a type that its column cannot have; mend it, or map other columns",
    "unknown_form": "no known form has these columns; name the form or give a column map",
    "ambiguous": "two columns that mean the same differ; name the right one in a column map",
    "missing_turn": "no user turn; check the form or the column map",
    "empty_turn": "a turn is empty or only white space",
    "no_assistant_turn": "there is no response at the end; such records can be targets only",
    "bad_roles": "an unknown role, or turns in an order that no conversation has",
    "bad_label": "`label` is false: the response is marked as bad and must not be trained on",
    "preference_pair": "chosen and rejected responses; set `preference: chosen` to take the chosen",
    "no_task": "a target record without the value of `task_column`",
    "too_long": "more characters than `max_chars`; raise it, or cut the record",
    "duplicate": "the same messages and tools as an earlier row",
    "near_duplicate": "nearly the same words as another row; see `ingest.near_duplicates`",
    "contaminated": "holds text of a target or an evaluation set; see `contamination`",
}

NO_FAULT = ("duplicate", "near_duplicate", "contaminated")
"""Reasons that say nothing against a source: `max_reject_rate` doesn't count them."""

UNANSWERED = ("empty_turn", "no_assistant_turn")
"""Reasons of which the want of a response is one."""


def code_of(reason: str) -> str:
    """The code at the start of a reason."""
    return reason.partition(":")[0]
