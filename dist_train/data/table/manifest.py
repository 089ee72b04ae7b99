"""The clip table: which files there are, their labels, groups and splits.

Two forms are read: the Clog Loss challenge's CSVs (``train_metadata.csv`` joined with
``train_labels.csv``), and any CSV with ``filename,label`` and optional ``group,weight,split``;
csv_table.py says how they may be written.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from dist_train.data.table.csv_table import ROWS, read_table
from dist_train.data.table.row_filter import select_rows
from dist_train.errors import ManifestError

log = logging.getLogger(__name__)

# The challenge's names for what every other table calls label and group.
ALIASES = {"stalled": "label", "project_id": "group"}
REQUIRED = ("filename", "label")
OPTIONAL = ("group", "weight", "split", "crowd_score", "tier1", "url")
# Columns of the challenge that say nothing that a store needs.
UNUSED = ("num_frames", "micro", "nano")
SPLITS = ("train", "val", "test")
# Compared as texts by --where, whatever is in them: group "007" is not group 7.
_TEXTS = ("filename", "group", "project_id", "split", "url")

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
    pixels of a clip do not depend on where its file lies. ``lines``: the line of each row in the
    file, None if it is of no file.
    """

    table: pd.DataFrame
    fingerprint: str
    urls: pd.Series | None = None
    lines: np.ndarray | None = None

    def line(self, row: int) -> str:
        """How messages name a row, counted from 0."""
        return f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}"

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
                f"url of '{self.table['filename'].iloc[row]}' ({self.line(row)}) is "
                f"'{urls.iloc[row]}', not of the form s3://bucket/name ({bad.sum()} such rows)",
                fix="Mend it, or say where the files are with --source.",
            )
        if urls.duplicated().any():
            row = int(urls.duplicated().to_numpy().argmax())
            first = int((urls == urls.iloc[row]).to_numpy().argmax())
            raise ManifestError(
                f"{self.line(first)} and {self.line(row)} of the clip table have one url, "
                f"'{urls.iloc[row]}'",
                fix="Each file may be listed once.",
            )
        return dict(zip(self.table["filename"], urls, strict=True))


def read_manifest(
    path: Path,
    *,
    labels: Path | None = None,
    unlabelled: bool = False,
    where: str | None = None,
    allow_local: bool = False,
) -> Manifest:
    """Read and check a clip table.

    Args:
        path: the CSV with a ``filename`` column.
        labels: a second CSV with ``filename`` and ``label`` or ``stalled``, for a table without
            labels; None takes the ``train_labels.csv`` beside it.
        unlabelled: do not ask for labels (a set to predict); every label is then -1.
        where: a condition over the columns of the file, by which rows are chosen; see
            ``select_rows``.
        allow_local: let file names lead out of the source folder (absolute, or by '..').

    Raises:
        ManifestError: naming the file, the column or the row.
    """
    if unlabelled and labels is not None:
        raise ManifestError("--labels and --unlabelled contradict each other", where=path)
    table = read_table(path, "filename")
    own = "label" in _rename(table, path)
    if labels is not None and own:
        raise ManifestError(
            "has labels of its own",
            where=path,
            fix=f"Take the column out, or leave out --labels {labels}.",
        )
    if unlabelled and own:
        log.warning("%s: its labels are not looked at (--unlabelled)", path)
    beside = labels or path.with_name("train_labels.csv")
    apart = None
    if not own and not unlabelled and (labels is not None or beside.is_file()):
        apart = _read_labels(beside)
    if where is not None:
        # By the names in the file, and by those that this program has for them.
        both = {new: old for old, new in ALIASES.items() if old in table and new not in table}
        named = table.assign(**{new: table[old] for new, old in both.items()})
        if apart is not None:
            label = _labels_for(table["filename"], apart).fillna("")
            named = named.assign(label=label, stalled=label)
        table = table.loc[select_rows(named, where, _TEXTS).index]
    table = _known_columns(table, path)
    table["filename"] = table["filename"].str.strip()
    if table.empty:
        raise ManifestError("has no rows", where=path, fix="It needs one row a clip.")
    _check_filenames(table["filename"], path, allow_local)
    if apart is not None:
        table = _join_labels(table, apart, beside, path)
    elif not own and not unlabelled:
        raise ManifestError(
            "has no 'label' or 'stalled' column, and there is no train_labels.csv beside it",
            where=path,
            fix="Add the column, or name the file with --labels; --unlabelled takes clips "
            "without labels.",
        )
    elif own and not unlabelled and (table["label"].str.strip() == "").all():
        raise ManifestError(
            "has no label in any row", where=path, fix="Fill the column, or use --unlabelled."
        )
    return make_manifest(table, path, unlabelled=unlabelled)


def make_manifest(table: pd.DataFrame, path: Path, *, unlabelled: bool = False) -> Manifest:
    """Check the columns of a table of texts and give them their types.

    Args:
        table: ``filename``, ``label`` and optional columns; the index is the line of each row.
        path: what messages name.

    Raises:
        ManifestError: naming the column and the row.
    """
    labels_of = -1 if unlabelled else _parse(table["label"], _LABELS, "label", table, path)
    if not unlabelled and len(table) > 1 and table["label"].nunique() == 1:
        # As in the form of a submission, which is a table of placeholders.
        log.warning(
            "%s: all %d labels are %s. If these are no labels, prepare it with --unlabelled: "
            "'dist-train predict' gives them",
            path, len(table), table["label"].iloc[0],
        )  # fmt: skip
    clean = pd.DataFrame(
        {
            "key": _keys(table["filename"]),
            "filename": table["filename"],
            "label": pd.Series(labels_of, index=table.index, dtype="int8"),
            "group": _groups(table),
            "weight": _numbers(table, "weight", 1.0, path),
            "split": _texts(table, "split").str.lower(),
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
    clean = clean.reset_index(drop=True)
    urls = table["url"].reset_index(drop=True) if "url" in table else None
    return Manifest(clean, _digest(clean), urls, table.index.to_numpy())


_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_LABELS = {word: int(value) for word, value in _BOOLEANS.items()} | {"0.0": 0, "1.0": 1}


def _read_labels(path: Path) -> pd.DataFrame:
    """A table of labels: ``filename`` in one form, of which each is there once, and ``label``."""
    labels = _rename(read_table(path, "filename"), path)
    if "label" not in labels:
        raise ManifestError("has no column 'label' or 'stalled'", where=path)
    labels["filename"] = labels["filename"].str.strip().map(_one_form)
    _check_unique(labels["filename"], path)
    return labels


def _labels_for(names: pd.Series, labels: pd.DataFrame) -> pd.Series:
    """The label of each name, as text; NaN where there is none."""
    return names.str.strip().map(_one_form).map(labels.set_index("filename")["label"])


def _join_labels(
    table: pd.DataFrame, labels: pd.DataFrame, labels_path: Path, path: Path
) -> pd.DataFrame:
    label = _labels_for(table["filename"], labels)
    missing = table["filename"][label.isna()]
    if len(missing):
        name = missing.iloc[0]
        near = [other for other in labels["filename"] if _stem(other) == _stem(name)]
        raise ManifestError(
            f"has no label for '{name}' ({len(missing)} such rows)",
            where=labels_path,
            fix=f"It has one for '{near[0]}': write names alike in both tables."
            if near
            else f"Add them, or take them out of {path}.",
        )
    # Here, where the file and its line are known.
    used = labels[labels["filename"].isin(table["filename"].map(_one_form))]
    _parse(used["label"], _LABELS, "label", used, labels_path)
    return table.assign(label=label)


def _stem(name: str) -> str:
    """What is left of a name without its case and suffix."""
    return str(PurePosixPath(_one_form(name)).with_suffix("")).casefold()


def _rename(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Columns by the names that this program has for them, whatever their case in the file."""
    known = {name: name for name in (*REQUIRED, *OPTIONAL, *UNUSED)} | ALIASES
    names = [known.get(str(column).lower(), str(column)) for column in table.columns]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ManifestError(f"has two columns for '{twice}'", where=path)
    return table.set_axis(names, axis=1)


def _known_columns(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The columns that are used. Others are told, and refused if they are close to one that is not
    there, as by a slip of the hand."""
    table = _rename(table, path)
    used = (*REQUIRED, *OPTIONAL)
    absent = [name for name in (*used, *ALIASES) if ALIASES.get(name, name) not in table]
    others = [str(name) for name in table.columns if name not in (*used, *UNUSED)]
    for column in others:
        # Letters that are left out, doubled or swapped; "height" and "site" are no such slips.
        near = [
            name
            for name in difflib.get_close_matches(column.lower(), absent, n=1, cutoff=0.75)
            if name[0] == column[0].lower()
        ]
        if near:
            raise ManifestError(
                f"unknown column '{column}'",
                where=path,
                fix=f"Did you mean '{near[0]}'? Give it that name, or a very different one.",
            )
    if others:
        log.warning(
            "%s: these columns are not used: %s (used are %s)",
            path,
            ", ".join(others),
            ", ".join(used),
        )
    return table[[name for name in table.columns if name in used]].copy()


def _check_filenames(names: pd.Series, path: Path, allow_local: bool) -> None:
    # As Windows writes it, a path may also lead away by backslashes or a drive.
    away = names.str.contains(r"^(?:[\\/]|[A-Za-z]:[\\/])|(?:^|[\\/])\.\.(?:[\\/]|$)", regex=True)
    if away.any() and not allow_local:
        raise ManifestError(
            f"'{names[away].iloc[0]}' (line {names.index[away][0]}) may lead out of the source "
            f"folder ({away.sum()} such rows)",
            where=path,
            fix="Name files by their path inside --source, or allow this with --allow-local.",
        )
    if names.str.contains("\0", regex=False).any():
        raise ManifestError("a filename holds a byte 0", where=path)
    _check_unique(names.map(_one_form), path)


def _one_form(name: str) -> str:
    """Equal for './a.mp4', 'a.mp4' and other spellings that lead to one file, as a clip in train
    and in test would."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/")
    return str(PurePosixPath(name)) if "/" in name else name


def _check_unique(names: pd.Series, path: Path) -> None:
    """Every row has a filename, and no two rows have the same one."""
    if (names == "").any():
        line = names.index[names == ""][0]
        raise ManifestError(f"line {line} has no filename", where=path)
    if names.duplicated().any():
        name = names[names.duplicated()].iloc[0]
        lines = names.index[(names == name).to_numpy()][:2]
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
        blank = name == "label" and not column.iloc[row].strip()
        raise ManifestError(
            f"{name} of '{table['filename'].iloc[row]}' is '{column.iloc[row]}', not {allowed} "
            f"(line {table.index[row]}, {bad.sum()} such rows)",
            where=path,
            fix="Fill it, or leave the row out; --unlabelled takes all clips without labels."
            if blank
            else "true, false, yes and no are read too.",
        )
    return parsed.astype("int8" if name == "label" else "bool")


def _texts(table: pd.DataFrame, name: str) -> pd.Series:
    texts = pd.Series(table.get(name, ""), index=table.index, dtype=str)
    # A table has few different ones.
    return texts.map({text: plain_text(text) for text in texts.unique()})


def check_text(name: str, where: Path) -> None:
    """Raise ManifestError for a file's name that is no UTF-8, as the table must be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ManifestError(
            f"the name of a file is no UTF-8: {name}",
            where=where,
            fix="Give the file another name.",
        ) from None


#: What pandas and others write where there is no value, though it may be a name.
_NO_VALUE = {"nan", "none", "null", "n/a", "<na>"}


def _groups(table: pd.DataFrame) -> pd.Series:
    """The column of groups: what looks the same is one group. What may be a slip is told."""
    given = pd.Series(table.get("group", ""), index=table.index, dtype=str)
    names = {text: plain_group(text) for text in given.unique()}
    seen: dict[str, str] = {}
    for name in names.values():
        if name.casefold() in _NO_VALUE:
            log.warning(
                "group '%s' is taken for a name: clips without a group have an empty field", name
            )
    for name in names.values():
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            log.warning("groups '%s' and '%s' differ in case, and are taken for two", other, name)
            break
    return given.map(names)


def plain_group(text: str) -> str:
    """``text`` as it looks: compatible characters are one (NFKC), characters that cannot be seen
    are left out, and blanks in a row are one."""
    seen = "".join(
        letter
        for letter in unicodedata.normalize("NFKC", text)
        if unicodedata.category(letter) != "Cf"
    )
    return " ".join(seen.split())


def plain_text(text: str) -> str:
    """Without blanks around it, in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", text).strip()


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
            fix="Write it with a point, as 2.5." if "," in text.iloc[row] else None,
        )
    return numbers.astype("float64")


def _digest(table: pd.DataFrame) -> str:
    """SHA-256 of the table as a CSV file, which is never in memory as a whole."""
    digest = hashlib.sha256()
    for first in range(0, len(table), ROWS):
        part = table.iloc[first : first + ROWS]
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
