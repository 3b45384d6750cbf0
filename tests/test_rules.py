"""The rule language of `where:` and filters, against plain Python on every row."""

from __future__ import annotations

import pyarrow as pa
import pytest

from stages.errors import ConfigError
from stages.rules import rule_columns, rule_mask

ROWS = [
    {"x": x, "y": y, "s": s, "b": b}
    for x in (None, -1.5, 0.0, 2.0)
    for y in (None, 1, 3)
    for s in (None, "a", "b")
    for b in (None, True, False)
]
TABLE = pa.Table.from_pylist(ROWS).set_column(
    2, "s", pa.array([row["s"] for row in ROWS]).dictionary_encode()
)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("x < 1", lambda r: r["x"] is not None and r["x"] < 1),
        ("0 <= x <= 2", lambda r: r["x"] is not None and 0 <= r["x"] <= 2),
        ("x == -1.5 or y > 1", lambda r: r["x"] == -1.5 or (r["y"] or 0) > 1),
        ("not x < 1", lambda r: not (r["x"] is not None and r["x"] < 1)),
        ("s == 'a' and b", lambda r: r["s"] == "a" and r["b"] is True),
        ("s in ['a', 'c']", lambda r: r["s"] in ("a", "c")),
        ("s not in ['a']", lambda r: r["s"] not in ("a",)),
        ("x is None", lambda r: r["x"] is None),
        ("x is not None and y is None", lambda r: r["x"] is not None and r["y"] is None),
        ("x < y", lambda r: r["x"] is not None and r["y"] is not None and r["x"] < r["y"]),
    ],
)
def test_rule_mask_agrees_with_python(rule: str, expected: object) -> None:
    assert callable(expected)
    assert rule_mask(rule, TABLE).to_pylist() == [bool(expected(row)) for row in ROWS]


def test_rule_columns_are_those_it_names() -> None:
    assert rule_columns("x < 1 and s in ['b'] or not y == 2") == {"x", "y", "s"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("x <", "can't be read"),
        ("__import__('os')", "not part of the language"),
        ("x + 1 > 2", "not part of the language"),
        ("[i for i in x]", "not part of the language"),
        ("z > 1", "no column 'z'"),
        ("s > 1", "rule"),
        ("x", "isn't true or false"),
    ],
)
def test_wrong_rules_are_refused(rule: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule_mask(rule, TABLE)
