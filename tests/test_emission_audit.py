"""What the report says of reflection: counts against plain counting, diffs that lose nothing."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from emission_runs import NASTY, Run, assistant, two_sources, user
from hypothesis import given
from hypothesis import strategies as st

from stages.emission.audit import SAMPLED, ReflectionAudit
from stages.emission.diffs import word_diff
from stages.emission.gather import audited_columns
from stages.rows import LABEL

WORDS = st.text(st.sampled_from("ab \n\t,.") | st.characters(codec="utf-8"), max_size=60)


@given(WORDS, WORDS)
def test_runs_make_up_both_texts(before: str, after: str) -> None:
    pieces = word_diff(before, after)
    assert "".join(p.text for p in pieces if p.kind != "insert") == before
    assert "".join(p.text for p in pieces if p.kind != "delete") == after
    kinds = [p.kind for p in pieces]
    assert all(p.text for p in pieces)
    assert ("insert", "insert") not in list(itertools.pairwise(kinds))


@given(WORDS)
def test_equal_texts_have_no_change(text: str) -> None:
    assert {p.kind for p in word_diff(text, text)} <= {"equal"}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("a b c", "a x c", [("equal", "a "), ("delete", "b"), ("insert", "x"), ("equal", " c")]),
        # White space between two changes goes with them.
        ("one two 3", "1 2 3", [("delete", "one two"), ("insert", "1 2"), ("equal", " 3")]),
        ("今日は雨", "今日は雪", [("equal", "今日は"), ("delete", "雨"), ("insert", "雪")]),
        ("", "new", [("insert", "new")]),
        (
            "if x:\n  y",
            "if x:\n    y",
            [("equal", "if x:"), ("delete", "\n  "), ("insert", "\n    "), ("equal", "y")],
        ),
    ],
)
def test_runs_of_words(before: str, after: str, expected: list[tuple[str, str]]) -> None:
    merged: list[tuple[str, str]] = []
    for kind, text in word_diff(before, after):
        if merged and merged[-1][0] == kind:
            merged[-1] = (kind, merged[-1][1] + text)
        else:
            merged.append((kind, text))
    assert merged == expected


OUTCOMES = ("both", "instruction", "response", "none", "failed")
RESULTS = {"both": "accepted", "instruction": "tie", "response": "accepted", "none": "truncated"}


def reflected(rows: int = 130) -> Run:
    """A run whose rows have every outcome in turn; every seventh wasn't asked for."""
    run = two_sources()
    run.column("reflection_response_result", LABEL, [None])
    run.column("teacher_tokens", pa.int32(), [None])
    run.column("teacher_prompt_tokens", pa.int32(), [None])
    for i, row in enumerate(run.rows):
        question, answer = (turn["content"] for turn in row["messages"])
        outcome = OUTCOMES[i % 5]
        row["messages_reflected"] = None
        row["reflection_outcome"] = outcome
        row["reflection_status"] = "ok" if outcome != "failed" else f"failed: too_long: {i} tokens"
        row["reflection_response_result"] = RESULTS.get(outcome)
        row["teacher_tokens"], row["teacher_prompt_tokens"] = 10 + i, 1
        row["ifd_effective"] = row["ifd_before"]
        if outcome in ("both", "instruction", "response"):
            asked = question if outcome == "response" else f"better {question}"
            said = answer if outcome == "instruction" else f"{answer} and {NASTY}"
            row["messages_reflected"] = [user(asked), assistant(said)]
            row["ifd_effective"] = row["ifd_before"] + 0.05
        if i % 7 == 6:
            row.update(
                messages_reflected=None, reflection_status="not_requested", reflection_outcome=None,
                reflection_response_result=None, teacher_tokens=None, teacher_prompt_tokens=None,
                ifd_before=None, ifd_effective=None,
            )  # fmt: skip
    return run


@pytest.mark.parametrize("shards", [1, 4, 9])
def test_audit_counts_what_plain_counting_counts(shards: int) -> None:
    run, audit, start = reflected(), ReflectionAudit(5), 0
    for table in run.table(shards).iter(run.present):
        audit.see(table, start)
        start += table.num_rows
    asked = [row for row in run.rows if row["reflection_status"] != "not_requested"]
    changed = [row for row in asked if row["messages_reflected"]]
    assert audit.asked == len(asked)
    assert audit.rewritten == len(changed)
    assert audit.outcomes == Counter(row["reflection_outcome"] for row in asked)
    assert audit.failures == {"too_long": audit.outcomes["failed"]}
    results = Counter(row["reflection_response_result"] for row in asked)
    del results[None]
    assert audit.results == {"response": results}
    for name in ("teacher_tokens", "teacher_prompt_tokens"):
        assert audit.tokens[name] == sum(row[name] for row in asked)
    for name, turn in (("instruction", 0), ("response", 1)):
        pairs = [
            [len(row[text][turn]["content"]) for text in ("messages", "messages_reflected")]
            for row in changed
            if row["messages"][turn] != row["messages_reflected"][turn]
        ]
        assert np.array_equal(np.stack(audit.pairs(name)).T, np.array(pairs, np.float32))
    before, after = audit.pairs("ifd")
    assert before == pytest.approx([row["ifd_before"] for row in changed])
    assert after - before == pytest.approx(0.05 + 0 * before, abs=1e-6)


def test_sample_is_ten_of_each_outcome_whatever_the_shards_and_order() -> None:
    def sample(run: Run, shards: int) -> dict[str, set[str]]:
        audit, start = ReflectionAudit(5), 0
        for table in run.table(shards).iter(run.present):
            audit.see(table, start)
            start += table.num_rows
        for rows in audit.sample().values():
            for one in rows:
                row = run.rows[one.row]
                assert row["id"] == one.id
                for (role, pieces), turn in zip(
                    one.turns,
                    [i for i in (0, 1) if row["messages"][i] != row["messages_reflected"][i]],
                    strict=True,
                ):
                    assert role == row["messages"][turn]["role"]
                    old = "".join(p.text for p in pieces if p.kind != "insert")
                    new = "".join(p.text for p in pieces if p.kind != "delete")
                    assert old == row["messages"][turn]["content"]
                    assert new == row["messages_reflected"][turn]["content"]
        return {outcome: {one.id for one in rows} for outcome, rows in audit.sample().items()}

    run = reflected()
    first = sample(run, 1)
    assert {outcome: len(ids) for outcome, ids in first.items()} == {
        "both": SAMPLED, "instruction": SAMPLED, "response": SAMPLED
    }  # fmt: skip
    assert sample(run, 8) == first
    run.rows.reverse()
    assert sample(run, 3) == first


@pytest.mark.parametrize("shards", [1, 4])
def test_verdicts_of_every_exchange_are_counted(shards: int) -> None:
    """A row's own columns have those of its last one only."""
    run, rng = reflected(), np.random.default_rng(3)
    verdicts = ["accepted", "tie", "truncated", None]
    inner = pa.struct([("outcome", pa.string()), ("response_result", pa.string())])
    run.column("reflection_exchanges", pa.list_(inner), [None])
    counted: Counter[str] = Counter()
    for row in run.rows:
        if row["reflection_status"] != "ok":
            continue
        found = [verdicts[i] for i in rng.integers(0, 4, rng.integers(1, 4))]
        row["reflection_exchanges"] = [{"response_result": one} for one in found]
        row["reflection_response_result"] = found[-1]
        counted.update(one for one in found if one)
    audit, start = ReflectionAudit(5), 0
    names = [*audited_columns(run.present), "messages_reflected", "messages", "id", "source"]
    for table in run.table(shards).iter(sorted({*names, "ifd_before", "ifd_effective"})):
        audit.see(table, start)
        start += table.num_rows
    assert audit.results == {"response": counted}


class Section(HTMLParser):
    """Text of inserted and deleted runs, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.runs: dict[str, list[str]] = {"ins": [], "del": []}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside and self.inside[-1] in self.runs:
            self.runs[self.inside[-1]].append(data)


def test_report_shows_the_audit_escaped(tmp_path: Any) -> None:
    run = reflected()
    html = run.emit(str(tmp_path / "run"), budget_rows=40).files["report.html"].decode()
    page = Section()
    page.feed(html[html.index("<h2>Reflection") : html.index("<h2>Similarity")])
    asked = [row for row in run.rows if row["reflection_status"] != "not_requested"]
    generated = sum(row["teacher_tokens"] for row in asked)
    for words in (f"{len(asked)}", f"{generated:,}", "truncated", "too_long", "10 of"):
        assert words in page.text
    assert sum(NASTY in run_ for run_ in page.runs["ins"]) == 2 * SAMPLED
    assert "better " in page.runs["ins"]
    assert len(re.findall("<figure>", html)) > 6
    kinds = Counter(re.findall(r'class="tag (selected|dropped)"', html))
    assert kinds["dropped"] > 0


def test_run_without_reflection_has_no_section(tmp_path: Any) -> None:
    run = two_sources()
    for row in run.rows:
        row.update(messages_reflected=None, reflection_status="not_requested")
    html = run.emit(str(tmp_path / "run"), budget_rows=40).files["report.html"].decode()
    assert "<h2>Reflection" not in html
