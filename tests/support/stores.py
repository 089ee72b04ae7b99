"""Small stores, and what tests look at in them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from make_media import write_manifest

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.store.reader import REJECTED, SHARDS

WHOLE = PrepareSettings(roi="none", shard_clips=4)


# ``prepare`` or one part of it. It tells each shard, and a part goes on when it is sent a line.
SCRIPT = """
import signal
import sys
from pathlib import Path
from dist_train.data.store.build import PrepareSettings, prepare, prepare_part
from dist_train.data.store.build_spec import Part
from dist_train.data.table.manifest import read_manifest

def tell(done, total):
    print(done, flush=True)
    if part:
        sys.stdin.readline()

if __name__ == "__main__":
    # A shell starts what it runs in the background with Ctrl-C ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, part = Path(sys.argv[1]), sys.argv[2:]
    what = (
        read_manifest(folder / "clips.csv"), folder / "raw", folder / "store",
        PrepareSettings(roi="none", shard_clips=4), *map(Part.parse, part),
    )
    (prepare_part if part else prepare)(*what, workers=2, progress=tell)
"""


def start(folder: Path, *part: str) -> subprocess.Popen[str]:
    """A process, in a group of its own, that prepares the files of ``clips.csv``, or a part."""
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py"), str(folder), *part],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def make(folder: Path, names: Sequence[str], out: str = "store", **how: object) -> Path:
    """Prepare the files ``names`` of ``folder``/raw; returns the store's folder."""
    manifest = write_manifest(folder / "clips.csv", names)
    settings = how.pop("settings", WHOLE)
    how.setdefault("workers", 1)
    prepare(manifest, folder / "raw", folder / out, settings, **how)  # type: ignore[arg-type]
    return folder / out


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every written shard."""
    lists = (store / SHARDS).glob("*.rejected.csv")
    shards = [path.with_name(path.name.replace("rejected.csv", "tar")) for path in lists]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


def rejected(store: Path) -> dict[str, str]:
    """Reasons of the store's rejects, by file."""
    table = pd.read_csv(store / REJECTED, dtype=str)
    return dict(zip(table["file"], table["reason"], strict=True))


def small_medmnist(path: Path, **changed: np.ndarray | None) -> Path:
    """A MedMNIST file of ten clips; arrays may be given, or left out as None."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray | None] = {}
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 4, 5, 6), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    np.savez(path, **{k: v for k, v in (arrays | changed).items() if v is not None})
    return path
