"""Methods of selection, each against the plain way of doing it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded import Tables

from stages.errors import ConfigError, StageError
from stages.rows import row_id
from stages.selection.activation_coverage import activation_coverage
from stages.selection.coverage import ActiveSets, greedy_coverage, unit_interval
from stages.selection.methods import active_sets, target_scores
from stages.selection.ranking import best_rows
from stages.selection.round_robin import round_robin
from stages.selection.settings import SelectionSettings
from stages.selection.stage import SelectionStage
from stages.selection.strata import length_strata, stratum_quotas

FEATURE_SETS = st.lists(st.sets(st.integers(0, 12), max_size=6), min_size=1, max_size=14)


def sets_of(rows: list[set[int]]) -> ActiveSets:
    return active_sets(
        pa.chunked_array([pa.array([sorted(r) for r in rows], pa.list_(pa.int32()))])
    )


def plain_greedy(rows: list[set[int]], count: int, score: Any, diversity: float) -> list[int]:
    """Every gain computed anew for every pick; the features covered so far dropped when useless."""
    largest = max(1, *map(len, rows))
    left, covered, picks = list(range(len(rows))), set(), []
    while left and len(picks) < count:
        if not any(rows[i] - covered for i in left):
            covered = set()
        gains = [
            (1.0 - diversity) * score[i] + diversity / largest * len(rows[i] - covered)
            for i in left
        ]
        best = left[int(np.argmax(gains))]
        picks.append(best)
        left.remove(best)
        covered |= rows[best]
    return picks


@settings(max_examples=300)
@given(FEATURE_SETS, st.integers(0, 16), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.data())
def test_greedy_picks_what_the_plain_greedy_picks(
    rows: list[set[int]], count: int, diversity: float, data: Any
) -> None:
    # Few distinct scores, so that ties happen.
    levels = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    score = np.array(data.draw(st.lists(levels, min_size=len(rows), max_size=len(rows))))
    order = np.arange(len(rows), dtype=np.int64)
    found = greedy_coverage(sets_of(rows), order, count, score, diversity)
    assert found.tolist() == plain_greedy(rows, count, score, diversity)


@settings(max_examples=100)
@given(FEATURE_SETS, st.permutations(range(14)))
def test_greedy_of_some_rows_breaks_ties_in_the_order_given(
    rows: list[set[int]], shuffled: list[int]
) -> None:
    order = [i for i in shuffled if i < len(rows)][: max(1, len(rows) // 2)]
    found = greedy_coverage(sets_of(rows), np.array(order, dtype=np.int64), len(order))
    plain = plain_greedy([rows[i] for i in order], len(order), np.zeros(len(order)), 1.0)
    assert found.tolist() == [order[i] for i in plain]


@settings(max_examples=60)
@given(st.lists(st.sets(st.integers(0, 9), max_size=5), min_size=4, max_size=8))
def test_greedy_before_a_reset_covers_its_share_of_the_best(rows: list[set[int]]) -> None:
    """|C| >= (1 - 1/e) max over sets of as many rows (Nemhauser et al. 1978)."""
    picks = greedy_coverage(sets_of(rows), np.arange(len(rows), dtype=np.int64), 3)
    covered = len(set().union(*(rows[i] for i in picks)))
    best = max(len(set().union(*three)) for three in itertools.combinations(rows, 3))
    assert covered >= (1 - 1 / np.e) * best


def plain_round_robin(scores: np.ndarray, count: int) -> list[int]:
    used: list[int] = []
    for target in itertools.cycle(range(len(scores))):
        if len(used) == count:
            return used
        free = [i for i in range(scores.shape[1]) if i not in used]
        used.append(max(free, key=lambda i: (scores[target, i], -i)))
    return used


@settings(max_examples=150)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 30), st.integers(0, 10_000))
def test_round_robin_equals_the_plain_one(targets: int, n: int, count: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 5, (targets, n)).astype(np.float32)
    count = min(count, n)
    assert round_robin(scores, count).tolist() == plain_round_robin(scores, count)


def test_round_robin_reads_on_when_others_took_a_targets_best() -> None:
    # All targets rank alike, so that each needs more of its ranking than its own turns.
    scores = np.tile(np.arange(700, dtype=np.float32)[::-1], (5, 1))
    assert round_robin(scores, 600).tolist() == list(range(600))


@settings(max_examples=150)
@given(
    st.lists(st.one_of(st.sampled_from([0.0, 1.0, -2.5, float("nan")]), st.floats(-3, 3))),
    st.integers(0, 12),
    st.integers(0, 1000),
)
def test_best_rows_are_those_of_a_sort(values: list[float], count: int, seed: int) -> None:
    ids = [f"{i:08x}" for i in np.random.default_rng(seed).permutation(len(values))]
    keys = [(v != v, 0.0 if v != v else -v, i) for v, i in zip(values, ids, strict=True)]
    ranked = sorted(range(len(values)), key=keys.__getitem__)
    names = pa.chunked_array([pa.array(ids, pa.string())])
    found = best_rows(np.array(values, float), names, count)
    assert found.tolist() == sorted(ranked[:count])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(2, 6), st.data())
def test_strata_are_quantiles_and_quotas_their_shares(
    tokens: list[int], bins: int, data: Any
) -> None:
    strata = length_strata(np.array(tokens, np.int64), bins)
    flat = [tokens[i] for part in strata for i in part]
    assert flat == sorted(tokens)
    assert max(map(len, strata)) - min(map(len, strata)) <= 1
    count = data.draw(st.integers(0, len(tokens)))
    quotas = stratum_quotas(strata, count)
    assert sum(quotas) == count
    for part, quota in zip(strata, quotas, strict=True):
        assert abs(quota - count * len(part) / len(tokens)) < 1
        assert quota <= len(part)


def test_activation_coverage_is_the_share_of_target_features() -> None:
    """FAC = |F(S) n F(T)| / |F(T)| (arXiv 2602.10388, section 3)."""
    assert activation_coverage({1, 2, 3}, {2, 3, 4, 5}) == 0.5
    assert activation_coverage({1}, set()) is None


def test_unit_interval_keeps_order_and_gives_equal_scores_zero() -> None:
    np.testing.assert_allclose(unit_interval(np.array([3.0, -1.0, 1.0])), [1, 0, 0.5])
    assert unit_interval(np.array([2.0, 2.0])).tolist() == [0, 0]


# The stage.

PRESENT = frozenset(
    {"id", "source", "effective_messages", "score", "near_by_target", "active_features", "tokens"}
)


def rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    draws = np.random.default_rng(seed)
    made = []
    for i in range(n):
        messages = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
        made.append(
            {
                "id": row_id(messages, None),
                "source": "ab"[i % 2],
                "effective_messages": messages,
                "score": float(draws.integers(0, 6)),
                "near_by_target": draws.integers(0, 9, 4).astype(np.float32).tolist(),
                "active_features": sorted(set(draws.integers(0, 60, i % 9).tolist())),
                "tokens": int(draws.integers(1, 50)),
            }
        )
    return made


TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("effective_messages", pa.list_(TURN)),
        ("score", pa.float32()),
        ("near_by_target", pa.list_(pa.float32())),
        ("active_features", pa.list_(pa.int32())),
        ("tokens", pa.int32()),
    ]
)


def decided(data: list[dict[str, Any]], shard: int = 7, **chosen: Any) -> Any:
    stage = SelectionStage(SelectionSettings(**chosen), frozenset(), PRESENT)
    targets = pa.table(
        {
            "active_features": pa.array([[1, 2, 90], [3], None], pa.list_(pa.int32())),
            "task": ["x", "y", "y"],
        }
    )
    table = pa.Table.from_pylist(data, schema=SCHEMA)
    outcome = stage.decide(Tables(table, shard), Tables(targets, 9), {})
    return outcome.tables["decisions.parquet"].to_pylist(), outcome.report


def kept(decisions: list[dict[str, Any]]) -> set[str]:
    return {row["id"] for row in decisions if row["keep"]}


def by_id(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(data, key=lambda row: row["id"])


def test_coverage_and_mixed_keep_the_picks_of_the_plain_greedy() -> None:
    data = rows(40)
    ordered = by_id(data)
    features = [set(row["active_features"]) for row in ordered]
    decisions, _ = decided(data, method="coverage", rows=12)
    plain = plain_greedy(features, 12, np.zeros(40), 1.0)
    assert kept(decisions) == {ordered[i]["id"] for i in plain}

    decisions, _ = decided(data, method="mixed", score="score", diversity=0.3, share=0.25)
    scores = np.array([row["score"] for row in ordered])
    plain = plain_greedy(features, 10, (scores - scores.min()) / np.ptp(scores), 0.3)
    assert kept(decisions) == {ordered[i]["id"] for i in plain}


def test_lambda_zero_is_top_and_lambda_one_is_coverage() -> None:
    data = rows(40)
    top, _ = decided(data, score="score", rows=9)
    coverage, _ = decided(data, method="coverage", rows=9)
    for diversity, same in ((0, top), (1, coverage)):
        mixed, _ = decided(data, method="mixed", score="score", diversity=diversity, rows=9)
        assert kept(mixed) == kept(same)


def test_round_robin_keeps_the_best_of_each_target() -> None:
    data = rows(30)
    ordered = by_id(data)
    decisions, _ = decided(data, method="round_robin", score="near_by_target", rows=11)
    scores = np.array([row["near_by_target"] for row in ordered], np.float32).T
    assert kept(decisions) == {ordered[i]["id"] for i in plain_round_robin(scores, 11)}
    assert all(row["score"] is None for row in decisions)


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "coverage", "rows": 12},
        {"method": "mixed", "score": "score", "share": 0.4},
        {"method": "round_robin", "score": "near_by_target", "rows": 7, "per_source": True},
        {"score": "score", "share": 0.3, "length_bins": 4},
        {"method": "coverage", "share": 0.3, "length_bins": 3, "per_source": True},
    ],
)
def test_decisions_do_not_depend_on_shards_or_on_the_order_of_rows(chosen: dict[str, Any]) -> None:
    data = rows(41)
    decisions, report = decided(data, 3, **chosen)
    assert decided(data, 100, **chosen) == (decisions, report)
    turned, _ = decided(data[::-1], 8, **chosen)
    assert turned == decisions[::-1]


def test_length_bins_keep_each_length_in_proportion() -> None:
    data = rows(40)
    for row in data:
        # Alone, the score would keep the longest rows.
        row["score"] = float(row["tokens"])
    decisions, _ = decided(data, score="score", share=0.25, length_bins=4)
    order = sorted(by_id(data), key=lambda row: row["tokens"])
    found = kept(decisions)
    for part in range(4):
        assert sum(row["id"] in found for row in order[10 * part : 10 * part + 10]) in (2, 3)
    assert len(found) == 10


def test_rows_without_features_are_dropped_by_name_or_kept_last() -> None:
    data = rows(20)
    for row in data[:4]:
        row["active_features"] = None
    decisions, _ = decided(data, method="coverage", rows=18)
    assert [row["reason"] for row in decisions[:4]] == ["missing_score: active_features"] * 4
    assert len(kept(decisions)) == 16
    decisions, _ = decided(data, method="coverage", rows=18, missing="keep_last")
    lowest = sorted(row["id"] for row in data[:4])[:2]
    assert {row["id"] for row in decisions if row["reason"] == "kept: no score"} == set(lowest)
    assert len(kept(decisions)) == 18


def test_report_tells_the_coverage_of_the_targets_features() -> None:
    data = rows(30)
    decisions, report = decided(data, method="coverage", rows=3)
    found = kept(decisions)
    chosen = set().union(*(r["active_features"] for r in data if r["id"] in found))
    every = set().union(*(row["active_features"] for row in data))
    told = report["activation_coverage"]
    assert told["target_features"] == 4
    assert told["kept_rows"] == len(chosen & {1, 2, 90, 3}) / 4
    assert told["all_rows"] == len(every & {1, 2, 90, 3}) / 4 < 1
    assert told["by_task"]["y"]["kept_rows"] == len(chosen & {3})


def test_lists_of_several_lengths_are_refused() -> None:
    ragged = pa.chunked_array([pa.array([[1.0, 2.0], [3.0]], pa.list_(pa.float32()))])
    with pytest.raises(StageError, match=r"scores for \[1, 2\] target rows"):
        target_scores(ragged)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"method": "round_robin", "score": "score", "rows": 1}, "ends in _by_target"),
        ({"score": "near_by_target", "rows": 1}, "method: round_robin"),
        ({"method": "round_robin", "score": "far_by_target", "rows": 1}, "no stage of this recipe"),
    ],
)
def test_method_and_column_that_do_not_fit_are_refused(
    chosen: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        decided(rows(3), **chosen)


def test_coverage_without_features_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"features\.active_above"):
        SelectionStage(
            SelectionSettings(method="coverage", rows=1), frozenset(), PRESENT - {"active_features"}
        )


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "coverage"},
        {"method": "coverage", "score": "score", "rows": 1},
        {"method": "mixed", "rows": 1},
        {"method": "round_robin", "rows": 1},
        {"score": "score", "rows": 1, "diversity": 0.5},
        {"method": "coverage", "rows": 1, "order": "lowest"},
        {"length_bins": 3},
    ],
)
def test_settings_that_contradict_are_refused(chosen: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs|need|meaning|belongs|alone"):
        SelectionSettings(**chosen)
