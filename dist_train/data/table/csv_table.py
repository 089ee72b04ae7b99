"""Read a CSV file, as programs or spreadsheets write it, into a table of strings.

Commas, semicolons or tabs separate fields. The encoding is UTF-8 or UTF-16. Blank rows and blank
columns, which spreadsheets leave behind, are skipped.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import pandas as pd

from dist_train.errors import ManifestError
from dist_train.files import open_plain
from dist_train.system.advice import blame_machine

DELIMITERS = (",", ";", "\t")
# Rows that become one part of the table: as lists of strings, all of them would fill the memory.
ROWS = 1 << 16
RESAVE = "Save it as 'CSV UTF-8'."
# First bytes of .xlsx and of .xls.
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")


def read_table(path: Path, column: str) -> pd.DataFrame:
    """Read a CSV file as strings. The index holds the line number of each row.

    A missing field is "". Names of columns have no blanks around them.

    Args:
        column: a column that the file must have, in any case. It shows the delimiter.

    Raises:
        ManifestError: the file cannot be read, is no CSV file, or lacks the column.
    """
    if path.is_dir():
        raise ManifestError(
            "is a folder, not a table",
            where=path,
            fix="Name a CSV file. For a folder with one folder a class, use --from-folders.",
        )
    encoding = "utf-8-sig"
    try:
        with open_plain(path) as file:
            head = file.read(1 << 16)
            file.seek(0)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")):
                encoding = "utf-16"
            elif head.startswith(_WORKBOOKS):
                raise ManifestError(
                    "is an Excel workbook or a zip archive, not a CSV file",
                    where=path,
                    fix=f"Unpack it. {RESAVE}",
                )
            elif b"\0" in head:
                raise ManifestError("is not a CSV file (it holds a byte 0)", where=path, fix=RESAVE)
            with io.TextIOWrapper(file, encoding, newline="") as lines:
                return _parse(lines, path, column)
    except OSError as error:
        blame_machine(error, path)
        raise ManifestError(f"cannot be read ({error.strerror})", where=path) from None
    except UnicodeError as error:
        raise ManifestError(
            f"is not a CSV file in {encoding.removesuffix('-sig')} ({error})",
            where=path,
            fix=RESAVE,
        ) from None


def _parse(lines: Iterator[str], path: Path, column: str) -> pd.DataFrame:
    delimiter, skipped = "", -1
    for first in lines:
        skipped += 1
        # A line that tells Excel the delimiter.
        if not delimiter and re.fullmatch(r"sep=.\s*", first, re.IGNORECASE):
            delimiter = first[4]
        elif first.strip(" \t\r\n,;"):
            break
    else:
        raise ManifestError("is empty", where=path, fix="It needs a header and rows.")
    reader = csv.reader(
        chain([first], lines), delimiter=delimiter or _delimiter(first, column), strict=True
    )
    try:
        header = [_name(field) for field in next(reader)]
        if column not in map(str.lower, header):
            shown = ", ".join(f"'{name}'" for name in header[:10])
            raise ManifestError(
                f"has no column '{column}'; its columns are {shown}",
                where=path,
                fix=f"Give the column of file names the name '{column}'.",
            )
        rows = ((reader.line_num + skipped, row) for row in reader if "".join(row).strip())
        parts = []
        while part := list(islice(rows, ROWS)):
            parts.append(_part(part, header, path))
    except csv.Error as error:
        raise ManifestError(
            f"is not a CSV file (line {reader.line_num + skipped}: {error})", where=path
        ) from None
    table = pd.concat(parts) if parts else pd.DataFrame(columns=header, dtype=str)
    # A comma at the end of the header makes a column without a name.
    nameless = table.columns == ""
    if (table.loc[:, nameless] != "").any(axis=None):
        raise ManifestError("has a column without a name", where=path, fix="Give it one.")
    return table.loc[:, ~nameless]


def _part(rows: list[tuple[int, list[str]]], header: list[str], path: Path) -> pd.DataFrame:
    width = len(header)
    for line, row in rows:
        if "".join(row[width:]).strip():
            raise ManifestError(
                f"line {line} has more fields than the header ({len(row)} and {width})",
                where=path,
                fix="Put fields that hold the delimiter in quotes.",
            )
    padded = [(row + [""] * width)[:width] for _, row in rows]
    return pd.DataFrame(padded, [line for line, _ in rows], header, dtype=str)


def _delimiter(header: str, column: str) -> str:
    for delimiter in DELIMITERS:
        if column in (_name(field).lower() for field in header.split(delimiter)):
            return delimiter
    return max(DELIMITERS, key=header.count)


def _name(field: str) -> str:
    return field.strip().strip('"').strip()
