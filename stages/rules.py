"""Rules over columns: the language of `where:` and of selection's filters.

A rule is a Python-like comparison over column names, such as
``ifd < 1 and source in ["gsm8k", "dolly"]`` or ``response_tokens >= 8 and not response_truncated``.
A comparison with a null is not true.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.errors import ConfigError

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}


def rule_columns(rule: str) -> set[str]:
    """The columns that a rule names.

    Raises:
        ConfigError: the rule isn't one.
    """
    return {node.id for node in ast.walk(_parsed(rule)) if isinstance(node, ast.Name)}


def rule_mask(rule: str, table: pa.Table) -> pa.BooleanArray:
    """Which rows meet a rule; null comparisons count as not met.

    Raises:
        ConfigError: the rule isn't one, names an absent column, or compares unlike types.
    """
    try:
        mask = _mask(_parsed(rule).body, table, rule)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise ConfigError(f"rule {rule!r}: {error}") from error
    if isinstance(mask, pa.ChunkedArray):
        mask = mask.combine_chunks()
    if not pa.types.is_boolean(mask.type):
        raise ConfigError(f"rule {rule!r} isn't true or false")
    return pc.fill_null(mask, False)


def _parsed(rule: str) -> ast.Expression:
    try:
        tree = ast.parse(rule, mode="eval")
    except SyntaxError as error:
        raise ConfigError(f"rule {rule!r} can't be read: {error.msg}") from error
    allowed = (
        ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare,
        ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple, ast.In, ast.NotIn, ast.Is, ast.IsNot,
        *_COMPARISONS,
    )  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            raise ConfigError(
                f"rule {rule!r}: {ast.unparse(node) if isinstance(node, ast.expr) else node} is "
                "not part of the language (columns, numbers, texts, < <= > >= == != in, "
                "is None, and, or, not)"
            )
    return tree


def _mask(node: ast.expr, table: pa.Table, rule: str) -> Any:
    if isinstance(node, ast.BoolOp):
        masks = [pc.fill_null(_mask(value, table, rule), False) for value in node.values]
        join = pc.and_ if isinstance(node.op, ast.And) else pc.or_
        result = masks[0]
        for mask in masks[1:]:
            result = join(result, mask)
        return result
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return pc.invert(pc.fill_null(_mask(node.operand, table, rule), False))
    if isinstance(node, ast.Compare):
        left, result = node.left, None
        for operator, right in zip(node.ops, node.comparators, strict=True):
            mask = _comparison(left, operator, right, table, rule)
            result = mask if result is None else pc.and_(result, mask)
            left = right
        return result
    return _value(node, table, rule)


def _comparison(
    left: ast.expr, operator: ast.cmpop, right: ast.expr, table: pa.Table, rule: str
) -> Any:
    if isinstance(operator, (ast.Is, ast.IsNot)):
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise ConfigError(f"rule {rule!r}: `is` is for None only")
        check = pc.is_null if isinstance(operator, ast.Is) else pc.is_valid
        return check(_value(left, table, rule))
    if isinstance(operator, (ast.In, ast.NotIn)):
        values = pa.array(ast.literal_eval(right))
        column = _value(left, table, rule)
        mask = pc.and_(pc.is_in(column, value_set=values.cast(column.type)), pc.is_valid(column))
        return pc.invert(mask) if isinstance(operator, ast.NotIn) else mask
    return _COMPARISONS[type(operator)](_value(left, table, rule), _value(right, table, rule))


def _value(node: ast.expr, table: pa.Table, rule: str) -> Any:
    if isinstance(node, ast.Name):
        if node.id not in table.column_names:
            raise ConfigError(
                f"rule {rule!r}: no column {node.id!r}; there are {', '.join(table.column_names)}"
            )
        column = table[node.id]
        return column.cast(column.type.value_type) if _is_label(column.type) else column
    return pa.scalar(ast.literal_eval(node))


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_dictionary(kind))
