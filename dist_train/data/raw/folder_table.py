"""A clip table from the names of files: a folder for each class, or a pattern with named parts."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from dist_train.data.raw.clip import CONVERT, suffix_of
from dist_train.data.raw.formats import suffixes as format_suffixes
from dist_train.data.raw.formats.dicom import is_slice
from dist_train.data.raw.picture import LITTER, is_picture, lies_beside
from dist_train.data.raw.video import VIDEO_SUFFIXES
from dist_train.data.table.labels import Naming, plain_text, rename_classes
from dist_train.data.table.manifest import SPLITS, Manifest, check_text, make_manifest
from dist_train.errors import ConfigError, FileError, ManifestError
from dist_train.files import is_plain, write_whole

log = logging.getLogger(__name__)

# Folders with these suffixes are clips.
FOLDER_SUFFIXES = (".zarr",)
# Columns of the table with a meaning, in their order. All others are metadata.
_KNOWN = ("filename", "label", "group", "split")
# The most groups that ``FolderTable.lines`` names.
SHOWN = 10


@dataclass
class FolderTable:
    """The clips in a folder.

    Attributes:
        rows: of the clip table, as text, ordered by ``filename``, which is relative to the folder.
        skipped: paths that are no clips, by the reason.
        folders: how many rows are folders.
    """

    folder: Path
    rows: pd.DataFrame
    skipped: dict[str, list[str]] = field(default_factory=dict)
    folders: int = 0

    def lines(self) -> list[str]:
        """What was found, and what was left out, in words."""
        told = []
        for column in ("label", "split", "group"):
            if column in self.rows:
                counts = self.rows[column].value_counts()
                shown = [f"{name} ({clips})" for name, clips in counts.iloc[:SHOWN].items()]
                more = [f"{len(counts) - SHOWN} more"] if len(counts) > SHOWN else []
                told.append(f"{column}: {', '.join(shown + more)}")
        if self.folders:
            told.append(f"clips that are folders: {self.folders}")
        return told + self.left_out()

    def left_out(self) -> list[str]:
        return [
            f"left out: {len(paths)} {reason}, such as {min(paths)}"
            for reason, paths in self.skipped.items()
        ]


class Pattern:
    """Which files are clips, and what their names say: ``{group}/{label}_*.tif``.

    ``{name}`` is a part of the name without a slash, ``{name:a|b}`` one of these texts, ``*`` any
    text without a slash, ``**`` any text, and ``**/`` any folders or none. All else is literal.

    Raises:
        ConfigError: it is no pattern.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.names: list[str] = []
        parts = re.split(r"(\{[^{}/]*\}|\*\*/|\*\*|\*)", text.removeprefix("./"))
        source = "".join(map(self._regex, parts))
        if set("{}") & set("".join(parts[::2])):
            raise self._error("its braces do not match")
        self._lazy = re.compile(source.replace("\0", "?"), re.DOTALL)
        self._greedy = re.compile(source.replace("\0", ""), re.DOTALL)

    def _regex(self, part: str) -> str:
        # "\0" stands for what makes a part as short as can be.
        wild = {"**/": "(?:.*\0/)?\0", "**": ".*\0", "*": "[^/]*\0"}
        if part in wild:
            return wild[part]
        if not part.startswith("{"):
            return re.escape(part)
        name, _, choices = part[1:-1].partition(":")
        name = plain_text(name)
        if not name or name.casefold() == "filename":
            raise self._error(f"'{part}' names no column")
        if name in self.names:
            return f"(?P=p{self.names.index(name)})"
        self.names.append(name)
        body = "|".join(map(re.escape, choices.split("|"))) if choices else "[^/]+\0"
        return f"(?P<p{len(self.names) - 1}>{body})"

    def match(self, path: str) -> dict[str, str] | None:
        """The named parts of a path; None if it does not match.

        Raises:
            ManifestError: the path can be read in two ways.
        """
        lazy, greedy = self._lazy.fullmatch(path), self._greedy.fullmatch(path)
        if lazy is None or greedy is None:
            return None
        if lazy.groups() != greedy.groups():
            ways = (
                ", ".join(f"{n} '{v}'" for n, v in zip(self.names, way.groups(), strict=True))
                for way in (lazy, greedy)
            )
            raise ManifestError(
                f"'{path}' can be read in two ways ({'; or '.join(ways)})",
                where=f"--pattern {self.text}",
                fix="Make the pattern longer, or say what a part may be, as in "
                "{label:stalled|flowing}.",
            )
        return dict(zip(self.names, lazy.groups(), strict=True))

    def _error(self, what: str) -> ConfigError:
        return ConfigError(
            f"'{self.text}': {what}",
            where="--pattern",
            fix="Give it as {group}/{label}_*.tif; docs/tables.md says more.",
        )


def folder_table(
    folder: Path,
    *,
    pattern: str | None = None,
    suffixes: Sequence[str] = (),
    clip_folders: bool = False,
    names: Mapping[str, str] | None = None,
) -> FolderTable:
    """List the clips in a folder, ordered by name.

    Args:
        pattern: see ``Pattern``; None: the folder has one folder for each class, and the name of
            the outermost folder is the label.
        suffixes: further suffixes of files that are read, in lower case.
        clip_folders: a folder without folders, whose files are slices or pictures of one kind, is
            one clip.
        names: what a label is to be called.

    Raises:
        ConfigError: it is no pattern, or ``names`` are given and it has no label.
        ManifestError: the folder does not exist or has no clips; it has one folder for each split;
            one file has two labels; or a name fits the pattern in two ways or is not UTF-8.
        OSError: a folder cannot be listed.
    """
    if not folder.is_dir():
        raise ManifestError("is not a folder", where=folder)
    compiled = None if pattern is None else Pattern(pattern)
    if compiled is None:
        _refuse_split_folders(folder)
    elif names and "label" not in compiled.names:
        raise ConfigError(
            "the pattern has no {label}, which --label-names is to name",
            where=f"--pattern {pattern}",
            fix="Write {label} into it, or leave --label-names out.",
        )
    # Most PNG and WebP files are single pictures, not animations.
    endings = {*VIDEO_SUFFIXES, *format_suffixes()} - {".png", ".webp"}
    scan = _Scan(folder, (*sorted(endings), *suffixes), clip_folders)
    clips = dict(sorted(scan.clips()))
    rows = []
    for path in clips:
        check_text(path, folder)
        if compiled is not None:
            values = compiled.match(path)
            reason = "files that do not match the pattern"
        else:
            values = {"label": path.partition("/")[0]} if "/" in path else None
            reason = "files in no class folder"
        if values is None:
            scan.skip(path, reason)
        else:
            rows.append({"filename": path, **values})
    rows = _without_copies(folder, rows, scan)
    table = FolderTable(folder, pd.DataFrame(rows, dtype=str), scan.skipped)
    if not rows:
        raise ManifestError(
            "; ".join(["there are no clips", *table.left_out()]),
            where=folder,
            fix="It needs one folder for each class, or a --pattern that its files match.",
        )
    table.folders = sum(clips[row["filename"]] for row in rows)
    known = [name for name in _KNOWN if name in table.rows]
    table.rows = table.rows[[*known, *(name for name in table.rows if name not in _KNOWN)]]
    if names:
        table.rows["label"] = rename_classes(table.rows["label"], names, folder)
    return table


def write_table(found: FolderTable, path: Path) -> None:
    """Write the clip table as CSV.

    Raises:
        FileError: another file is there.
        OSError: it cannot be written.
    """
    text = found.rows.to_csv(index=False, lineterminator="\n")
    if os.path.lexists(path) and not (is_plain(path) and path.read_bytes() == text.encode()):
        raise FileError("is there already", where=path, fix="Remove it, or choose another --out.")
    write_whole(path, text)


def manifest_from_folders(folder: Path, naming: Naming, suffixes: Sequence[str] = ()) -> Manifest:
    """The clips in ``folder/CLASS/**``. What is left out is logged.

    Args:
        naming: the folders of positive clips. All other clips are negative.
        suffixes: further suffixes of files that are read, in lower case.

    Raises:
        ManifestError: as ``folder_table``; or a class is missing.
        OSError: a folder cannot be listed.
    """
    found = folder_table(folder, suffixes=suffixes)
    for line in found.left_out():
        log.warning("%s: %s", folder, line)
    table = found.rows.set_axis(range(1, len(found.rows) + 1))
    return make_manifest(table, folder, naming=replace(naming, is_complete=True))


class _Scan:
    """Walks a folder, and remembers what is no clip."""

    def __init__(self, folder: Path, suffixes: tuple[str, ...], clip_folders: bool) -> None:
        self.folder, self.suffixes, self.clip_folders = folder, suffixes, clip_folders
        self.skipped: dict[str, list[str]] = {}

    def skip(self, path: str, reason: str) -> None:
        self.skipped.setdefault(reason, []).append(path)

    def clips(self) -> Iterator[tuple[str, bool]]:
        """The relative path of each clip, and whether it is a folder."""
        for inner, folders, files in os.walk(self.folder, onerror=_raise):
            here = Path(inner).relative_to(self.folder)
            files = [name for name in files if self._is_seen(here, name)]
            folders[:] = [name for name in folders if self._is_seen(here, name)]
            if self._is_clip(here, folders, files):
                folders.clear()
                yield here.as_posix(), True
                continue
            for name in list(folders):
                path = (here / name).as_posix()
                if (self.folder / path).is_symlink():
                    # Links to folders may form circles. ``walk`` does not follow them.
                    self.skip(path, "links to folders")
                elif name.lower().endswith(FOLDER_SUFFIXES):
                    folders.remove(name)
                    yield path, True
            for name in files:
                path = (here / name).as_posix()
                if (reason := self._fault(path)) is None:
                    yield path, False
                else:
                    self.skip(path, reason)

    def _is_seen(self, here: Path, name: str) -> bool:
        if name.startswith("."):
            self.skip((here / name).as_posix(), "hidden files and folders")
            return False
        return name.lower() not in LITTER

    def _is_clip(self, here: Path, folders: list[str], files: list[str]) -> bool:
        # A folder of the outermost level is a class.
        if not self.clip_folders or folders or len(here.parts) < 2:
            return False
        files = [name for name in files if not lies_beside(name)]
        is_film = all(map(is_picture, files)) and len({suffix_of(name) for name in files}) == 1
        return is_film or (bool(files) and all(map(is_slice, files)))

    def _fault(self, path: str) -> str | None:
        """Why a file is no clip; None if it is one."""
        suffix = suffix_of(path)
        if not path.lower().endswith(self.suffixes):
            advice = f" ({CONVERT[suffix].rstrip('.')})" if suffix in CONVERT else ""
            if is_picture(path) and not self.clip_folders:
                advice = " (--clip-folders makes one clip of a folder of pictures)"
            return f"files of an unknown kind '{suffix}'{advice}"
        try:
            state = (self.folder / path).stat()
        except FileNotFoundError:
            return "links that lead nowhere"
        if not stat.S_ISREG(state.st_mode):
            return "that are no plain files"
        if path != path.strip() or len(path.splitlines()) > 1:
            return "files whose names begin or end with a blank, or hold a line break"
        return None if state.st_size else "empty files"


def _without_copies(folder: Path, rows: list[dict[str, str]], scan: _Scan) -> list[dict[str, str]]:
    """The rows, each file once: links give a file several names."""
    first: dict[tuple[int, int], dict[str, str]] = {}
    for row in rows:
        state = (folder / row["filename"]).stat()
        other = first.setdefault((state.st_dev, state.st_ino), row)
        if other is row:
            continue
        if other.get("label") != row.get("label"):
            raise ManifestError(
                f"'{other['filename']}' and '{row['filename']}' are one file, with the labels "
                f"'{other.get('label')}' and '{row.get('label')}'",
                where=folder,
                fix="Remove one of them.",
            )
        scan.skip(row["filename"], "links to files that are listed already")
    return list(first.values())


def _refuse_split_folders(folder: Path) -> None:
    """Refuse a folder of splits: their names would be the labels."""
    inside = [e.name.lower() for e in os.scandir(folder) if e.is_dir() and e.name[0] != "."]
    known = {*SPLITS, "valid", "validation", "training", "testing"}
    if inside and known.issuperset(inside):
        raise ManifestError(
            f"has one folder for each split ({', '.join(sorted(inside))}), not for each class",
            where=folder,
            fix="Use 'dist-train manifest --pattern {split}/{label}/**'.",
        )


def _raise(error: OSError) -> None:
    """Raise: a folder that cannot be listed may have clips."""
    raise error
