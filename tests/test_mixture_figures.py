"""What is drawn of a mixture: curves that bound transport, a map, and the charts of the report."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from stages.emission.certificate import certificate_sentences, method_words
from stages.emission.mixture_view import mixture_charts
from stages.mixture.bundle import optimal_mixture
from stages.mixture.cost import euclidean_cost
from stages.mixture.figures import map_table, weight_curves
from stages.mixture.joint_lp import optimal_mixture_by_lp
from stages.storage import Store


def test_curves_bound_the_least_transport_at_each_weight() -> None:
    """L_k(t) <= min over p with p_k = t, by the joint programme; equal at the optimum."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 4))
    source = np.repeat(np.arange(3), 20)
    x = centres[source] + rng.normal(size=(60, 4))
    y = 0.8 * centres[rng.integers(0, 3, 25)] + rng.normal(size=(25, 4))
    cost, b = euclidean_cost(x, y), np.full(25, 1 / 25)
    lower, upper = np.array([0.0, 0.1, 0.0]), np.array([0.8, 1.0, 1.0])
    best = optimal_mixture(cost, source, b, lower, upper, 1e-6)
    table = weight_curves(best.cuts, ["a", "b", "c"], best.weights, lower, upper)
    reached = {"a": (0.0, 0.8), "b": (0.1, 1.0), "c": (0.0, 0.9)}
    for number, name in enumerate("abc"):
        mine = table.filter(pc.equal(table["source"], name))
        places, bounds = mine["weight"].to_numpy(), mine["bound"].to_numpy()
        assert (places[0], places[-1]) == pytest.approx(reached[name])
        assert np.all(np.diff(bounds, 2) >= -1e-9), "convex"
        assert bounds.min() >= best.lower_bound - 1e-9
        for place, bound in zip(places[::4], bounds[::4], strict=True):
            low, high = lower.copy(), upper.copy()
            low[number] = high[number] = place
            exact = optimal_mixture_by_lp(cost, source, b, low, high).value
            assert bound <= exact * (1 + 1e-9)
            assert bound >= 0.7 * exact, "a bound this loose shows nothing"
    fixed = np.array([0.2, 0.3, 0.5])
    assert weight_curves(best.cuts, ["a", "b", "c"], fixed, fixed, fixed).num_rows == 0


def test_map_shows_the_largest_sources_and_targets_where_they_vary_most() -> None:
    """Two principal directions keep distances of vectors that vary in two dimensions only."""
    rng = np.random.default_rng(1)
    plane = np.linalg.qr(rng.normal(size=(8, 2)))[0].T
    source = np.repeat(np.arange(15), 70)
    flat = rng.normal(size=(15 * 70, 2)) + 5 * rng.normal(size=(15, 2))[source]
    flat_y = rng.normal(size=(30, 2))
    weights = np.arange(15) / np.arange(15).sum()
    names = [f"s{k:02d}" for k in range(15)]
    table = map_table(flat @ plane, source, names, weights, flat_y @ plane, np.full(30, 1 / 30))
    shown = table["source"].to_pylist()
    assert {name: shown.count(name) for name in set(shown)} == {
        None: 30,
        **dict.fromkeys(names[3:], 60),
    }
    placed = np.column_stack([table["x"].to_numpy(), table["y"].to_numpy()])
    rows = np.concatenate([np.flatnonzero(source == k)[:60] for k in range(3, 15)])
    true = np.concatenate([flat[rows], flat_y])
    for some in (placed, true):
        some -= some[0]
    np.testing.assert_allclose(
        np.linalg.norm(placed, axis=1), np.linalg.norm(true, axis=1), atol=1e-8
    )


def test_charts_are_a_curve_for_each_source_and_a_map(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    places = np.linspace(0, 1, 13)
    store.write_table(
        "curves.parquet",
        pa.table(
            {
                "source": ["a"] * 13 + ["b"] * 13,
                "weight": np.concatenate([places, places]),
                "bound": np.concatenate([1 + places**2, 2 - places]),
            }
        ),
    )
    store.write_table(
        "map.parquet",
        pa.table({"source": ["a", "b", "b", None], "x": [0.0, 1, 2, 3], "y": [0.0, 1, 0, 1]}),
    )
    charts = mixture_charts({"weights": {"a": 0.25, "b": 0.75}}, store)
    assert [title for title, _ in charts] == ["a", "b", "Sources and targets"]
    drawn = [ElementTree.fromstring(str(svg)) for _, svg in charts]
    circles = [
        element for element in drawn[-1].iter() if element.tag.rpartition("}")[2] == "circle"
    ]
    # Four points, and a sign for each of a, b and targets in the legend.
    assert len(circles) == 7
    assert mixture_charts(None, store) == []


def test_words_are_of_the_objective_that_chose_the_weights() -> None:
    report = {
        "method": "transport",
        "value_sample": 1.5,
        "lower_bound": 1.0,
        "upper_estimate": 1.2,
        "gap": 0.2,
        "certified": True,
        "tolerance": 0.01,
    }
    plain = " ".join(certificate_sentences(report))
    assert "within 20.00% of the least" in plain
    pulled = report | {"kl": 0.5, "objective_gap": 0.004}
    words = " ".join(certificate_sentences(pulled))
    assert "with the pull to the natural mixture, is 1.5" in words
    assert "with that pull is estimated to be within 0.40% of the least" in words
    assert "a pull of 0.5" in method_words(pulled)
    assert "pull" not in plain + method_words(report)
