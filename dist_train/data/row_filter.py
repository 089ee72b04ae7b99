"""Rows of a table by a condition on its columns, as ``micro and num_frames > 50``.

The condition is what ``pandas.DataFrame.query`` takes, without all that could do more than compare
columns: no calls, no attributes, no ``@`` names.
"""

from __future__ import annotations

import ast
import re

import pandas as pd

from dist_train.errors import ManifestError

LONGEST = 1000
TRUTH = {"true": True, "false": False}

_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Invert, ast.USub),
    *(ast.BinOp, ast.BitAnd, ast.BitOr, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt),
    *(ast.GtE, ast.In, ast.NotIn, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
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
    used = _names(plain, condition)
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
    try:
        holds = frame.eval(plain, engine="python")
    # What pandas raises depends on where in the expression it fails.
    except Exception as error:
        raise _error(condition, f"it cannot be applied ({error})") from None
    if not isinstance(holds, pd.Series) or holds.dtype != bool:
        raise _error(
            condition,
            "it is not true or false for each row",
            "Compare a column with something, as in num_frames > 50 or micro == 1.",
        )
    if not holds.any():
        raise _error(condition, f"it holds for none of {len(table)} rows")
    return table[holds]


def _names(plain: str, condition: str) -> list[str]:
    """The columns that a condition names; refuses what is no plain comparison of columns."""
    if len(plain) > LONGEST:
        raise _error(condition[:50] + "...", f"it is longer than {LONGEST} letters")
    try:
        tree = ast.parse(plain.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _error(condition, "it is no expression over columns") from None
    names = []
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise _error(
                condition,
                "it may only compare columns",
                "Allowed are names of columns, numbers, texts, lists of them, comparisons, in, "
                "and, or, not.",
            )
        if isinstance(node, ast.Name):
            names.append(node.id)
    if not names:
        raise _error(condition, "it names no column")
    return list(dict.fromkeys(names))


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
