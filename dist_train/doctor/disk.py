"""Measure a folder's disk: writing of checkpoints, and random reads of clips."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from dist_train.doctor.finding import Finding, graded

BYTES, BLOCK = 128 * 2**20, 4 * 2**20
# Bytes of a stored clip of some hundred frames, and the number of reads.
CLIP, READS = 256 * 2**10, 200


def check_disk(folder: Path) -> Iterator[Finding]:
    """Findings on free space, writing with fsync, and random reads past the page cache."""
    name = f"disk of {folder}"
    path = folder / f".dist_train-doctor-{secrets.token_hex(8)}"
    try:
        free = shutil.disk_usage(folder).free
        found = f"{free / 2**30:.1f} GiB free"
        fix = "Make room: a checkpoint of a ResNet-101 takes 1 GB, and up to three exist at a time."
        yield graded(f"{name}: room", free, found, fix, bad=4 * 10**9, warn=20 * 10**9)
        rate = _write(path)
        found = f"{rate / 1e6:.0f} MB/s"
        fix = "Give runs a faster disk (out=), or save less often (checkpoint.every_steps)."
        yield graded(f"{name}: write + fsync", rate, found, fix, warn=100e6)
        median, worst = (1e3 * float(q) for q in np.quantile(_read(path), [0.5, 0.99]))
        found = f"{CLIP // 2**10} KiB in {median:.1f} ms, 1 % over {worst:.1f} ms"
        fix = "Copy the store to a local disk, or raise loader.workers and loader.prefetch."
        yield graded(f"{name}: random reads", -median, found, fix, warn=-20.0)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "Make room." if full else "Give a folder that exists and may be written: --folder."
        yield Finding(name, "bad", str(error.strerror), fix)
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _write(path: Path) -> float:
    """Bytes per second, including the fsync."""
    # Not zeros, which some file systems do not store.
    block = np.random.default_rng(0).bytes(BLOCK)
    began = time.perf_counter()
    with path.open("xb", buffering=0) as file:
        for _ in range(BYTES // BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    return BYTES / (time.perf_counter() - began)


def _read(path: Path) -> list[float]:
    """Seconds of each of ``READS`` reads of a clip's size at random offsets."""
    places = np.random.default_rng(1).integers(0, BYTES - CLIP, READS)
    seconds = []
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for place in places.tolist():
            began = time.perf_counter()
            os.pread(file.fileno(), CLIP, place)
            seconds.append(time.perf_counter() - began)
    return seconds
