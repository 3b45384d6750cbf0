"""`report.html`: one page, without a network, about how the data set came to be."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stages.emission import plots
from stages.emission.bars import Bar, Chart, bars_of
from stages.emission.certificate import certificate_sentences, method_words, range_words
from stages.emission.decisions import Decisions
from stages.emission.examples import LOW_IS_HARD, Ranked, shown_examples
from stages.emission.facts import Facts
from stages.emission.gather import Gathered
from stages.emission.reflection_view import reflection_view
from stages.emission.sample import IntArray

_IFD = "Near 1, the instruction helps the student little in predicting the response; low is easy."
_SOLVED = "The share of the model's own answers that verify; low values are hard."
_DIFFICULTY = {
    "ifd": ("Instruction-following difficulty (IFD)", _IFD),
    "ifd_effective": ("IFD of the text that stands, where rewriting was asked for", _IFD),
    "loss_conditional": (
        "Loss of the response",
        "Nats per token after the prompt; high values are hard, or unusual.",
    ),
    "rifd": (
        "Reversed IFD",
        "Near 1, the response tells the student little about its instruction.",
    ),
    "p_think": (
        "Probability of thinking",
        "How likely the adaptive-thinking model is to think first; high values are hard.",
    ),
    "pass_rate": ("Pass rate", _SOLVED),
    "budgeted_pass_rate": ("Pass rate over pilot and further rollouts", _SOLVED),
    "failed_step_fraction": (
        "Failed steps",
        "The share of reasoning steps in attempts that were given up.",
    ),
}
"""Scores that have a histogram a source: title, and how to read it."""


_SPENT = {
    "response_tokens": ("difficulty", "scored"),
    "prompt_tokens": ("pass_rate", "in prompts"),
    "rollout_tokens": ("pass_rate", "generated"),
    "teacher_tokens": ("reflection", "generated"),
    "teacher_prompt_tokens": ("reflection", "in prompts"),
    "prefix_sampled_tokens": ("prefixes", "generated"),
    "tokens": ("features", "read"),
}
"""Columns of tokens: their stage, and what was done with them."""


@dataclass(frozen=True)
class Chosen:
    """Rows that the page shows, emitted or not: the extremes of a score, and a sample to search."""

    ranked: Ranked
    searched: IntArray

    @property
    def numbers(self) -> IntArray:
        """All of them, distinct and ascending."""
        return np.union1d(self.ranked.numbers, self.searched).astype(np.int64)


@dataclass(frozen=True)
class Explained:
    """Selected rows with the latents that they share with their task, and those latents' rows."""

    rows: Sequence[Mapping[str, Any]] = ()
    latents: Sequence[Mapping[str, Any]] = ()


def report_html(
    facts: Facts,
    gathered: Gathered,
    decisions: Decisions,
    order: IntArray,
    chosen: Chosen,
    rejects: Sequence[Mapping[str, Any]],
    explained: Explained = Explained(),
    mixture_charts: Sequence[tuple[str, Markup]] = (),
) -> bytes:
    """The page. Its times are the manifests', so they differ between runs of one recipe.

    Args:
        facts: of the data set.
        gathered: emitted rows, the rows shown, and what was counted over all rows.
        decisions: of selection.
        order: emitted row numbers, copies included.
        chosen: the rows that are shown.
        rejects: rejected records that are shown.
        explained: what made rows similar to the targets.
        mixture_charts: titles and charts of the mixture.
    """
    emitted = np.unique(order)
    ranked = chosen.ranked
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["n"] = _number
    environment.filters["duration"] = _duration
    environment.filters["percent"] = _percent
    hardest, easiest, searched = (
        shown_examples(gathered, rows, emitted, decisions, ranked.values)
        for rows in (ranked.hardest, ranked.easiest, chosen.searched)
    )
    similar = [name for name in sorted(gathered.scores) if name.startswith("similarity")]
    script = _resource("report.js")
    page = environment.from_string(_resource("report.html.j2")).render(
        facts=facts,
        style=Markup(_resource("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        unit=facts.settings.unit,
        flow=_flow(facts),
        anchors=[source for source in facts.sources if source.role == "anchor"],
        repeated=_repeated(facts),
        contaminated=_contaminated(facts),
        licenses=_licenses(facts),
        mixture_bars=_mixture_bars(facts),
        mixture_charts=mixture_charts,
        mixture_words=method_words(facts.mixture) if facts.mixture else "",
        range_words=range_words(facts.mixture) if facts.mixture else "",
        certificate=certificate_sentences(facts.mixture) if facts.mixture else [],
        difficulty=[
            (title, words, charts)
            for name, (title, words) in _DIFFICULTY.items()
            if name in gathered.scores
            and (charts := _charts(gathered, decisions, emitted, facts, name))
        ],
        similarity=[
            (name, charts)
            for name in similar
            if (charts := _charts(gathered, decisions, emitted, facts, name))
        ],
        explained=explained,
        coverage=_activation_coverage(facts),
        reflection=reflection_view(gathered, decisions, emitted),
        outcomes=_outcomes(gathered),
        hardest=hardest,
        easiest=easiest,
        searched=searched,
        rejects=rejects,
        score=ranked.score,
        low_is_hard=ranked.score in LOW_IS_HARD,
        tokens=_tokens(gathered),
        reasons=[
            (title, bars_of(counts))
            for title, counts in (
                ("Rejected at ingest", facts.reasons("rejected")),
                ("Dropped by selection", facts.reasons("dropped")),
            )
            if counts
        ],
    )
    return page.encode()


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _activation_coverage(facts: Facts) -> Mapping[str, Any] | None:
    """What selection reported of the targets' features; None where no features were asked for."""
    reports = [stage.report for stage in facts.stages if stage.name == "selection"]
    return reports[0].get("activation_coverage") if reports else None


def _repeated(facts: Facts) -> list[tuple[str, str, int, int]]:
    """A source, the source whose rows stay, and the exact and near duplicates; most first."""
    pairs = [
        (source.name, other, source.duplicate_of.get(other, 0), near.get(other, 0))
        for source in facts.sources
        for near in [source.near_duplicate_of]
        for other in {**source.duplicate_of, **near}
    ]
    return sorted(pairs, key=lambda pair: -(pair[2] + pair[3]))


def _contaminated(facts: Facts) -> list[tuple[str, str, int, int]]:
    """A source, a target or evaluation set, and exact overlaps and runs of words; most first."""
    pairs = [
        (source.name, name, kinds.get("exact", 0), kinds.get("ngram", 0))
        for source in facts.sources
        for name, kinds in source.overlaps.items()
    ]
    return sorted(pairs, key=lambda pair: -(pair[2] + pair[3]))


def _licenses(facts: Facts) -> list[Bar]:
    counted: Counter[str] = Counter()
    for counts in facts.licenses.values():
        counted.update({name or "not stated": lines for name, lines in counts.items()})
    return bars_of(dict(counted.most_common()))


def _tokens(gathered: Gathered) -> dict[str, list[str]]:
    """What each stage's models read and wrote, over all rows, in words."""
    said: dict[str, list[str]] = {}
    for name, count in gathered.spent.items():
        stage, words = _SPENT.get(name) or (
            ("reflection", name.removesuffix("_tokens").replace("_", " "))
            if name.startswith("teacher_")
            else (None, "")
        )
        if stage is not None and gathered.valued[name]:
            said.setdefault(stage, []).append(f"{count:,} {words}")
    return said


def _flow(facts: Facts) -> Markup:
    kept, selected = facts.total("kept"), facts.total("selected")
    distinct = facts.total("distinct")
    rejected = sum(facts.reasons("rejected").values())
    stops = [("ingested", kept), ("selected", selected), ("emitted", distinct)]
    leaving = [("dropped", kept - selected), ("not sampled", selected - distinct)]
    if rejected or facts.total("records"):
        stops.insert(0, ("records read", max(facts.total("records"), kept + rejected)))
        leaving.insert(0, ("rejected", rejected))
    words = ", ".join(f"{rows:,} {title}" for title, rows in stops)
    return plots.flow(stops, leaving, words)


def _charts(
    gathered: Gathered, decisions: Decisions, emitted: IntArray, facts: Facts, name: str
) -> list[Chart]:
    values = gathered.scores[name]
    chosen = np.zeros(len(values), dtype=bool)
    chosen[emitted] = True
    known = np.isfinite(values)
    if not known.any():
        return []
    low, high = plots.common_range(values)
    charts = []
    for source in facts.offered:
        mine = decisions.of(source.name) & known
        if not mine.any():
            continue
        taken = values[mine & chosen]
        median = float(np.median(values[mine]))
        note = f"{int(mine.sum()):,} rows, median {median:.3g}"
        if len(taken):
            note += f"; {len(taken):,} emitted, median {float(np.median(taken)):.3g}"
        svg = plots.histogram(values[mine], taken, low, high, f"{name} of {source.name}: {note}")
        charts.append(Chart(source.name, note, svg))
    return charts


def _outcomes(gathered: Gathered) -> list[tuple[str, list[Bar]]]:
    """Outcomes and statuses by column; a column that says `ok` alone tells nothing."""
    shown = []
    for name in sorted(gathered.counts, key=lambda name: (not name.endswith("outcome"), name)):
        counts = gathered.counts[name]
        if set(counts) - {"ok"} and not name.startswith("reflection_"):
            ranked = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
            shown.append((name, bars_of(ranked)))
    return shown


def _mixture_bars(facts: Facts) -> list[Bar]:
    mixture: Mapping[str, Any] = facts.mixture or {}
    ranges, caps = mixture.get("ranges") or {}, mixture.get("caps") or {}
    sources = sorted(facts.offered, key=lambda source: (-source.weight, source.name))
    highs = [(ranges.get(source.name) or (0, 0))[1] for source in sources]
    top = max([source.weight for source in sources] + highs + [1e-9])

    def place(value: float | None) -> float | None:
        return None if value is None or value > top * 1.0001 else min(100.0, 100 * value / top)

    bars = []
    for source in sources:
        low, high = ranges.get(source.name) or (None, None)
        cap = caps.get(source.name)
        note = f"{source.weight:.1%}" + (f" (cap {cap:.0%})" if cap is not None else "")
        width = 100 * source.weight / top
        bars.append(Bar(source.name, width, note, place(low), place(high), place(cap)))
    return bars


def _number(value: npt.ArrayLike | None) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}"


def _percent(share: float | None) -> str:
    return "\u2013" if share is None else f"{share:.1%}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "\u2013"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
