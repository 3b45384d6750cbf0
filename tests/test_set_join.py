"""The join of similar sets: against all pairs, and without a look at all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from stages.ingest.set_join import pairs_to_verify


def matrix_of(sets: list[set[int]]) -> csr_array:
    columns = [member for one in sets for member in sorted(one)]
    ends = np.cumsum([0, *map(len, sets)])
    shape = (len(sets), max(columns, default=0) + 1)
    return csr_array((np.ones(len(columns), np.int32), columns, ends), shape=shape)


def pairs_found(sets: list[set[int]], threshold: float, clusters: list[int]) -> list[set[int]]:
    found = pairs_to_verify(matrix_of(sets), threshold, np.array(clusters, np.int64))
    return [{a, b} for x, y in found for a, b in zip(x.tolist(), y.tolist(), strict=True)]


small = st.sets(st.integers(0, 11), min_size=1)


@pytest.mark.parametrize("at_once", [1, 1_000_000])
@settings(max_examples=300)
@given(
    st.lists(st.tuples(small, st.integers(0, 3)), max_size=14),
    st.sampled_from([0.1, 1 / 3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
)
def test_every_similar_pair_of_different_clusters_is_found_once(
    at_once: int, given_sets: list[tuple[set[int], int]], threshold: float
) -> None:
    sets, clusters = [one for one, _ in given_sets], [number for _, number in given_sets]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.ingest.set_join._MEETINGS_AT_ONCE", at_once)
        found = pairs_found(sets, threshold, clusters)
    assert all(found.count(pair) == 1 for pair in found)
    for a, one in enumerate(sets):
        for b in range(a):
            if clusters[a] == clusters[b]:
                assert {a, b} not in found
            elif len(one & sets[b]) / len(one | sets[b]) >= threshold:
                assert {a, b} in found


def test_sets_of_one_template_make_no_pair_below_the_threshold() -> None:
    def filled(number: int, own: int) -> set[int]:
        return {*range(80), *range(100 * number, 100 * number + own)}

    apart = list(range(50))
    # 80 members in common of 80 + 2 * 21 together: 0.66; of 80 + 2 * 10: 0.8.
    assert pairs_found([filled(number, 21) for number in range(1, 51)], 0.8, apart) == []
    near = pairs_found([filled(number, 10) for number in range(1, 51)], 0.8, apart)
    assert len(near) == 50 * 49 / 2
    # Of other sizes too: 80 of 80 + 9 + 12 is 0.79.
    sets = [filled(number, 9 if number == 1 else 12) for number in range(1, 51)]
    assert pairs_found(sets, 0.8, apart) == []
