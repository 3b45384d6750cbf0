"""The report's section on reflection: what was rewritten, what wasn't and why, at what cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.emission import plots
from stages.emission.audit import ReflectionAudit, Rewrite
from stages.emission.bars import Bar, Chart, bars_of
from stages.emission.decisions import Decisions
from stages.emission.examples import fate
from stages.emission.gather import Gathered
from stages.emission.sample import IntArray

_PAIRS = {
    "response": "Response length, characters",
    "instruction": "Instruction length, characters",
    "ifd": "IFD",
    "rifd": "r-IFD",
}


@dataclass(frozen=True)
class ReflectionView:
    """What the template shows.

    Attributes:
        audit: counts.
        tokens: of the teacher, by what they were.
        per_rewrite: teacher tokens a rewritten row, None where nothing was rewritten.
        counts: bar charts with their titles.
        scatter: IFD before and after, None where there are no two scores.
        distributions: before and after.
        samples: rewrites by outcome, each with what became of the row.
    """

    audit: ReflectionAudit
    tokens: dict[str, int]
    per_rewrite: float | None
    counts: list[tuple[str, list[Bar]]]
    scatter: Chart | None
    distributions: list[Chart]
    samples: dict[str, list[tuple[Rewrite, str]]]


def reflection_view(
    gathered: Gathered, decisions: Decisions, emitted: IntArray
) -> ReflectionView | None:
    """The section; None where reflection was asked for no row.

    Args:
        gathered: of the run.
        decisions: of selection.
        emitted: distinct row numbers, int64.
    """
    audit = gathered.audit
    if not audit.asked:
        return None
    tokens = {
        "generated" if name == "teacher_tokens" else name.split("_", 1)[1].replace("_", " "): count
        for name, count in sorted(audit.tokens.items())
    }
    spent = sum(tokens.values())
    counts: list[tuple[str, Counter[str]]] = [("Which rewrites stand", audit.outcomes)]
    counts += [(f"Verdict on the {part}", found) for part, found in sorted(audit.results.items())]
    counts.append(("Rows that failed", audit.failures))
    return ReflectionView(
        audit=audit,
        tokens=tokens,
        per_rewrite=spent / audit.rewritten if audit.rewritten else None,
        counts=[(title, bars_of(_ranked(found))) for title, found in counts if found],
        scatter=_scatter(*audit.pairs("ifd")),
        distributions=[
            chart
            for name, title in _PAIRS.items()
            if (chart := _distribution(title, *audit.pairs(name)))
        ],
        samples={
            outcome: [(one, fate(one.row, emitted, decisions)) for one in rows]
            for outcome, rows in audit.sample().items()
        },
    )


def _distribution(
    title: str, before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]
) -> Chart | None:
    if not len(before):
        return None
    low, high = plots.common_range(np.concatenate([before, after]))
    medians = [float(np.median(values)) for values in (before, after)]
    note = f"{len(before):,} rows: median {medians[0]:,.4g} before, {medians[1]:,.4g} after"
    svg = plots.histogram(before, after, low, high, f"{title}: {note}", ("before", "after"))
    return Chart(title, note, svg)


def _scatter(before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]) -> Chart | None:
    if not len(before):
        return None
    raised = float(np.mean(after > before))
    note = f"{len(before):,} rewritten rows; IFD rose in {raised:.0%} of them."
    return Chart("IFD before and after", note, plots.scatter(before, after, note))


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
