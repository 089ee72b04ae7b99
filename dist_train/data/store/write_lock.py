"""Who may write a store: locks, the claim of a folder, and removal of unfinished files."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pandas as pd

from dist_train.data.store.build_spec import JOB, Job, Part, read_made_from
from dist_train.data.store.clip_table import TABLE
from dist_train.data.store.reader import INDEX, MANIFEST, MARKER, REJECTED, SHARDS, read_marker
from dist_train.data.store.shards import SHARD_FILE
from dist_train.errors import StoreError
from dist_train.files import aside_for, is_plain, open_lock, write_whole
from dist_train.system.file_locks import go_on_unlocked
from dist_train.system.main_guard import end_if_run_again

LOCK = ".lock"
# Begins the name of a temporary folder among the shards, in which repair writes.
SCRATCH = ".repair-"
_SCRATCH_FOLDER = re.compile(rf"{re.escape(SCRATCH)}[0-9a-z_]{{8,16}}")
_PART_LOCK = re.compile(rf"{re.escape(LOCK)}-(claim|[0-9]+-of-(?P<count>[0-9]+))")


@contextmanager
def write_lock(out: Path, job: Job, part: Part | None = None) -> Iterator[None]:
    """Hold ``out`` for this job: all of it alone, or one part beside the other parts.

    The kernel releases the locks when their owner ends.

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
            # Before the work: files of killed writers. After it: files of lost cluster nodes.
            _remove_unfinished(out)
            locks.callback(_remove_unfinished, out)
        else:
            locks.enter_context(_locked(out, LOCK, fcntl.LOCK_SH))
            own = f"{LOCK}-{part.index}-of-{part.count}"
            locks.enter_context(_locked(out, own, fcntl.LOCK_EX, f"part {part.index} of "))
            _refuse_other_counts(out, part)
            with _locked(out, f"{LOCK}-claim", fcntl.LOCK_EX, wait=True):
                _claim(out, job)
        yield


def _refuse_foreign(out: Path, job: Job) -> None:
    """Refuse a folder that has files and is no store, before anything is written in it.

    Raises:
        StoreError: it is one.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise StoreError("is not a folder", where=out, fix="Choose another --out.")
    foreign = sorted(path.name for path in out.iterdir() if not _precedes_job(path))
    if foreign and not _is_store_of(out, job):
        raise StoreError(
            f"the folder is not empty, and is no store ('{foreign[0]}' is in it)",
            where=out,
            fix="Choose a new or an empty folder for --out.",
        )


def _precedes_job(path: Path) -> bool:
    """Whether a writer leaves this if it is killed before ``job.json`` is written."""
    if path.name == SHARDS:
        return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    # Links too: opening them as locks refuses them by a message of its own.
    return path.name == LOCK or bool(_PART_LOCK.fullmatch(path.name)) or aside_for(path) == JOB


def _is_store_of(out: Path, job: Job) -> bool:
    """Whether ``out`` has a ``job.json``; or, where that is lost, this job's manifest or marker.

    Raises:
        StoreError: it has manifest or marker, and a damaged ``job.json``.
    """
    try:
        read_made_from(out)
        return True
    except StoreError:
        known = _has_manifest(out, job) or _has_marker(out, job)
        if known and os.path.lexists(out / JOB):
            raise
        return known


def _has_manifest(out: Path, job: Job) -> bool:
    return is_plain(out / MANIFEST) and (out / MANIFEST).read_bytes() == job.manifest


def _has_marker(out: Path, job: Job) -> bool:
    try:
        return bool(read_marker(out)["fingerprint"] == job.fingerprint)
    except StoreError:
        return False


def _remove_unfinished(out: Path) -> None:
    """Remove locks of parts, and what writers of the store's own files did not finish."""
    for path in out.iterdir():
        is_lock = _PART_LOCK.fullmatch(path.name) and is_plain(path)
        if is_lock or aside_for(path) in (JOB, MANIFEST, MARKER, INDEX, TABLE, REJECTED):
            path.unlink(missing_ok=True)
    for path in (out / SHARDS).iterdir():
        if SHARD_FILE.fullmatch(aside_for(path) or ""):
            path.unlink(missing_ok=True)
        elif _SCRATCH_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _remove_scratch(path)


def _remove_scratch(folder: Path) -> None:
    """Remove the folder of a killed repair; files that no repair writes stay, and so does it."""
    for path in folder.iterdir():
        if SHARD_FILE.fullmatch(path.name) or SHARD_FILE.fullmatch(aside_for(path) or ""):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _refuse_other_counts(out: Path, part: Part) -> None:
    """Refuse part 1 of 2 beside part 1 of 3, as they share shards."""
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
    """Write what the folder is for, or check that it is for this job."""
    if os.path.lexists(out / JOB):
        before = read_made_from(out)
        if before != job.made_from:
            old, new = (pd.json_normalize(m).to_dict("records")[0] for m in (before, job.made_from))
            names = old.keys() | new.keys()
            changed = sorted(str(name) for name in names if old.get(name) != new.get(name))
            raise StoreError(
                f"the store was made with other settings ({', '.join(changed)} changed)",
                where=out,
                fix="Use the same settings, or choose another --out.",
            )
    else:
        # Before all other files, as the folder is recognised by it.
        content = job.made_from | {"fingerprint": job.fingerprint}
        write_whole(out / JOB, json.dumps(content, indent=2, sort_keys=True))
    if not _has_manifest(out, job):
        write_whole(out / MANIFEST, job.manifest)
