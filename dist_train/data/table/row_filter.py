"""Rows of a table by a condition on its columns, as ``micro and num_frames > 50``.

The condition is what ``pandas.DataFrame.query`` takes, without all that could do more than compare
columns: no calls, no attributes, no ``@`` names. Texts are not compared with numbers.
"""

from __future__ import annotations

import ast
import io
import operator
import re
import warnings
from collections.abc import Callable
from functools import reduce
from tokenize import NAME, TokenError, generate_tokens, untokenize
from typing import Any

import pandas as pd

from dist_train.errors import ManifestError

LONGEST = 1000
TRUTH = {"true": True, "false": False}

_LISTED = (ast.In, ast.NotIn)
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda column, items: pd.Series(column).isin(items),
    ast.NotIn: lambda column, items: ~pd.Series(column).isin(items),
}
_ALLOWED: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Invert, ast.USub),
    *(ast.Compare, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
    *_COMPARE,
)


def select_rows(table: pd.DataFrame, condition: str, texts: tuple[str, ...]) -> pd.DataFrame:
    """The rows for which the condition holds.

    Args:
        table: of texts. A column of true and false, or of numbers (or blanks), is compared as such.
        condition: over the table's columns; a name with blanks in it stands between backticks.
        texts: columns that are compared as texts, whatever they hold.

    Raises:
        ManifestError: it is no such condition, or holds for no row.
    """
    # Names that Python does not take get others.
    quoted = list(dict.fromkeys(re.findall(r"`([^`]*)`", condition)))
    plain = condition
    for number, name in enumerate(quoted):
        plain = plain.replace(f"`{name}`", f"quoted_{number}")
    columns = {str(name): str(name) for name in table.columns}
    columns |= {f"quoted_{number}": name for number, name in enumerate(quoted)}
    tree = _parsed(plain, condition)
    used = list(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)))
    if not used:
        raise _error(condition, "it names no column")
    for name in used:
        if columns.get(name) not in table.columns:
            known = ", ".join(map(str, table.columns))
            raise _error(
                condition, f"there is no column '{columns.get(name, name)}'", f"Known: {known}."
            )
    frame = pd.DataFrame(
        {name: _typed(table[columns[name]], columns[name] in texts) for name in used},
        index=table.index,
    )
    holds = _Truth(frame, condition).of(tree.body)
    if not holds.any():
        raise _error(condition, f"it holds for none of {len(table)} rows")
    return table[holds]


def _parsed(plain: str, condition: str) -> ast.Expression:
    """A condition that is a plain comparison of columns; refuses any other."""
    if len(plain) > LONGEST:
        raise _error(condition[:50] + "...", f"it is longer than {LONGEST} letters")
    try:
        # As an error, what Python would warn of: a backslash in a text that means something else.
        with warnings.catch_warnings(action="error"):
            tree = ast.parse(_in_words(plain.strip()), mode="eval")
    except (SyntaxError, SyntaxWarning, TokenError, ValueError, RecursionError, MemoryError):
        raise _error(
            condition,
            "it is no expression over columns",
            "Equal is ==; texts stand in quotes, names of columns that are no single word in `.",
        ) from None
    if not all(isinstance(node, _ALLOWED) for node in ast.walk(tree)):
        raise _error(
            condition,
            "it may only compare columns",
            "Allowed are names of columns, numbers, texts, lists of them, comparisons, in, "
            "and, or, not.",
        )
    return tree


def _in_words(plain: str) -> str:
    """With ``and`` for ``&`` and ``or`` for ``|``, as pandas takes them: in Python ``a & b > 1`` is
    ``(a & b) > 1``."""
    words = {"&": "and", "|": "or"}
    tokens = generate_tokens(io.StringIO(plain).readline)
    return untokenize(
        (NAME, words[token.string]) if token.string in words else token[:2] for token in tokens
    ).strip()


class _Truth:
    """For which rows of a frame, of columns of texts, numbers or truth, a condition holds."""

    def __init__(self, frame: pd.DataFrame, condition: str) -> None:
        self.frame, self.condition = frame, condition

    def of(self, node: ast.expr) -> pd.Series:
        if isinstance(node, ast.BoolOp):
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return reduce(join, map(self.of, node.values))
        if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.USub):
            return ~self.of(node.operand)
        if isinstance(node, ast.Compare):
            return self._compared(node)
        if isinstance(node, ast.Name) and self.frame[node.id].dtype == bool:
            return self.frame[node.id]
        raise _error(
            self.condition,
            f"'{ast.unparse(node)}' is not true or false for each row",
            "Compare a column with something, as in num_frames > 50 or micro == 1.",
        )

    def _compared(self, node: ast.Compare) -> pd.Series:
        operands = [node.left, *node.comparators]
        # Between texts and numbers == would hold for no row, and != for all.
        if len(set().union(*map(self._kinds, operands))) > 1:
            raise _error(
                self.condition,
                f"'{ast.unparse(node)}' compares texts with numbers",
                "Texts stand in quotes, numbers in none; True and False are numbers.",
            )
        holds = pd.Series(True, self.frame.index)
        for left, how, right in zip(operands, node.ops, operands[1:], strict=False):
            listed = isinstance(right, ast.List | ast.Tuple)
            if isinstance(left, ast.List | ast.Tuple) or listed != (type(how) in _LISTED):
                raise _error(self.condition, "a list may only stand after 'in' or 'not in'")
            holds &= _COMPARE[type(how)](self._values(left), self._values(right))
        return holds

    def _kinds(self, node: ast.expr) -> set[str]:
        if isinstance(node, ast.List | ast.Tuple):
            return set().union(*map(self._kinds, node.elts))
        values = self._values(node)
        if isinstance(values, str):
            return {"texts"}
        if isinstance(values, pd.Series):
            return {"numbers" if pd.api.types.is_numeric_dtype(values) else "texts"}
        return {"numbers"}

    def _values(self, node: ast.expr) -> Any:
        """A column, a number, a text, or a list of them."""
        if isinstance(node, ast.List | ast.Tuple):
            return [self._values(item) for item in node.elts]
        if isinstance(node, ast.Name):
            return self.frame[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._values(node.operand)
            if isinstance(value, int | float):
                return -value
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
            return node.value
        raise _error(self.condition, f"'{ast.unparse(node)}' is no column, number or text")


def _typed(column: pd.Series, text: bool) -> pd.Series:
    if text:
        return column
    stripped = column.str.strip()
    truth = stripped.str.lower().map(TRUTH)
    if truth.notna().all():
        return truth.astype(bool)
    numbers = pd.to_numeric(stripped.where(stripped != "", "nan"), errors="coerce")
    whole = numbers.notna() | stripped.str.lower().isin(("", "nan"))
    return numbers if whole.all() else column


def _error(condition: str, what: str, fix: str | None = None) -> ManifestError:
    return ManifestError(f"'{condition}': {what}", where="--where", fix=fix)
