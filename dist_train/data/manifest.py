"""The clip table: which files there are, their labels, groups and splits.

Two forms are read: the Clog Loss challenge's CSVs (``train_metadata.csv`` joined with
``train_labels.csv``), and any CSV with ``filename,label`` and optional ``group,weight,split``.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from dist_train.errors import ManifestError

log = logging.getLogger(__name__)

# The challenge's names for what every other table calls label and group.
ALIASES = {"stalled": "label", "project_id": "group"}
REQUIRED = ("filename", "label")
OPTIONAL = ("group", "weight", "split", "crowd_score", "tier1", "url")
# Columns of the challenge that say nothing that a store needs.
UNUSED = ("num_frames", "micro", "nano")
SPLITS = ("train", "val", "test")

# Rows that are read or hashed at a time: what is only passing through is never all in memory.
_ROWS = 1 << 16

# A tar header (ustar) holds names of up to 100 bytes, of which ".json" takes five.
_SAFE_KEY = re.compile(r"[A-Za-z0-9_-]{1,95}")


@dataclass(frozen=True)
class Manifest:
    """A validated clip table.

    ``table`` has one row a clip, in the order of the file: ``key`` (a name that is safe in a tar
    archive and unique), ``filename``, ``label`` (int8; -1 where it is not known), ``group``
    (string, "" if none), ``weight`` (float64), ``split`` ("train", "val", "test", or "" in every
    row), ``crowd_score`` (float64, NaN if none) and ``tier1`` (bool).

    ``fingerprint``: SHA-256 of the table. ``urls``: the ``url`` column, as it is in the file and
    row by row with the table, None if there is none; the fingerprint does not depend on it, as the
    pixels of a clip do not depend on where its file lies.
    """

    table: pd.DataFrame
    fingerprint: str
    urls: pd.Series | None = None

    def urls_by_name(self) -> dict[str, str]:
        """The URL of each ``filename``.

        Raises:
            ManifestError: there are none, or not for every row; it names the first such row.
        """
        if self.urls is None:
            raise ManifestError(
                "the clip table has no column 'url'", fix="Say where the files are with --source."
            )
        urls = self.urls.str.strip()
        bad = ~urls.str.contains("://", regex=False)
        if bad.any():
            row = int(bad.to_numpy().argmax())
            raise ManifestError(
                f"url of '{self.table['filename'].iloc[row]}' (line {row + 2}) is "
                f"'{urls.iloc[row]}', not of the form s3://bucket/name ({bad.sum()} such rows)",
                fix="Mend it, or say where the files are with --source.",
            )
        return dict(zip(self.table["filename"], urls, strict=True))


def read_manifest(path: Path, *, labels: Path | None = None, unlabelled: bool = False) -> Manifest:
    """Read and check a clip table.

    Args:
        path: the CSV with a ``filename`` column.
        labels: a second CSV with ``filename`` and ``label`` or ``stalled``, for a table without
            labels; None takes the ``train_labels.csv`` beside it.
        unlabelled: do not ask for labels (a set to predict); every label is then -1.

    Raises:
        ManifestError: naming the file, the column or the row.
    """
    table = _read_csv(path)
    if labels is not None and "label" in table:
        raise ManifestError(
            "has labels of its own",
            where=path,
            fix=f"Take the column out, or leave out --labels {labels}.",
        )
    if "label" not in table and not unlabelled:
        labels = labels or path.with_name("train_labels.csv")
        if not labels.is_file():
            raise ManifestError(
                "has no 'label' or 'stalled' column, and there is no train_labels.csv beside it",
                where=path,
                fix="Add the column, or name the file with --labels.",
            )
        table = _join_labels(table, _read_csv(labels), path, labels)
    _check_columns(table, path, unlabelled)
    if table.empty:
        raise ManifestError("has no rows", where=path, fix="It needs one row a clip.")
    _check_filenames(table["filename"], path)
    labels_of = -1 if unlabelled else _parse(table["label"], _LABELS, "label", table, path)
    if not unlabelled and len(table) > 1 and table["label"].nunique() == 1:
        # As in the form of a submission, which is a table of placeholders.
        log.warning(
            "%s: all %d labels are %s. If these are no labels, prepare it with --unlabelled: "
            "'dist-train predict' gives them",
            labels or path, len(table), table["label"].iloc[0],
        )  # fmt: skip
    clean = pd.DataFrame(
        {
            "key": _keys(table["filename"]),
            "filename": table["filename"],
            "label": pd.Series(labels_of, index=table.index, dtype="int8"),
            "group": table.get("group", ""),
            "weight": _numbers(table, "weight", 1.0, path),
            "split": table.get("split", ""),
            "crowd_score": _numbers(table, "crowd_score", float("nan"), path),
            "tier1": _parse(
                pd.Series(table.get("tier1", "true"), index=table.index),
                _BOOLEANS,
                "tier1",
                table,
                path,
            ),
        }
    )
    unusable = ~np.isfinite(clean["weight"]) | (clean["weight"] < 0)
    if unusable.any():
        bad = clean[unusable].iloc[0]
        raise ManifestError(
            f"weight of '{bad.filename}' is {bad.weight:g}, not a finite number from 0 on",
            where=path,
        )
    _check_splits(clean, path)
    return Manifest(clean, _digest(clean), table.get("url"))


_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        # With a field more in each row than in the header, pandas takes the first column for an
        # index, and shifts the names of the others, unless index_col is False.
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            with pd.read_csv(
                path,
                dtype=str,
                keep_default_na=False,
                encoding="utf-8-sig",
                index_col=False,
                chunksize=_ROWS,
            ) as parts:
                # Not by usecols, with which pandas lets rows of any length pass.
                table = pd.concat(
                    [part.drop(columns=list(UNUSED), errors="ignore") for part in parts]
                )
    except pd.errors.EmptyDataError:
        raise ManifestError("is empty", where=path, fix="It needs a header and rows.") from None
    except OSError as error:
        raise ManifestError(f"cannot be read ({error.strerror})", where=path) from None
    except pd.errors.ParserWarning:
        raise ManifestError("has rows with more fields than its header", where=path) from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ManifestError(f"is not a CSV file ({reason})", where=path) from None
    table = table.rename(columns=ALIASES)
    if "filename" not in table:
        raise ManifestError("has no column 'filename'", where=path)
    if table.columns.has_duplicates:
        twice = table.columns[table.columns.duplicated()][0]
        raise ManifestError(f"has two columns for '{twice}'", where=path)
    return table


def _join_labels(
    table: pd.DataFrame, labels: pd.DataFrame, path: Path, labels_path: Path
) -> pd.DataFrame:
    if "label" not in labels:
        raise ManifestError("has no column 'label' or 'stalled'", where=labels_path)
    _check_filenames(labels["filename"], labels_path)
    label = table["filename"].map(labels.set_index("filename")["label"])
    missing = table["filename"][label.isna()]
    if len(missing):
        raise ManifestError(
            f"has no label for '{missing.iloc[0]}' ({len(missing)} such rows)",
            where=labels_path,
            fix=f"Add them, or take them out of {path}.",
        )
    return table.assign(label=label)


def _check_columns(table: pd.DataFrame, path: Path, unlabelled: bool) -> None:
    known = (*REQUIRED, *OPTIONAL, *UNUSED)
    for column in table.columns:
        if column not in known:
            names = [*known, *ALIASES]
            near = difflib.get_close_matches(str(column), names, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(names)}."
            raise ManifestError(f"unknown column '{column}'", where=path, fix=hint)
    if "label" not in table and not unlabelled:
        raise ManifestError("has no column 'label'", where=path)


def _check_filenames(names: pd.Series, path: Path) -> None:
    if (names == "").any():
        row = int((names == "").to_numpy().argmax()) + 2
        raise ManifestError(f"line {row} has no filename", where=path)
    # Where './a.mp4' and 'a.mp4' are one file, as a clip in train and in test would be.
    names = names.map(lambda name: str(PurePosixPath(name)) if "/" in name else name)
    if names.duplicated().any():
        name = names[names.duplicated()].iloc[0]
        lines = [int(i) + 2 for i in (names == name).to_numpy().nonzero()[0][:2]]
        raise ManifestError(
            f"'{name}' is listed twice (lines {lines[0]} and {lines[1]})",
            where=path,
            fix="Each clip may be listed once.",
        )


def _check_splits(clean: pd.DataFrame, path: Path) -> None:
    given = clean["split"] != ""
    if given.any() and not given.all():
        name = clean.loc[~given, "filename"].iloc[0]
        raise ManifestError(
            f"'{name}' has no split, though others have one",
            where=path,
            fix="Fill the split column for every clip, or leave it out.",
        )
    unknown = clean[given & ~clean["split"].isin(SPLITS)]
    if len(unknown):
        row = unknown.iloc[0]
        raise ManifestError(
            f"split '{row.split}' of '{row.filename}' is none of {', '.join(SPLITS)}", where=path
        )


def _parse(
    column: pd.Series, values: Mapping[str, int | bool], name: str, table: pd.DataFrame, path: Path
) -> pd.Series:
    parsed = column.str.strip().str.lower().map(values)
    bad = parsed.isna()
    if bad.any():
        row = int(bad.to_numpy().argmax())
        allowed = "0 or 1" if name == "label" else "true or false"
        raise ManifestError(
            f"{name} of '{table['filename'].iloc[row]}' is '{column.iloc[row]}', not {allowed}",
            where=path,
        )
    return parsed.astype("int8" if name == "label" else "bool")


def _numbers(table: pd.DataFrame, name: str, default: float, path: Path) -> pd.Series:
    if name not in table:
        return pd.Series(default, index=table.index, dtype="float64")
    text = table[name].str.strip()
    numbers = pd.to_numeric(text.where(text != "", str(default)), errors="coerce")
    bad = numbers.isna() & (text != "") & (text.str.lower() != "nan")
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise ManifestError(
            f"{name} of '{table['filename'].iloc[row]}' is '{text.iloc[row]}', not a number",
            where=path,
        )
    return numbers.astype("float64")


def _digest(table: pd.DataFrame) -> str:
    """SHA-256 of the table as a CSV file, which is never in memory as a whole."""
    digest = hashlib.sha256()
    for first in range(0, len(table), _ROWS):
        part = table.iloc[first : first + _ROWS]
        digest.update(part.to_csv(index=False, header=first == 0).encode())
    return digest.hexdigest()


def _keys(names: Iterable[str]) -> list[str]:
    """The file's stem where that is safe and unique; otherwise cleaned, with a hash of the name.

    WebDataset ends a key at the first dot of the base name, and a key must never leave the folder
    that a reader unpacks a shard into.
    """
    stems = [PurePosixPath(name).stem for name in names]
    counts = Counter(stems)
    return [
        stem
        if _SAFE_KEY.fullmatch(stem) and counts[stem] == 1
        else re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:78]
        + "-"
        + hashlib.sha256(name.encode()).hexdigest()[:16]
        for name, stem in zip(names, stems, strict=True)
    ]
