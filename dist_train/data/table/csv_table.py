"""Read a CSV file, as programs or spreadsheets write it, into a table of strings.

Fields are separated by ``, ; tab |``, or by what a first line ``sep=X`` names. The encoding is
UTF-8, UTF-16 with a byte order mark, or, with a warning, Windows-1252. Blank rows and blank
columns, which spreadsheets leave behind, are skipped, and so is the index that pandas writes.
"""

from __future__ import annotations

import csv
import io
import logging
import re
import unicodedata
from collections.abc import Collection, Iterator
from itertools import chain, islice
from pathlib import Path

import pandas as pd

from dist_train.errors import ManifestError
from dist_train.files import open_plain
from dist_train.system.advice import blame_machine

log = logging.getLogger(__name__)

DELIMITERS = (",", ";", "\t", "|")
# Rows that become one part of the table: as lists of strings, all of them would fill the memory.
ROWS = 1 << 16
RESAVE = "Save it as 'CSV UTF-8'."
# First bytes of .xlsx and of .xls.
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
_TOLD_DELIMITER = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)


def read_table(path: Path, columns: Collection[str]) -> pd.DataFrame:
    """Read a CSV file as strings. The index holds the number of each row.

    Rows are counted as a spreadsheet shows them: the header is row 1, a blank row counts, a line
    break inside quotes does not, and neither does the line ``sep=X``. A missing field is "". Names
    of columns have no blanks around them.

    The delimiter is the first of ``DELIMITERS`` by which the header has one of ``columns``;
    otherwise the most frequent one in the header.

    Args:
        columns: names, in any case, of which the file must have one.

    Raises:
        ManifestError: the file cannot be read, is no CSV file, or lacks the column.
    """
    if path.is_dir():
        raise ManifestError(
            "is a folder, not a table",
            where=path,
            fix="Name a CSV file. For a folder with one folder a class, use --from-folders, or "
            "write its table by 'dist-train manifest'.",
        )
    try:
        encoding = _encoding(path)
        try:
            return _read(path, encoding, columns)
        except UnicodeError:
            if encoding != "utf-8-sig":
                raise
        table = _read(path, "cp1252", columns)
    except OSError as error:
        blame_machine(error, path)
        raise ManifestError(f"cannot be read ({error.strerror})", where=path) from None
    except UnicodeError as error:
        raise ManifestError(f"is not a CSV file ({error})", where=path, fix=RESAVE) from None
    log.warning(
        "%s: is not UTF-8, and is read as Windows-1252 (Latin-1). If names are wrong: %s",
        path, RESAVE,
    )  # fmt: skip
    return table


def _encoding(path: Path) -> str:
    with open_plain(path) as file:
        head = file.read(1 << 16)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if head.startswith(_WORKBOOKS):
        raise ManifestError(
            "is an Excel workbook or a zip archive, not a CSV file",
            where=path,
            fix=f"Unpack it. {RESAVE}",
        )
    if b"\0" in head:
        raise _has_null(path)
    return "utf-8-sig"


def _read(path: Path, encoding: str, columns: Collection[str]) -> pd.DataFrame:
    with open_plain(path) as file, io.TextIOWrapper(file, encoding, newline="") as lines:
        return _parse(_text(lines, path), path, columns)


def _text(lines: Iterator[str], path: Path) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise _has_null(path)
        yield line


def _has_null(path: Path) -> ManifestError:
    return ManifestError("is not a CSV file (it holds a byte 0)", where=path, fix=RESAVE)


def _parse(lines: Iterator[str], path: Path, columns: Collection[str]) -> pd.DataFrame:
    delimiter, told, blank = "", 0, 0
    for first in lines:
        # A line that tells Excel the delimiter.
        if not delimiter and (match := _TOLD_DELIMITER.fullmatch(first)):
            delimiter, told = match[1], 1
        elif first.strip(" \t\r\n,;|\ufeff"):
            break
        else:
            blank += 1
    else:
        raise ManifestError("is empty", where=path, fix="It needs a header and rows.")
    reader = csv.reader(
        chain([first], lines),
        delimiter=delimiter or _delimiter(first, columns),
        strict=True,
        skipinitialspace=True,
    )
    try:
        header = [_name(field) for field in next(reader)]
        if not any(name.casefold() in columns for name in header):
            shown = ", ".join(f"'{name}'" for name in header[:10])
            raise ManifestError(
                f"has no column '{next(iter(columns))}'; its columns are {shown}",
                where=path,
                fix="Name the column of file names by --file-column.",
            )
        numbered = enumerate(reader, start=blank + 2)
        rows = ((number, row) for number, row in numbered if "".join(row).strip())
        parts = []
        while part := list(islice(rows, ROWS)):
            parts.append(_part(part, header, path))
    except csv.Error as error:
        raise ManifestError(
            f"is not a CSV file (line {reader.line_num + blank + told}: {error})",
            where=path,
            fix="Quotes enclose a whole field, and a quote inside them is doubled.",
        ) from None
    table = pd.concat(parts) if parts else pd.DataFrame(columns=header, dtype=str)
    return _named(table, path)


def _named(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The columns that have a name.

    A comma at the end of the header makes one without, and so does the index that pandas writes.
    """
    nameless = table.columns == ""
    filled = (table.loc[:, nameless] != "").any()
    is_index = nameless[0] and table.iloc[:, 0].tolist() == [str(i) for i in range(len(table))]
    if filled.sum() > is_index:
        raise ManifestError("has a column without a name", where=path, fix="Give it one.")
    return table.loc[:, ~nameless]


def _part(rows: list[tuple[int, list[str]]], header: list[str], path: Path) -> pd.DataFrame:
    width = len(header)
    for number, row in rows:
        if "".join(row[width:]).strip():
            raise ManifestError(
                f"line {number} has more fields than the header ({len(row)} and {width})",
                where=path,
                fix="Put fields that hold the delimiter in quotes.",
            )
    padded = [(row + [""] * width)[:width] for _, row in rows]
    return pd.DataFrame(padded, [number for number, _ in rows], header, dtype=str)


def _delimiter(header: str, columns: Collection[str]) -> str:
    for delimiter in DELIMITERS:
        fields = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True))
        if any(_name(field).casefold() in columns for field in fields):
            return delimiter
    return max(DELIMITERS, key=header.count)


def _name(field: str) -> str:
    text = " ".join(unicodedata.normalize("NFC", field).replace("\ufeff", "").split())
    return text.strip('"').strip()
