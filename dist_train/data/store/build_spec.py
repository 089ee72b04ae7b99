"""What a store's folder is for, which clips go to which shard, and who may write them.

``job.json`` and then ``manifest.csv`` are written before the first shard. They hold all that the
bytes of the store depend on, beside the raw files.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.reader import (
    INDEX,
    MANIFEST,
    MARKER,
    REJECTED,
    SHARDS,
    Digest,
    read_marker,
)
from dist_train.data.store.shards import SHARD_FILE, Shard
from dist_train.data.types import Record
from dist_train.errors import ConfigError, FileError, StoreError
from dist_train.files import aside_for, is_plain, open_lock, read_json, read_plain, write_whole
from dist_train.system.file_locks import go_on_unlocked
from dist_train.system.main_guard import end_if_run_again

JOB = "job.json"
LOCK = ".lock"
# Bytes of the files that are read whole.
MOST_JOB, MOST_MANIFEST, MOST_REJECTS = 1 << 20, 1 << 36, 1 << 30
# Begins the name of a folder beside the shards, in which they are mended.
SCRATCH = ".repair-"
_SCRATCH_FOLDER = re.compile(rf"{re.escape(SCRATCH)}[0-9a-f]{{16}}")
# Begins the reason of a reject that was a clip once. The checksum of its pixels follows, if known.
LOST = "lost: it was damaged in the store, and its raw file was not at hand"
_PART_LOCK = re.compile(rf"{re.escape(LOCK)}-(claim|[0-9]+-of-(?P<count>[0-9]+))")

_TYPES: dict[str, type[str] | type[bool] | str] = {
    "key": str,
    "filename": str,
    "label": "int8",
    "group": str,
    "weight": "float64",
    "split": str,
    "crowd_score": "float64",
    "tier1": bool,
}


@dataclass(frozen=True)
class Job:
    """``table`` is the manifest's; ``made_from`` all that the bytes depend on, as JSON."""

    table: pd.DataFrame
    made_from: dict[str, Any]

    @classmethod
    def of(cls, table: pd.DataFrame, **made_from: Any) -> Job:
        digest = hashlib.sha256(_to_csv(table).encode()).hexdigest()
        # Through JSON, in which a tuple is a list: as it will be read back.
        return cls(table, json.loads(json.dumps({"manifest": digest} | made_from)))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()

    def shards(self, out: Path) -> list[Shard]:
        """All shards in ``out``."""
        size = self.made_from["settings"]["shard_clips"]
        return [Shard(number, out / SHARDS) for number in range(-(-len(self.table) // size))]

    def rows(self, shard: Shard) -> list[Record]:
        """The shard's rows of the manifest: number k has rows k * n to (k + 1) * n.

        Made when they are asked for: as Python objects, the rows of a large set fill gigabytes.
        """
        part = self.table.iloc[self._span(shard)]
        return [
            {str(name): value for name, value in row.items()} for row in part.to_dict("records")
        ]

    def filenames(self, shard: Shard) -> list[str]:
        """The raw files of the shard's rows."""
        return list(self.table["filename"].iloc[self._span(shard)])

    def clips(self, shard: Shard) -> int:
        """How many rows it has."""
        return len(range(len(self.table))[self._span(shard)])

    def _span(self, shard: Shard) -> slice:
        size = self.made_from["settings"]["shard_clips"]
        return slice(shard.number * size, (shard.number + 1) * size)


def read_job(out: Path) -> Job:
    """What the store in ``out`` is made from.

    Raises:
        StoreError: there is no store, or what tells of it is lost or damaged.
    """
    if not (out / SHARDS).is_dir():
        raise StoreError(
            "there is no store here",
            where=out,
            fix="Make one with 'dist-train prepare', or check the path.",
        )
    made_from = _read_made_from(out / JOB)
    path = out / MANIFEST
    try:
        text = read_plain(path, most_bytes=MOST_MANIFEST)
    except FileError as error:
        raise _lost(path, error.what) from None
    if hashlib.sha256(text).hexdigest() != made_from["manifest"]:
        raise _lost(path, "is not the table that the store was made from")
    try:
        return Job(_read_table(text), made_from)
    except (ValueError, OverflowError) as error:
        raise _lost(path, f"is no clip table ({error})") from None


def _read_table(text: bytes) -> pd.DataFrame:
    table = pd.read_csv(
        io.BytesIO(text),
        dtype=_TYPES,
        keep_default_na=False,
        na_values={"crowd_score": [""]},
        float_precision="round_trip",
        # A name may hold a carriage return.
        lineterminator="\n",
    )
    if table.columns.tolist() != list(_TYPES):
        raise ValueError(f"its columns are not {', '.join(_TYPES)}")
    return table


def settings_before(out: Path) -> dict[str, Any] | None:
    """The settings that the store in ``out`` is being made with; None where nothing tells of it."""
    try:
        settings: dict[str, Any] = _read_made_from(out / JOB)["settings"]
    except StoreError:
        # ``writing`` refuses a folder that holds something else.
        return None
    return settings


def read_rejects(shard: Shard) -> pd.DataFrame:
    """The files of a shard that gave no clip: columns ``file``, ``reason``, ``class``, all text.

    Raises:
        StoreError: the list is missing or damaged.
    """
    try:
        return read_reject_list(shard.rejects_path)
    except FileError as error:
        raise StoreError(
            f"the list of rejects {error.what}",
            where=shard.rejects_path,
            fix="Run 'dist-train verify' with --repair.",
        ) from None


def lost_of(shard: Shard) -> list[str]:
    """Rejects of a shard that were clips once; none where the list cannot be read."""
    try:
        rejects = read_rejects(shard)
    except StoreError:
        return []
    names: list[str] = rejects["file"][rejects["reason"].str.startswith(LOST)].tolist()
    return names


def read_reject_list(path: Path) -> pd.DataFrame:
    """A list of rejects, of a shard or of all: columns ``file``, ``reason``, ``class``, all text.

    Raises:
        FileError: it is missing or damaged.
    """
    content = read_plain(path, most_bytes=MOST_REJECTS)
    try:
        rows = list(csv.reader(io.StringIO(content.decode(), newline=""), strict=True))
        if not rows or rows[0] != ["file", "reason", "class"]:
            raise ValueError("its columns are not file, reason, class")
        if any(len(row) != 3 or row[2] not in ("-1", "0", "1") for row in rows[1:]):
            raise ValueError("a row is not a file, a reason and a class")
    except (ValueError, csv.Error) as error:
        raise FileError(f"cannot be read ({error})", where=path) from None
    return pd.DataFrame(rows[1:], columns=rows[0], dtype=str)


def _read_made_from(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, most_bytes=MOST_JOB)
    except FileError as error:
        raise _lost(path, error.what) from None
    fingerprint = content.pop("fingerprint", None) if isinstance(content, dict) else None
    if fingerprint is None or Job(pd.DataFrame(), content).fingerprint != fingerprint:
        raise _lost(path, "its fingerprint is not that of its content")
    try:
        _MadeFrom.model_validate(content)
        # As JSON, in which a tuple is a list.
        _SETTINGS.validate_json(json.dumps(content["settings"]), strict=True)
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"]))
        raise _lost(path, f"its '{name}' is not of this form") from None
    made_from: dict[str, Any] = content
    return made_from


class _Bounds(BaseModel):
    """Of settings that are computed with."""

    model_config = ConfigDict(extra="allow")

    shard_clips: Annotated[int, Field(ge=1, lt=1 << 31)]
    clip_seconds: Annotated[float, Field(gt=0)]
    clip_memory: Annotated[int, Field(ge=1, lt=1 << 31)]


class _MadeFrom(BaseModel):
    """The entries of ``job.json``, without those that a later version may add."""

    model_config = ConfigDict(strict=True, extra="allow")

    manifest: Digest
    pixels_version: int
    settings: dict[str, Any]
    npz: Digest | None = None

    @field_validator("settings")
    @classmethod
    def _check_bounds(cls, settings: dict[str, Any]) -> dict[str, Any]:
        _Bounds.model_validate(settings)
        return settings


_SETTINGS = TypeAdapter(PrepareSettings)


def _lost(path: Path, what: str) -> StoreError:
    return StoreError(
        what,
        where=path,
        fix="Delete it if it is there, and run 'dist-train prepare' again with the same settings: "
        "finished shards are kept.",
    )


def _to_csv(table: pd.DataFrame) -> str:
    text: str = table.to_csv(index=False, lineterminator="\n")
    return text


@dataclass(frozen=True)
class Part:
    """Number ``index`` (from 1) of ``count`` processes that write a store together."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "i/N".

        Raises:
            ConfigError: it is not of that form, or i is not one of 1 to N.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        part = cls(int(match[1]), int(match[2])) if match else None
        if part is None or not 1 <= part.index <= part.count:
            raise ConfigError(
                f"'{text}' is not a part", where="--part", fix="It is i/N with i from 1 to N."
            )
        return part

    def of(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        return shards[self.index - 1 :: self.count]


@contextmanager
def writing(out: Path, job: Job, part: Part | None = None) -> Iterator[None]:
    """Hold ``out`` for this job: all of it alone, or one part of it beside the other parts.

    The kernel drops the locks with their owner, however the owner ends.

    Raises:
        StoreError: another process writes the same, the folder is for another job, or it holds
            files and is no store.
    """
    end_if_run_again()
    _refuse_foreign(out, job)
    (out / SHARDS).mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        if part is None:
            locks.enter_context(_locked(out, LOCK, fcntl.LOCK_EX))
            _claim(out, job)
            # Left by parts, of which none is at work now, and by killed writers; at the end, by
            # nodes that were lost.
            _sweep(out)
            locks.callback(_sweep, out)
        else:
            locks.enter_context(_locked(out, LOCK, fcntl.LOCK_SH))
            own = f"{LOCK}-{part.index}-of-{part.count}"
            locks.enter_context(_locked(out, own, fcntl.LOCK_EX, f"part {part.index} of "))
            _refuse_other_cuts(out, part)
            with _locked(out, f"{LOCK}-claim", fcntl.LOCK_EX, wait=True):
                _claim(out, job)
        yield


def _refuse_foreign(out: Path, job: Job) -> None:
    """Raise StoreError where ``out`` has files and is not known to be this program's.

    A store is known by its ``job.json``; where that is lost, by the job's own manifest, or by a
    marker of the job's fingerprint. Nothing is written here, be it a lock.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise StoreError("is not a folder", where=out, fix="Choose another --out.")
    foreign = sorted(path.name for path in out.iterdir() if not _is_of_the_start(path))
    if not foreign or _is_store_of(out, job):
        return
    raise StoreError(
        f"the folder is not empty, and is no store ('{foreign[0]}' is in it)",
        where=out,
        fix="Choose a new or an empty folder for --out.",
    )


def _is_of_the_start(path: Path) -> bool:
    """Whether it is what a process leaves that ends before ``job.json`` is written."""
    if path.name == SHARDS:
        return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    # Links too: opening them as locks refuses them by a message of its own.
    return path.name == LOCK or bool(_PART_LOCK.fullmatch(path.name)) or aside_for(path) == JOB


def _is_store_of(out: Path, job: Job) -> bool:
    # It is there before anything else of a store, also where another part writes it now.
    try:
        _read_made_from(out / JOB)
    except StoreError:
        known = _is_known_without_job(out, job)
        if known and os.path.lexists(out / JOB):
            raise
        return known
    return True


def _is_known_without_job(out: Path, job: Job) -> bool:
    if is_plain(out / MANIFEST) and (out / MANIFEST).read_bytes() == _to_csv(job.table).encode():
        return True
    try:
        return bool(read_marker(out).get("fingerprint") == job.fingerprint)
    except StoreError:
        return False


def _sweep(out: Path) -> None:
    """Remove locks of parts, and what writers of the store's own files did not finish."""
    for path in out.iterdir():
        is_lock = _PART_LOCK.fullmatch(path.name) and is_plain(path)
        if is_lock or aside_for(path) in (JOB, MANIFEST, MARKER, INDEX, REJECTED):
            path.unlink(missing_ok=True)
    for path in (out / SHARDS).iterdir():
        if SHARD_FILE.fullmatch(aside_for(path) or ""):
            path.unlink(missing_ok=True)
        elif _SCRATCH_FOLDER.fullmatch(path.name):
            clear_scratch(path)


def clear_scratch(scratch: Path) -> None:
    """Remove a folder in which shards were mended; files in it that are no shard's stay."""
    if scratch.is_symlink() or not scratch.is_dir():
        return
    for path in scratch.iterdir():
        if SHARD_FILE.fullmatch(path.name) or SHARD_FILE.fullmatch(aside_for(path) or ""):
            path.unlink()
    with suppress(OSError):
        scratch.rmdir()


def _refuse_other_cuts(out: Path, part: Part) -> None:
    """Part 1 of 2 and part 1 of 3 share shards."""
    for other in out.iterdir():
        lock = _PART_LOCK.fullmatch(other.name)
        count = lock["count"] if lock else None
        if count and int(count) != part.count:
            with _locked(out, other.name, fcntl.LOCK_SH, f"a part (of {count}) of "):
                pass


@contextmanager
def _locked(
    out: Path, name: str, how: int, what: str = "", *, wait: bool = False
) -> Iterator[None]:
    with open_lock(out / name) as file:
        try:
            fcntl.flock(file, how if wait else how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another process is writing {what}this store",
                where=out,
                fix="Wait for it, or choose another --out.",
            ) from None
        except OSError as error:
            go_on_unlocked(out, error)
        yield


def _claim(out: Path, job: Job) -> None:
    """Note what the folder is for, or check that it is for this."""
    path = out / JOB
    if os.path.lexists(path):
        before = _read_made_from(path)
        if before != job.made_from:
            old, new = _flat(before), _flat(job.made_from)
            changed = sorted(
                name for name in old.keys() | new.keys() if old.get(name) != new.get(name)
            )
            raise StoreError(
                f"the store was made with other settings ({', '.join(changed)} changed)",
                where=out,
                fix="Use the same settings, or choose another --out.",
            )
    else:
        # First, as it is what the folder is known by.
        content = job.made_from | {"fingerprint": job.fingerprint}
        write_whole(path, json.dumps(content, indent=2, sort_keys=True))
    table = _to_csv(job.table).encode()
    if not is_plain(out / MANIFEST) or (out / MANIFEST).read_bytes() != table:
        write_whole(out / MANIFEST, table)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= inner if inner is not None else {prefix + name: value}
    return flat
