"""Machines that lack something: temporary files, shared memory, /proc, open files, a reader of the
output, or time before the Ctrl-C."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT, dist_train, environment, overrides, tiny_npz
from torch.utils.data import SequentialSampler

from dist_train.config import LoaderSettings
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.loader import Loader
from dist_train.data.store.build import prepare_npz
from dist_train.data.store.reader import Store
from dist_train.errors import MachineError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three shards; not to be changed."""
    folder = tmp_path_factory.mktemp("machine")
    prepare_npz(tiny_npz(folder / "store.npz"), folder / "store", shard_clips=20)
    return folder / "store"


def in_a_namespace(mounts: str, command: Sequence[str], **more: str) -> tuple[int, str]:
    """Exit code and standard error of a command where more is mounted."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no namespace of mounts can be made here")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mounts}; exec "$@"', "sh", *command],
        env=environment(**more),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stderr


def test_without_shared_memory_a_store_is_verified(store: Path) -> None:
    read_only = "mount -t tmpfs -o ro none /dev/shm"
    assert in_a_namespace(read_only, dist_train("verify", store, "--workers", "2")) == (0, "")


def test_without_shared_memory_loader_workers_are_refused_in_one_line(
    store: Path, tmp_path: Path
) -> None:
    read_only = "mount -t tmpfs -o ro none /dev/shm"
    settings = overrides(store, tmp_path / "run", "loader.workers=1")
    code, told = in_a_namespace(read_only, dist_train("train", *settings))
    assert code == 1
    assert told.endswith(
        "error: /dev/shm: worker processes need shared memory (Read-only file system). Make it "
        "writable (Docker: --shm-size=16g), or set loader.workers=0.\n"
    )


@pytest.mark.soak
def test_without_proc_training_runs(store: Path, tmp_path: Path) -> None:
    hidden = "mount -t tmpfs -o ro none /proc"
    settings = overrides(store, tmp_path / "run", "train.epochs=1", "snapshots.at=[1]")
    code, told = in_a_namespace(hidden, dist_train("train", *settings))
    assert code == 0, told
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all('"memory/host_mb": null' in line for line in lines)


@pytest.mark.soak
def test_no_more_workers_are_started_than_files_may_be_open_for(store: Path) -> None:
    command = dist_train("verify", store, "--workers", "40")
    shell = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *command]
    done = subprocess.run(
        shell, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_loader_of_more_workers_than_files_may_be_open_for_is_refused(store: Path) -> None:
    clips = ClipDataset(Store(store), size=(16, 16), max_frames=None, augment=None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with pytest.raises(MachineError, match=r"40 loader workers .* limit of 64, .* for 13"):
            Loader(clips, SequentialSampler([]), LoaderSettings(workers=40))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


READ = """
from dist_train.progress import progress
with progress("train") as report:
    for done in range(1, 9):
        report(done, 8, "figures")
print("the end")
"""


def test_work_goes_on_without_a_reader_of_its_output() -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", READ],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert command.stdout is not None
    assert command.stderr is not None
    # Nobody ever reads.
    command.stdout.close()
    told = command.stderr.read()
    command.stderr.close()
    assert command.wait(60) == 0
    assert told == "WARNING: standard output is closed (Broken pipe); train goes on without it\n"


INTERRUPTED = """
import builtins, os, signal, sys
real, left = builtins.__import__, int(sys.argv.pop(1))

def importing(name, *args, **more):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *args, **more)

builtins.__import__ = importing
sys.argv[0] = "dist-train"
import runpy
runpy.run_module("dist_train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("imports", [30, 300, 3000])
def test_an_interrupt_while_modules_are_imported_ends_without_a_word(
    store: Path, imports: int
) -> None:
    """It comes at a number of imports, not after a time."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(imports), "info", str(store)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


INTERRUPTED_SERVER = """
import os, signal
from dist_train.system.supervised_pool import Limits, supervised
import late

if __name__ == "__main__":
    os.environ["LATE"] = "1"
    print(sorted(supervised(late.twice, [1, 2], late.twice, Limits(60, 1 << 30), 1)))
    signal.signal(signal.SIGINT, lambda number, frame: print("heard"))
    os.kill(os.getpid(), signal.SIGINT)
"""
LATE = """
import os, signal
if "LATE" in os.environ:
    os.kill(os.getpid(), signal.SIGINT)

def twice(item, steps):
    os.kill(os.getpid(), signal.SIGINT)
    return 2 * item
"""


def test_an_interrupt_while_workers_start_is_for_their_parent(tmp_path: Path) -> None:
    """A terminal sends it to the whole group: the server that forks them, and the workers."""
    (tmp_path / "late.py").write_text(LATE)
    (tmp_path / "script.py").write_text(INTERRUPTED_SERVER)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        env=environment(PYTHONPATH=f"{ROOT}:{tmp_path}"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[2, 4]\nheard\n", "")
