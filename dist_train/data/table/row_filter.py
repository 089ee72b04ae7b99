"""Choose rows of a table by a condition on its columns, such as ``micro and num_frames > 50``.

The condition is parsed as a Python expression. It may compare columns, and can do nothing else: no
calls, no attributes. Strings are not compared with numbers.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable
from functools import reduce
from typing import Any

import pandas as pd

from dist_train.data.table.numbers import parse_numbers
from dist_train.errors import ManifestError

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda column, items: column.isin(items),
    ast.NotIn: lambda column, items: ~column.isin(items),
}
_ALLOWED: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare),
    *(ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple, *_COMPARE),
)


def select_rows(table: pd.DataFrame, condition: str, strings: tuple[str, ...]) -> pd.DataFrame:
    """The rows for which a condition holds.

    Args:
        table: a table of strings. A column that holds only true and false, or only numbers and
            blanks, is compared as such.
        condition: a Python expression. Backticks enclose a column name that is no Python name.
        strings: columns that are compared as strings, whatever they hold.

    Raises:
        ManifestError: the condition is invalid, or holds for no row.
    """
    columns = {str(name): str(name) for name in table.columns}
    expression = condition
    for number, name in enumerate(re.findall(r"`([^`]*)`", condition)):
        expression = expression.replace(f"`{name}`", f"quoted_{number}")
        columns[f"quoted_{number}"] = name
    tree = _parsed(expression, condition)
    used = dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    if not used:
        raise _error(condition, "it names no column")
    for name in used:
        if columns.get(name) not in table.columns:
            raise _error(
                condition,
                f"there is no column '{columns.get(name, name)}'",
                f"Known: {', '.join(map(str, table.columns))}.",
            )
    values = {
        name: table[columns[name]] if columns[name] in strings else _typed(table[columns[name]])
        for name in used
    }
    try:
        holds = _Evaluator(pd.DataFrame(values, table.index), condition).truth(tree.body)
    except RecursionError:
        raise _error(f"{condition[:50]}...", "it is nested too deeply") from None
    if not holds.any():
        raise _error(condition, f"it holds for none of {len(table)} rows")
    return table[holds]


def _parsed(expression: str, condition: str) -> ast.Expression:
    try:
        # Python warns of a backslash in a string that does not mean itself.
        with warnings.catch_warnings(action="error"):
            tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, SyntaxWarning, ValueError, RecursionError, MemoryError):
        raise _error(
            condition,
            "it is no expression over columns",
            "Equal is ==; strings stand in quotes, names of columns that are no single word in `.",
        ) from None
    if not all(isinstance(node, _ALLOWED) for node in ast.walk(tree)):
        raise _error(
            condition,
            "it may only compare columns",
            "Allowed are names of columns, numbers, strings, lists, comparisons, in, and, or, not.",
        )
    return tree


class _Evaluator:
    """Evaluates a parsed condition for all rows of a table of strings, numbers and bools."""

    def __init__(self, table: pd.DataFrame, condition: str) -> None:
        self.table, self.condition = table, condition

    def truth(self, node: ast.expr) -> pd.Series:
        """For which rows an expression is true, bool."""
        if isinstance(node, ast.BoolOp):
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return reduce(join, map(self.truth, node.values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.truth(node.operand)
        if isinstance(node, ast.Compare):
            return self._compared(node)
        if isinstance(node, ast.Name) and self.table[node.id].dtype == bool:
            return self.table[node.id]
        raise _error(
            self.condition,
            f"'{ast.unparse(node)}' is not true or false for each row",
            "Compare a column with something, as in num_frames > 50 or micro == 1.",
        )

    def _compared(self, node: ast.Compare) -> pd.Series:
        operands = [node.left, *node.comparators]
        # pandas would find every string unequal to every number.
        if len(set().union(*map(self._kinds, operands))) > 1:
            raise _error(
                self.condition,
                f"'{ast.unparse(node)}' compares strings with numbers",
                "Strings stand in quotes, numbers do not; True and False are numbers.",
            )
        holds = pd.Series(True, self.table.index)
        for left, how, right in zip(operands, node.ops, operands[1:], strict=False):
            is_in = isinstance(how, ast.In | ast.NotIn)
            items = right.elts if isinstance(right, ast.List | ast.Tuple) else None
            if isinstance(left, ast.List | ast.Tuple) or is_in != (items is not None):
                raise _error(self.condition, "a list may only stand after 'in' or 'not in'")
            if items is not None and not (
                isinstance(left, ast.Name) and all(map(_is_constant, items))
            ):
                raise _error(self.condition, "'in' takes a column and a list of numbers or strings")
            holds &= _COMPARE[type(how)](self._values(left), self._values(right))
        return holds

    def _kinds(self, node: ast.expr) -> set[str]:
        if isinstance(node, ast.List | ast.Tuple):
            return set().union(*map(self._kinds, node.elts))
        values = self._values(node)
        is_string = (
            not pd.api.types.is_numeric_dtype(values)
            if isinstance(values, pd.Series)
            else isinstance(values, str)
        )
        return {"strings" if is_string else "numbers"}

    def _values(self, node: ast.expr) -> Any:
        """A column, a number, a string, or a list of them."""
        if isinstance(node, ast.List | ast.Tuple):
            return [self._values(item) for item in node.elts]
        if isinstance(node, ast.Name):
            return self.table[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._values(node.operand)
            if isinstance(value, int | float):
                return -value
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
            return node.value
        raise _error(self.condition, f"'{ast.unparse(node)}' is no column, number or string")


def _is_constant(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant | ast.UnaryOp)


def _typed(column: pd.Series) -> pd.Series:
    """The column as bools or numbers (NaN for a blank), if every field is one."""
    text = column.str.strip().str.lower()
    truth = text.map({"true": True, "false": False})
    if truth.notna().all():
        return truth.astype(bool)
    numbers = parse_numbers(text.replace("", "nan"))
    return numbers if (numbers.notna() | text.isin(("", "nan"))).all() else column


def _error(condition: str, what: str, fix: str | None = None) -> ManifestError:
    return ManifestError(f"'{condition}': {what}", where="--where", fix=fix)
