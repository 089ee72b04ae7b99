"""A script without a main guard gets a message that says so, from any call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, environment, tiny_npz
from make_media import write_manifest

from dist_train.data.store.build import prepare_npz

pytestmark = pytest.mark.slow

PREPARE = """
from pathlib import Path
from dist_train.data.table.manifest import read_manifest
from dist_train.data.store.build import PrepareSettings, prepare
folder = Path({folder!r})
prepare(read_manifest(folder / "clips.csv"), folder, folder / "out", PrepareSettings(roi="none"),
        workers=2)
"""
VERIFY = """
from pathlib import Path
from dist_train.data.store.verify import verify
verify(Path({folder!r}) / "store", workers=2)
"""
LOAD = """
from pathlib import Path
from dist_train.config import LoaderSettings
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.loader import Loader
from dist_train.data.loading.sampler import dealt_batches
from dist_train.data.store.reader import Store
store = Store(Path({folder!r}) / "store")
clips = ClipDataset(store, size=(16, 16), max_frames=None, augment=None)
batches = dealt_batches(list(range(60)), [8] * 60, rank=0, world=1, batch=4)
loader = Loader(clips, batches, LoaderSettings(workers=1))
next(iter(loader))
loader.wait()
list(loader)
"""


@pytest.mark.parametrize(
    "script",
    # Verifying has the pool that preparing has.
    [PREPARE, pytest.param(VERIFY, marks=pytest.mark.soak), LOAD],
    ids=["prepare", "verify", "load"],
)
def test_a_script_without_a_guard(tmp_path: Path, script: str) -> None:
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", np.full((4, 8, 8), number, np.uint8))
    write_manifest(tmp_path / "clips.csv", ["0.npy", "1.npy"], [0, 1])
    prepare_npz(tiny_npz(tmp_path / "store.npz"), tmp_path / "store", shard_clips=20)
    program = tmp_path / "program.py"
    program.write_text(script.format(folder=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "StoreError: the script starts worker processes at its top level" in last
    assert last.endswith("Put its calls under: if __name__ == '__main__':")
    # Of the process itself alone.
    assert done.stderr.count("Traceback (most recent call last)") == 1, done.stderr
