"""Samples as records: rows of the new source, rejects with their reasons, and the counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.errors import StageError
from stages.rows import canonical_json
from stages.synthesis.sample import REASONS, Sample, Solution


def row_record(sample: Sample, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as a record in the `messages` form.

    Args:
        sample: with its solution.
        provenance: what all rows share; kept under `synthesis` with what belongs to this row.
    """
    solution = _solved(sample)
    reply = {"role": "assistant", "content": solution.text}
    if solution.reasoning:
        reply["reasoning"] = solution.reasoning
    own: dict[str, Any] = {"sample": sample.index}
    if sample.tally is not None:
        own["student_decided"] = sample.tally.decided
        own["student_agreed"] = sample.tally.correct
    return {
        "messages": [{"role": "user", "content": sample.problem}, reply],
        "answer": solution.answer,
        "synthesis": {**provenance, **own},
    }


def reject_record(sample: Sample) -> dict[str, Any]:
    """A sample that was left out: why, and its texts as far as they came."""
    reason, detail = sample.reject or ("", "")
    solution = sample.solution
    return {
        "sample": sample.index,
        "reason": reason,
        "detail": detail,
        "problem": sample.problem,
        "solution": solution.text if solution else None,
        "answer": solution.answer if solution else None,
    }


def reason_counts(samples: Sequence[Sample]) -> dict[str, int]:
    """How many samples each filter left out, in the filters' order, none left unsaid.

    Raises:
        StageError: a sample was left out for a reason that isn't in `REASONS`.
    """
    counts = Counter(sample.reject.reason for sample in samples if sample.reject)
    unknown = sorted(set(counts) - set(REASONS))
    if unknown:
        raise StageError(f"samples were left out as {unknown[0]!r}; this is a bug in tamis")
    return {reason: counts[reason] for reason in REASONS}


def json_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """One JSON object a line."""
    return "".join(canonical_json(record) + "\n" for record in records).encode()


def _solved(sample: Sample) -> Solution:
    if sample.solution is None:
        raise StageError(f"sample {sample.index} has no solution; this is a bug in tamis")
    return sample.solution
