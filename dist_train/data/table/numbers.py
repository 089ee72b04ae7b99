"""Numbers as spreadsheets write them, with a decimal point or a decimal comma."""

from __future__ import annotations

import pandas as pd

_WITH_COMMA = r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?"
_THOUSANDS = r"[+-]?[1-9]\d{0,2},\d{3}"


def parse_numbers(text: pd.Series) -> pd.Series:
    """The numbers of a column of strings, float64; NaN for what is none.

    A comma is the decimal sign if no number of the column has a point. If every comma could also
    divide thousands, as in "1,500", those numbers are read as NaN: they are ambiguous.
    """
    text = text.str.strip()
    comma = text.str.fullmatch(_WITH_COMMA)
    is_decimal = not text.str.contains(".", regex=False).any()
    if comma.any() and is_decimal and not text[comma].str.fullmatch(_THOUSANDS).all():
        text = text.mask(comma, text.str.replace(",", ".", regex=False))
    return pd.to_numeric(text, errors="coerce").astype("float64")
