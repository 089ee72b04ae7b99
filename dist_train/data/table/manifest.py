"""The clip table: file names, labels, groups, splits, weights and metadata.

Two forms are read: the CSV files of the Clog Loss challenge (``train_metadata.csv`` joined with
``train_labels.csv``), and any CSV file with ``filename,label`` and optional
``group,weight,split,url``. Further columns are kept as metadata.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from dist_train.data.table.csv_table import read_table
from dist_train.data.table.labels import Naming, are_values, plain_text, read_labels
from dist_train.data.table.numbers import parse_numbers
from dist_train.data.table.row_filter import select_rows
from dist_train.data.types import CLASSES, METADATA, SAFE_KEY, metadata_columns
from dist_train.errors import ManifestError

log = logging.getLogger(__name__)

# Other names of columns.
ALIASES = {
    "filename": ("file", "path", "file name", "file_name", "filepath", "file_path"),
    "label": ("stalled",),
    "group": ("project_id",),
}
# Optional columns, and the text that stands for a missing one.
DEFAULTS = {"group": "", "weight": "1", "split": "", "crowd_score": "nan", "tier1": "true"}
USED = ("filename", "label", *DEFAULTS, "url")
FILE_NAMES = ("filename", *ALIASES["filename"])
# Columns of the challenge that a store does not need.
UNUSED = ("num_frames", "micro", "nano")
SPLITS = ("train", "val", "test")
_SPLITS = {name: name for name in SPLITS} | {
    "training": "train", "valid": "val", "validation": "val", "testing": "test",
}  # fmt: skip
# --where compares these as strings, whatever they hold: group "007" is not group 7.
_STRINGS = ("filename", "group", "project_id", "split", "url")
_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
# Most characters of a row's metadata: a record is read whole, and must stay small.
MOST_METADATA = 20_000


@dataclass(frozen=True)
class Manifest:
    """A checked clip table.

    Attributes:
        table: one row a clip, in the file's order. Columns: ``key`` (unique, and safe as a name in
            a tar archive), ``filename``, ``label`` (int16; -1 if unknown), ``group`` ("" if none),
            ``weight`` (float64), ``split`` ("train", "val", "test", or "" in every row),
            ``crowd_score`` (float64, NaN if none), ``tier1`` (bool), and the metadata: text, ""
            if missing, in columns named ``METADATA`` + the name in the file.
        urls: the column ``url`` as written, row by row with ``table``; None if there is none.
        lines: the line of each row in the file.
        classes: names of the labels 0, 1 and further ones.
    """

    table: pd.DataFrame
    urls: pd.Series | None
    lines: np.ndarray
    classes: Mapping[int, str] = field(default_factory=lambda: {0: CLASSES[0], 1: CLASSES[1]})

    def line(self, row: int) -> str:
        """Name of a row, counted from 0, for messages."""
        return f"line {self.lines[row]}"

    def urls_by_name(self) -> dict[str, str]:
        """The URL of each ``filename``.

        Raises:
            ManifestError: a row has no URL, or two rows have the same.
        """
        if self.urls is None:
            raise ManifestError(
                "the clip table has no column 'url'", fix="Say where the files are with --source."
            )
        urls = self.urls.str.strip()
        table = self.table.assign(url=urls).set_axis(self.lines)
        fix = "Correct it, or say where the files are with --source."
        valid = urls.str.contains("://", regex=False)
        _check_values(table, "url", valid, "of the form s3://bucket/name", fix=fix)
        # One file may have several clips, by FILE::ARRAY.
        clips = urls + "::" + self.table["filename"].str.partition("::")[2].to_numpy()
        if clips.duplicated().any():
            row = int(clips.duplicated().argmax())
            first = int((clips == clips.iloc[row]).argmax())
            raise ManifestError(
                f"{self.line(first)} and {self.line(row)} of the clip table have the same url, "
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
    columns: Mapping[str, str] | None = None,
    naming: Naming | None = None,
) -> Manifest:
    """Read and check a clip table.

    Args:
        path: the CSV file, with a column ``filename``.
        labels: a second CSV file with ``filename`` and ``label`` or ``stalled``, for a table
            without labels. None: the ``train_labels.csv`` beside ``path``.
        unlabelled: read no labels (clips to predict); every label is then -1.
        where: a condition over the file's columns that chooses rows; see ``select_rows``.
        allow_local: allow file names outside the source folder (absolute, or with '..').
        columns: the file's names of ``filename``, ``label`` and ``group``, where they are others.
            That of ``label`` is of the file with the labels.
        naming: which labels are positive, and what they are called.

    Raises:
        ManifestError: it names the file, and the column or the row.
    """
    if unlabelled and (labels is not None or naming is not None):
        option = "--positive or --label-names" if labels is None else "--labels"
        raise ManifestError(f"{option} and --unlabelled contradict each other", where=path)
    columns = dict(columns or {})
    own = {role: name for role, name in columns.items() if role != "label" or labels is None}
    in_file = read_table(path, _file_names(own))
    table = _renamed(in_file, path, own)
    has_labels = "label" in table
    if labels is not None and has_labels:
        raise ManifestError(
            "has labels of its own",
            where=path,
            fix=f"Remove the column, or leave out --labels {labels}.",
        )
    if unlabelled and has_labels and are_values(table["label"]):
        # As metadata, which training can take as values: ``target.columns``.
        names = [own["label"].casefold()] if "label" in own else ["label", *ALIASES["label"]]
        name = next(str(name) for name in in_file if str(name).casefold() in names)
        table = table.rename(columns={"label": f"{METADATA}{name}"})
    elif unlabelled and has_labels:
        log.warning("%s: its labels are ignored (--unlabelled)", path)
    labels_path = labels or path.with_name("train_labels.csv")
    separate = None
    if not has_labels and not unlabelled and (labels is not None or labels_path.is_file()):
        separate = _read_labels(labels_path, columns if labels else {})
    if where is not None:
        # A column can be named as in the file, or as in this program.
        known = table.drop(columns=metadata_columns(table))
        others = in_file.drop(columns=known.columns, errors="ignore")
        named = pd.concat([known, others], axis=1)
        if separate is not None:
            label = _labels_for(table["filename"], separate).fillna("")
            named = named.assign(label=label, stalled=label)
        table = table.loc[select_rows(named, where, _STRINGS).index]
    table["filename"] = table["filename"].str.strip()
    if table.empty:
        raise ManifestError("has no rows", where=path, fix="It needs one row a clip.")
    _check_filenames(table["filename"], path, allow_local)
    if separate is not None:
        table = _join_labels(table, separate, labels_path, path, naming or Naming())
    elif not has_labels and not unlabelled:
        raise ManifestError(
            "has no 'label' or 'stalled' column, and there is no train_labels.csv beside it",
            where=path,
            fix="Add the column, name another one by --label-column, or name the file with "
            "--labels. --unlabelled takes clips without labels.",
        )
    elif not unlabelled and (table["label"].str.strip() == "").all():
        raise ManifestError(
            "has no label in any row", where=path, fix="Fill the column, or use --unlabelled."
        )
    table = _with_checked_metadata(table, path)
    return make_manifest(table, path, unlabelled=unlabelled, naming=naming)


def make_manifest(
    table: pd.DataFrame, path: Path, *, unlabelled: bool = False, naming: Naming | None = None
) -> Manifest:
    """Check a table of strings and give its columns their types.

    Args:
        table: ``filename``, ``label``, optional columns and metadata, as in ``Manifest.table``. The
            index holds the line of each row.
        path: the file or folder that messages name.

    Raises:
        ManifestError: it names the column and the row.
    """
    if not unlabelled and len(table) > 1 and table["label"].nunique() == 1:
        # As in a form for submissions, which holds placeholders.
        log.warning(
            "%s: all %d labels are %s. If they are placeholders, prepare it with --unlabelled: "
            "'dist-train predict' predicts the labels",
            path, len(table), table["label"].iloc[0],
        )  # fmt: skip
    table = table.assign(**{name: text for name, text in DEFAULTS.items() if name not in table})
    label: pd.Series | int = -1
    classes = {0: CLASSES[0], 1: CLASSES[1]}
    metadata = metadata_columns(table)
    if not unlabelled:
        naming = naming or Naming()
        _check_labels(table, naming, path)
        read = read_labels(table["label"], naming, path)
        label, classes = read.values, read.classes
        if read.called is not None and f"{METADATA}class" not in table:
            table = table.assign(**{f"{METADATA}class": read.called})
            metadata.append(f"{METADATA}class")
    clean = pd.DataFrame(
        {
            "key": _keys(table["filename"]),
            "filename": table["filename"],
            "label": pd.Series(label, table.index, dtype="int16"),
            "group": _groups(table["group"]),
            "weight": _numbers(table, "weight", path),
            "split": _splits(table, path),
            "crowd_score": _numbers(table, "crowd_score", path),
            "tier1": _tier1(table, path),
            **{name: table[name] for name in metadata},
        }
    )
    usable = np.isfinite(clean["weight"]) & (clean["weight"] >= 0)
    _check_values(table, "weight", usable, "a finite number of 0 or more", path)
    clean = clean.reset_index(drop=True)
    urls = table["url"].reset_index(drop=True) if "url" in table else None
    return Manifest(clean, urls, table.index.to_numpy(), classes)


def _file_names(columns: Mapping[str, str]) -> tuple[str, ...]:
    return (columns["filename"].casefold(),) if "filename" in columns else FILE_NAMES


def _read_labels(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """A table of labels: ``filename`` in one spelling, each name once, and ``label``."""
    columns = {role: name for role, name in columns.items() if role == "label"}
    labels = _renamed(read_table(path, FILE_NAMES), path, columns)
    if "label" not in labels:
        raise ManifestError(
            "has no column 'label' or 'stalled'", where=path, fix="Name another by --label-column."
        )
    labels["filename"] = labels["filename"].str.strip().map(_one_spelling)
    _check_unique(labels["filename"], path)
    return labels


def _labels_for(names: pd.Series, labels: pd.DataFrame) -> pd.Series:
    """The label of each name, as a string; NaN if there is none."""
    return names.str.strip().map(_one_spelling).map(labels.set_index("filename")["label"])


def _join_labels(
    table: pd.DataFrame, labels: pd.DataFrame, labels_path: Path, path: Path, naming: Naming
) -> pd.DataFrame:
    label = _labels_for(table["filename"], labels)
    missing = table["filename"][label.isna()]
    if len(missing):
        raise ManifestError(
            f"has no label for '{missing.iloc[0]}' ({len(missing)} such rows)",
            where=labels_path,
            fix=f"Add them, with the same names as in {path}, or remove the rows there.",
        )
    # Bad labels are refused here, where their file and line are known.
    used = labels[labels["filename"].isin(table["filename"].map(_one_spelling))]
    _check_labels(used, naming, labels_path)
    return table.assign(label=label)


def _renamed(table: pd.DataFrame, path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """The columns that are used, by this program's names; others as metadata.

    Raises:
        ManifestError: two columns have one use or name, or a column of ``columns`` is not there, or
            has probably been misspelled.
    """
    names = [str(name) for name in table.columns]
    lower = [name.casefold() for name in names]
    use: dict[int, str] = {}
    for role in USED:
        asked = columns.get(role)
        wanted = [asked.casefold()] if asked else [role, *ALIASES.get(role, ())]
        found = [i for i, name in enumerate(lower) if name in wanted]
        if role == "filename" and not asked and role in lower:
            found = [i for i in found if lower[i] == role]
        if asked and not found:
            near = difflib.get_close_matches(asked, names, n=1)
            raise ManifestError(
                f"has no column '{asked}' (--{role.removesuffix('name')}-column)",
                where=path,
                fix=f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(names)}.",
            )
        if len(found) > 1:
            raise ManifestError(
                f"has two columns for '{role}' ({', '.join(names[i] for i in found)})",
                where=path,
                fix="Rename one of them, or say which is meant (--file-column, --label-column).",
            )
        use |= dict.fromkeys(found, role)
    others = [name for i, name in enumerate(names) if i not in use]
    _check_others(others, set(use.values()), path)
    kept = {
        i: use.get(i, f"{METADATA}{name}")
        for i, name in enumerate(names)
        if i in use or lower[i] not in UNUSED
    }
    return table.iloc[:, list(kept)].set_axis(list(kept.values()), axis=1)


def _check_others(others: list[str], used: set[str], path: Path) -> None:
    """Refuse a column that has another's name, or probably a misspelled name of an absent one."""
    absent = [role for role in USED if role not in used]
    absent += [alias for role in absent if role != "filename" for alias in ALIASES.get(role, ())]
    for column in others:
        if others.count(column) > 1:
            raise ManifestError(
                f"has two columns '{column}'", where=path, fix="Rename or remove one of them."
            )
        if column.casefold() in UNUSED:
            continue
        near = difflib.get_close_matches(column.lower(), absent, n=1, cutoff=0.75)
        # The first letter is seldom wrong, and tells "site" from "tier1" or "height" from "weight".
        if near and near[0][0] == column[0].lower():
            raise ManifestError(
                f"unknown column '{column}'",
                where=path,
                fix=f"Did you mean '{near[0]}'? Give it that name, or a very different one.",
            )


def _with_checked_metadata(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table with each value of metadata on one line, and without empty columns of it.

    Raises:
        ManifestError: a row has more than a record can hold.
    """
    others = table.drop(columns=metadata_columns(table))
    metadata = table[metadata_columns(table)].map(plain_text)
    metadata = metadata.loc[:, (metadata != "").any()]
    if metadata.columns.empty:
        return others
    names = [str(name).removeprefix(METADATA) for name in metadata]
    length = metadata.map(len).sum(axis=1) + sum(map(len, names))
    if length.max() > MOST_METADATA:
        raise ManifestError(
            f"line {length.idxmax()} has {length.max()} characters in columns without a use "
            f"({', '.join(names[:10])}), more than {MOST_METADATA}",
            where=path,
            fix="Remove the longest of these columns.",
        )
    log.warning(
        "%s: these columns are kept as metadata: %s (used are %s)",
        path, ", ".join(names), ", ".join(USED),
    )  # fmt: skip
    return pd.concat([others, metadata], axis=1)


def _check_filenames(names: pd.Series, path: Path, allow_local: bool) -> None:
    # A Windows path may also lead outside by backslashes or a drive.
    outside = names.str.contains(
        r"^(?:[\\/]|[A-Za-z]:[\\/])|(?:^|[\\/])\.\.(?:[\\/]|$)", regex=True
    )
    if outside.any() and not allow_local:
        raise ManifestError(
            f"'{names[outside].iloc[0]}' (line {names.index[outside][0]}) may lead out of the "
            f"source folder ({outside.sum()} such rows)",
            where=path,
            fix="Name files by their path inside --source, or allow this with --allow-local.",
        )
    if names.str.contains("\0", regex=False).any():
        raise ManifestError("a filename holds a byte 0", where=path)
    _check_unique(names.map(_one_spelling), path)


def _one_spelling(name: str) -> str:
    """The same text for './a.mp4', 'a.mp4' and other names of one file.

    A file that is listed twice could be in train and in test.
    """
    name = unicodedata.normalize("NFC", name).replace("\\", "/")
    return str(PurePosixPath(name)) if "/" in name else name


def _check_unique(names: pd.Series, path: Path) -> None:
    if (names == "").any():
        raise ManifestError(f"line {names.index[names == ''][0]} has no filename", where=path)
    if names.duplicated().any():
        name = names[names.duplicated()].iloc[0]
        first, second = names.index[names == name][:2]
        raise ManifestError(
            f"'{name}' is listed twice (lines {first} and {second})",
            where=path,
            fix="Each clip may be listed once.",
        )


def _splits(table: pd.DataFrame, path: Path) -> pd.Series:
    text = table["split"].str.strip().str.lower()
    splits = text.map({"": ""} if (text == "").all() else _SPLITS)
    fix = "Fill the split column for every clip, or leave it out."
    _check_values(table, "split", splits.notna(), "train, val or test", path, fix)
    return splits


def _check_labels(table: pd.DataFrame, naming: Naming, path: Path) -> None:
    texts = table["label"].unique()
    expected, fix = "the name of a class", "Fill it, or leave the row out by --where."
    if len(texts) > 2 and are_values(table["label"]) and not naming.is_of_many(texts):
        expected = "a class"
        fix = (
            "Classes are whole numbers from 0, or names. For regression prepare it with "
            "--unlabelled: the store keeps the column as metadata, and training takes it by "
            "target.kind=regression and target.columns."
        )
    elif not (naming.positive or naming.is_of_many(texts)):
        there = sorted({plain_text(text) for text in table["label"].unique()} - {""})[:10]
        expected = "0 or 1"
        fix = (
            "Write it so, or as true, false, yes or no. If labels are names, --positive NAME says "
            f"which are positive (there are: {', '.join(there)}). --where 'label >= 0' leaves out "
            "rows without a label; --unlabelled takes all clips without labels."
        )
    valid = table["label"].isin(naming.labels_among(texts))
    _check_values(table, "label", valid, expected, path, fix)


def _tier1(table: pd.DataFrame, path: Path) -> pd.Series:
    tier1 = table["tier1"].str.strip().str.lower().map(_BOOLEANS)
    _check_values(table, "tier1", tier1.notna(), "true or false", path)
    return tier1.astype(bool)


def _numbers(table: pd.DataFrame, name: str, path: Path) -> pd.Series:
    text = table[name].str.strip().replace("", DEFAULTS[name])
    numbers = parse_numbers(text)
    valid = numbers.notna() | (text.str.lower() == "nan")
    fix = "Write it with a point, as in 2.5, and without a sign between thousands."
    _check_values(table, name, valid, "a number", path, fix)
    return numbers


def _check_values(
    table: pd.DataFrame,
    column: str,
    valid: pd.Series,
    expected: str,
    path: Path | None = None,
    fix: str | None = None,
) -> None:
    """Raise ManifestError for the first row that is not ``valid`` (bool, one a row)."""
    if not valid.all():
        row = int((~valid).argmax())
        raise ManifestError(
            f"{column} of '{table['filename'].iloc[row]}' is '{table[column].iloc[row]}', not "
            f"{expected} (line {table.index[row]}, {(~valid).sum()} such rows)",
            where=path,
            fix=fix,
        )


def _groups(groups: pd.Series) -> pd.Series:
    """The groups, where names that look the same are one. Warns of names that differ in case."""
    names = {text: plain_group(text) for text in groups.unique()}
    # A program that read numbers as decimal ones writes 12.0 for 12.
    whole = {name: re.sub(r"^(\d+)\.0+$", r"\1", name) for name in names.values()}
    if all(name.isdecimal() for name in whole.values() if name):
        both = next((n for n, plain in whole.items() if n != plain and plain in whole), None)
        if both is not None:
            log.warning("groups '%s' and '%s' are read as one group", both, whole[both])
            names = {text: whole[name] for text, name in names.items()}
    seen: dict[str, str] = {}
    for name in names.values():
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            log.warning("groups '%s' and '%s' differ in case, and are two groups", other, name)
            break
    return groups.map(names)


def plain_group(text: str) -> str:
    """A group's name in one form, for all names that look the same.

    Compatible characters become one (NFKC), invisible ones are removed, and so are extra blanks.
    """
    letters = unicodedata.normalize("NFKC", text)
    visible = "".join(letter for letter in letters if unicodedata.category(letter) != "Cf")
    return " ".join(visible.split())


def check_text(name: str, where: Path) -> None:
    """Raise ManifestError if a file's name is not UTF-8, which the table must be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ManifestError(
            f"the name of a file is not UTF-8: {name}",
            where=where,
            fix="Give the file another name.",
        ) from None


def _keys(names: Iterable[str]) -> list[str]:
    """The stem of each name if it is safe and unique; otherwise a safe form with a hash.

    WebDataset ends a key at the first dot, and a key must not lead out of the folder that a reader
    unpacks a shard into.
    """
    stems = [PurePosixPath(name).stem for name in names]
    counts = Counter(stems)
    return [
        stem
        if SAFE_KEY.fullmatch(stem) and counts[stem] == 1
        else re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:78]
        + "-"
        + hashlib.sha256(name.encode()).hexdigest()[:16]
        for name, stem in zip(names, stems, strict=True)
    ]
