"""A table of texts from a CSV file, as programs and as spreadsheets write it.

Fields may be parted by commas, semicolons or tabs, the text may be UTF-8 or UTF-16, and blank rows
and blank columns, which spreadsheets leave behind, are passed over.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from dist_train.errors import ManifestError
from dist_train.system.advice import blame_machine

DELIMITERS = (",", ";", "\t")
# Rows that are made into a part of the table at a time: as Python objects they fill much memory.
ROWS = 1 << 16
# What a file begins with that is no text: how it is named.
_FOREIGN = {
    b"PK\x03\x04": "an Excel workbook or another zip archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook of the old kind",
    b"\x1f\x8b": "a gzip archive",
    b"SQLite": "a database",
    b"\x89PNG": "a picture",
}


def read_table(path: Path, column: str) -> pd.DataFrame:
    """The rows of a CSV file: texts, "" where there is none; the index is the line of each row.

    Args:
        column: a column that there must be, by which the delimiter is known. Names of columns are
            taken without blanks around them, and in lower case where that is ``column``.

    Raises:
        ManifestError: the file cannot be read, is no such table, or has no such column.
    """
    encoding = _encoding(path)
    try:
        with path.open(newline="", encoding=encoding) as file:
            return _parse(file, path, column)
    except OSError as error:
        blame_machine(error, path)
        raise ManifestError(f"cannot be read ({error.strerror})", where=path) from None
    except UnicodeError as error:
        raise ManifestError(
            f"is not a CSV file in {encoding.removesuffix('-sig')} ({error})",
            where=path,
            fix="Save it as 'CSV UTF-8'.",
        ) from None


def _encoding(path: Path) -> str:
    if path.is_dir():
        raise ManifestError(
            "is a folder, not a table",
            where=path,
            fix="Name a CSV file; for a folder of one folder a class there is --from-folders.",
        )
    if path.exists() and not path.is_file():
        raise ManifestError("is no plain file", where=path)
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        blame_machine(error, path)
        raise ManifestError(f"cannot be read ({error.strerror})", where=path) from None
    for start, kind in _FOREIGN.items():
        if head.startswith(start):
            raise ManifestError(
                f"is not a CSV file, but {kind}", where=path, fix="Save it as 'CSV UTF-8'."
            )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if b"\0" in head:
        raise ManifestError(
            "is not a CSV file (it holds a byte 0)", where=path, fix="Save it as 'CSV UTF-8'."
        )
    return "utf-8-sig"


def _parse(file: Iterable[str], path: Path, column: str) -> pd.DataFrame:
    lines = iter(file)
    skipped, first, given = 0, "", None
    for line in lines:
        skipped += 1
        # As Excel writes it, to tell itself the delimiter.
        if given is None and line.lower().startswith("sep=") and len(line.rstrip("\r\n")) == 5:
            given = line[4]
        elif line.strip(" \t\r\n,;"):
            first = line
            break
    if not first:
        raise ManifestError("is empty", where=path, fix="It needs a header and rows.")

    def again() -> Iterator[str]:
        yield first
        yield from lines

    delimiter = given or _delimiter(first, column)
    reader = csv.reader(again(), delimiter=delimiter, strict=True)
    try:
        header = [_name(field, column) for field in next(reader)]
        parts, rows, numbers = [], [], []
        _check_header(header, path, column)
        for row in reader:
            if not "".join(row).strip():
                continue
            if "".join(row[len(header) :]).strip():
                raise ManifestError(
                    f"line {reader.line_num + skipped - 1} has more fields than the header "
                    f"({len(row)} and {len(header)})",
                    where=path,
                    fix="Put fields that hold the delimiter in quotes.",
                )
            rows.append((row + [""] * len(header))[: len(header)])
            numbers.append(reader.line_num + skipped - 1)
            if len(rows) == ROWS:
                parts.append(_frame(rows, header, numbers))
                rows, numbers = [], []
    except csv.Error as error:
        raise ManifestError(
            f"is not a CSV file (line {reader.line_num + skipped - 1}: {error})", where=path
        ) from None
    table = pd.concat([*parts, _frame(rows, header, numbers)])
    # What a comma at the end of the header stands before.
    nameless = table.columns == ""
    if (table.loc[:, nameless] != "").any(axis=None):
        raise ManifestError("has a column without a name", where=path, fix="Give it one.")
    return table.loc[:, ~nameless]


def _frame(rows: list[list[str]], header: list[str], numbers: list[int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=header, index=numbers, dtype=str)


def _delimiter(header: str, column: str) -> str:
    for delimiter in DELIMITERS:
        if any(_name(field, column) == column for field in header.split(delimiter)):
            return delimiter
    return max(DELIMITERS, key=header.count)


def _name(field: str, column: str) -> str:
    name = field.strip().strip('"').strip()
    return column if name.lower() == column else name


def _check_header(header: list[str], path: Path, column: str) -> None:
    if column not in header:
        shown = ", ".join(f"'{name}'" for name in header[:10])
        raise ManifestError(
            f"has no column '{column}'; its columns are {shown}",
            where=path,
            fix=f"Name the column of the files' names '{column}'.",
        )
    named = [name for name in header if name]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise ManifestError(f"has two columns for '{twice}'", where=path)
