"""The loader: the same batches by any number of workers, and how failures are reported."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers import CHANGES, environment
from make_media import store_of, volumes
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dist_train.config import AugmentSettings, LoaderSettings
from dist_train.data.augment.cpu import Augment
from dist_train.data.loading import loader as loader_module
from dist_train.data.loading.collate import Batch
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.loader import Loader
from dist_train.data.loading.sampler import Slot
from dist_train.data.loading.shared_buffer import PAGE, Arena
from dist_train.data.store.reader import INDEX, SHARDS, Store
from dist_train.data.store.shards import shard_name
from dist_train.data.types import Volume
from dist_train.errors import StoreError

EVERYTHING = AugmentSettings.model_validate(dict.fromkeys(CHANGES, 0.5))
CLIPS, SHARD_CLIPS = 24, 6
# 14 batches of clips in mixed order, in three epochs.
SLOTS = [[Slot(7 * (4 * b + i) % CLIPS, b // 6) for i in range(4)] for b in range(14)]

pytestmark = [
    # A failure may show as an endless wait.
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_still_starts() -> Iterator[None]:
    """A loader may be used up before its workers are there; the next test would count them."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("start of loader workers"):
            thread.join(20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("loader"), volumes(CLIPS), SHARD_CLIPS)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch looks every 5 seconds whether a worker has died."""
    wait_for_a_batch = _MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait_for_a_batch, "__defaults__", (0.1,))


def shard_of(store: Store, clip: int) -> Path:
    return store.folder / SHARDS / shard_name(int(store.table["shard"][clip]))


def augmented(store: Store, workers: int) -> Loader:
    """A loader of ``SLOTS``, cut and augmented."""
    dataset = ClipDataset(store, size=(12, 12), max_frames=6, augment=Augment(EVERYTHING, 0))
    return Loader(dataset, SLOTS, LoaderSettings(workers=workers))


def plain(store: Store) -> ClipDataset:
    return ClipDataset(store, size=(12, 12), max_frames=None, augment=None)


def in_turn(clips: Iterable[int]) -> list[list[Slot]]:
    """Batches of one clip each."""
    return [[Slot(clip, 0)] for clip in clips]


def loader_of(dataset: ClipDataset, clips: Iterable[int], *, workers: int = 2) -> Loader:
    return Loader(dataset, in_turn(clips), LoaderSettings(workers=workers))


def begun(loader: Loader) -> tuple[Iterator[Batch], list[psutil.Process]]:
    """A pass, and the workers that it started."""
    before = set(psutil.Process().children(recursive=True))
    batches = iter(loader)
    loader.wait()
    # The fork server is their parent process.
    return batches, list(set(psutil.Process().children(recursive=True)) - before)


def error_of(batches: Iterable[Batch]) -> tuple[list[list[int]], StoreError]:
    """The batches' clips up to the error, and the error."""
    came: list[list[int]] = []
    with pytest.raises(StoreError) as caught:
        came.extend(batch.clips.tolist() for batch in batches)
    error = caught.value
    assert "\n" not in str(error)
    # A traceback holds frames, and so the loader, whose workers must end with the test.
    del caught
    return came, error.with_traceback(None)


def assert_same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.volumes, other.volumes)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.clips, other.clips)
        assert (one.frames is None) == (other.frames is None)
        assert one.frames is None or torch.equal(one.frames, other.frames)


# The same batches.


@pytest.fixture(scope="module")
def alone(store: Store) -> list[Batch]:
    """The batches without a worker."""
    batches = list(augmented(store, 0))
    assert len(batches) == len(SLOTS)
    assert any(batch.frames is not None for batch in batches)
    return batches


@pytest.mark.parametrize("workers", [1, 4])
def test_batches_do_not_depend_on_the_workers(
    store: Store, alone: list[Batch], workers: int
) -> None:
    assert_same(list(augmented(store, workers)), alone)


@pytest.mark.parametrize("lends", [False, True])
def test_batches_that_are_kept_stay_as_they_are(
    store: Store, alone: list[Batch], monkeypatch: pytest.MonkeyPatch, lends: bool
) -> None:
    """Of an arena, until its memory is lent again; and where there is none, or no more room."""
    if not lends:
        monkeypatch.setattr(loader_module, "arena_of_memory", lambda: Arena(PAGE))
    loader = augmented(store, 2)
    kept = list(loader)
    again = list(loader)
    del loader
    assert_same(kept, alone)
    assert_same(again, alone)


def test_workers_live_on_and_give_the_same_again(store: Store, alone: list[Batch]) -> None:
    loader = augmented(store, 2)
    batches, workers = begun(loader)
    assert len(workers) == 2
    assert_same(list(batches), alone)
    again, more = begun(loader)
    assert_same(list(again), alone)
    assert more == []
    assert all(worker.is_running() for worker in workers)


def test_pass_given_up_half_way_leaves_nothing_in_the_next(
    store: Store, alone: list[Batch]
) -> None:
    loader = augmented(store, 2)
    batches = iter(loader)
    assert_same([next(batches) for _ in range(3)], alone[:3])
    del batches
    assert_same(list(loader), alone)


def test_interrupt_is_for_the_parent_to_handle(store: Store, alone: list[Batch]) -> None:
    """A terminal sends it to the workers too; a parent that goes on still has them."""
    batches, workers = begun(augmented(store, 2))
    first = [next(batches) for _ in range(2)]
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    assert_same([*first, *batches], alone)


# While the workers start.


class Slow(ClipDataset):
    """On its way to a worker it waits until ``may_go``."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, size=(12, 12), max_frames=None, augment=None)
        self.may_go = threading.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.may_go.wait(60)
        return plain, (self.store,)


def test_first_batches_come_before_the_workers(store: Store) -> None:
    dataset = Slow(store)
    loader = loader_of(dataset, range(CLIPS))
    batches = iter(loader)
    came = [next(batches) for _ in range(3)]
    dataset.may_go.set()
    loader.wait()
    came += list(batches)
    expected = list(loader_of(plain(store), range(CLIPS), workers=0))
    assert_same(came, expected)
    assert_same(list(loader), expected)


@pytest.mark.parametrize("taken", [1, 4])
def test_pass_before_the_workers_come_leaves_nothing_in_the_next(store: Store, taken: int) -> None:
    """Whether it is given up, or is whole."""
    dataset = Slow(store)
    loader = loader_of(dataset, range(4))
    batches = iter(loader)
    assert [next(batches).clips.tolist() for _ in range(taken)] == [[c] for c in range(taken)]
    assert taken == 1 or next(batches, None) is None
    del batches
    dataset.may_go.set()
    assert [batch.clips.tolist() for batch in loader] == [[clip] for clip in range(4)]


def test_random_numbers_of_the_caller_are_its_own(store: Store) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(loader_of(plain(store), range(4)))
    assert torch.equal(torch.rand(3), expected)


# What workers hold.


class Counted(list[list[Slot]]):
    """Counts the batches that were taken from it."""

    taken = 0

    def __iter__(self) -> Iterator[list[Slot]]:
        for batch in super().__iter__():
            self.taken += 1
            yield batch


def test_workers_hold_no_more_than_prefetch(store: Store) -> None:
    slots = Counted(in_turn(range(CLIPS)))
    batches, _ = begun(Loader(plain(store), slots, LoaderSettings(workers=2, prefetch=3)))
    for used in range(1, 8):
        next(batches)
        assert slots.taken == used + 2 * 3


def open_files(process: psutil.Process, folder: Path) -> list[Path]:
    """Of ``folder``, by descriptor or memory map."""
    found = [Path(file.path) for file in process.open_files()]
    found += [Path(mapped.path) for mapped in process.memory_maps()]
    return [path for path in found if path.is_relative_to(folder)]


def test_each_worker_opens_the_shards_that_it_reads_once_and_no_index(store: Store) -> None:
    parent_read, workers_read = 0, range(SHARD_CLIPS, 3 * SHARD_CLIPS)
    store.read(parent_read)
    assert open_files(psutil.Process(), store.folder).count(shard_of(store, parent_read)) == 1
    settings = LoaderSettings(workers=2, prefetch=1)
    loader = Loader(plain(store), in_turn(workers_read), settings)
    batches, workers = begun(loader)
    list(batches)
    # The workers take batches in turn, so each has read clips of both shards.
    expected = sorted({shard_of(store, clip) for clip in workers_read})
    for worker in workers:
        files = open_files(worker, store.folder)
        assert sorted(path for path in files if path.suffix == ".tar") == expected
        assert store.folder / INDEX not in files


def test_workers_are_not_forked_from_a_process_with_threads(store: Store) -> None:
    _, workers = begun(loader_of(plain(store), range(4)))
    (server,) = {worker.ppid() for worker in workers}
    assert server != os.getpid()
    assert psutil.Process(server).num_threads() == 1


# What goes wrong.


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_clip_is_named_by_its_key(store: Store, tmp_path: Path, workers: int) -> None:
    damaged = Store(Path(shutil.copytree(store.folder, tmp_path / "store")))
    clip = damaged.clip_of("clip008")
    path = shard_of(damaged, clip)
    content = bytearray(path.read_bytes())
    content[int(damaged.table["offset"][clip])] ^= 0xFF
    path.write_bytes(content)
    _, error = error_of(augmented(damaged, workers))
    assert "clip 'clip008' cannot be read" in error.what
    assert error.where == path


class Troubled(ClipDataset):
    """Calls ``trouble`` when it reads one clip."""

    def __init__(self, store: Store, clip: int, trouble: Callable[[], object]) -> None:
        super().__init__(store, size=(12, 12), max_frames=None, augment=None)
        self.clip, self.trouble = clip, trouble

    def fill(self, out: Volume, slot: Slot) -> None:
        if slot.clip == self.clip:
            self.trouble()
        super().fill(out, slot)


def troubled(store: Store, trouble: Callable[[], object]) -> StoreError:
    """The error for trouble at clip 7, the fourth batch of six at the latest.

    A worker that dies takes batches along that it has not handed over yet.
    """
    slots = [[Slot(clip, 0), Slot(clip + 1, 0)] for clip in range(0, 12, 2)]
    settings = LoaderSettings(workers=2, prefetch=2)
    batches, _ = begun(Loader(Troubled(store, 7, trouble), slots, settings))
    came, error = error_of(batches)
    assert came == [[0, 1], [2, 3], [4, 5]][: len(came)]
    assert error.where == shard_of(store, 7)
    assert f"at clip '{store.table['key'][7]}'" in error.what
    return error


def read_no_address(errors: Path) -> None:
    # The fork server has the standard error of the test that started it.
    with errors.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    ctypes.string_at(0)


@pytest.mark.slow
def test_worker_that_crashes(store: Store, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    assert "died (SIGSEGV)" in str(troubled(store, functools.partial(read_no_address, errors)))
    assert "in read_no_address" in errors.read_text()


def tell_and_stay(pipe: Path) -> None:
    pipe.write_text(str(os.getpid()))
    signal.pause()


@pytest.mark.slow
def test_worker_that_is_killed(store: Store, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    killer = threading.Thread(target=lambda: os.kill(int(pipe.read_text()), signal.SIGKILL))
    killer.start()
    error = troubled(store, functools.partial(tell_and_stay, pipe))
    killer.join()
    assert "was killed (SIGKILL)" in error.what
    assert re.search("Memory .* loader.workers", str(error))


@pytest.mark.slow
def test_clip_that_never_comes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "PATIENCE", 2.0)
    assert "gave up after 2 s at clip" in troubled(store, signal.pause).what


def ask_for_too_much() -> None:
    np.empty(1 << 60, np.uint8)


def test_worker_without_memory(store: Store) -> None:
    assert "out of memory (Unable to allocate 1.00 EiB" in str(troubled(store, ask_for_too_much))


def allow_no_bytes_in_files() -> None:
    # Shared memory is a file to the kernel.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_worker_without_shared_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system refuses an arena, each batch gets its own shared memory."""
    monkeypatch.setattr(loader_module, "arena_of_memory", lambda: None)
    error = troubled(store, allow_no_bytes_in_files)
    assert "out of memory (unable to resize file" in str(error)


@pytest.mark.slow
def test_worker_that_dies_between_batches(store: Store) -> None:
    loader = loader_of(plain(store), range(4))
    batches, workers = begun(loader)
    assert len(list(batches)) == 4
    workers[0].kill()
    for _ in range(2):
        came, error = error_of(loader)
        assert came == []
        assert "killed (SIGKILL) between two batches" in error.what
        assert error.where == store.name


def test_a_worker_that_cannot_be_started_keeps_its_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(ForkServerProcess, "start", refuse)
    loader = loader_of(plain(store), range(CLIPS))
    iter(loader)
    with pytest.raises(BlockingIOError, match="no more processes"):
        loader.wait()


# What is left behind.


@pytest.mark.parametrize("failed", [False, True])
def test_loader_that_is_dropped_ends_its_workers(store: Store, failed: bool) -> None:
    """By counting references: where cycles are collected, DataLoader cannot end them."""
    gc.disable()
    dataset = Troubled(store, 7, ask_for_too_much)
    loader = loader_of(dataset, range(CLIPS))
    batches, workers = begun(loader)
    try:
        for clip in range(7):
            assert next(batches).clips.tolist() == [clip]
        if failed:
            with pytest.raises(StoreError):
                next(batches)
        del batches, loader
        _, alive = psutil.wait_procs(workers, timeout=20)
    finally:
        gc.enable()
    assert len(workers) == 2
    assert alive == []


WALK = """
import signal
import sys
from pathlib import Path
from dist_train.config import LoaderSettings
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.loader import Loader
from dist_train.data.loading.sampler import held_out_batches
from dist_train.data.store.reader import Store

# A shell starts what it runs in the background with Ctrl-C ignored, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
store = Store(Path(sys.argv[1]))
clips = held_out_batches(list(range(24)), [1] * 24, rank=0, world=1, batch=1)
dataset = ClipDataset(store, size=(64, 64), max_frames=None, augment=None)
loader = Loader(dataset, clips, LoaderSettings(workers=2, prefetch=4))
while True:
    batches = iter(loader)
    if sys.argv[2] != "start":
        loader.wait()
    for number, batch in enumerate(batches):
        if number == 5:
            print("in the middle", flush=True)
            if sys.argv[2] != "walk":
                # Batches are ready, and more to come.
                sys.stdin.read()
                sys.exit()
"""


def session_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The other processes of the session that a process leads."""
    members = []
    for other in psutil.process_iter():
        with suppress(ProcessLookupError):
            if other.pid != process.pid and os.getsid(other.pid) == process.pid:
                members.append(other)
    return members


def shared_memory(processes: Sequence[psutil.Process]) -> set[Path]:
    """Files of /dev/shm that they hold, by memory map or descriptor."""
    found = set()
    for process in processes:
        for folder in ("map_files", "fd"):
            for link in Path(f"/proc/{process.pid}", folder).iterdir():
                # It may be closed again.
                with suppress(FileNotFoundError):
                    found.add(Path(str(link.readlink()).removesuffix(" (deleted)")))
    return {path for path in found if path.is_relative_to("/dev/shm")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "where", "code"),
    [
        ("interrupted", "walk", -signal.SIGINT),
        ("interrupted", "start", -signal.SIGINT),
        ("killed", "wait", -signal.SIGKILL),
        ("at its end", "wait", 0),
    ],
)
def test_nothing_is_left_behind(store: Store, how: str, where: str, code: int) -> None:
    """PyTorch does not see that the parent has been killed: the workers' parent is, for the system,
    the fork server."""
    with subprocess.Popen(
        [sys.executable, "-c", WALK, str(store.folder), where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    ) as process:
        members: list[psutil.Process] = []
        shared: set[Path] = set()
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "in the middle\n"
            if where != "start":
                members = session_of(process)
                assert len(members) == 4, "a fork server, a resource tracker, two workers"
                shared = shared_memory(members)
                assert any(path.name.startswith("sem.") for path in shared)
            if how == "killed":
                process.kill()
            elif how == "interrupted" and where == "walk":
                # As a terminal does, to the workers too.
                os.killpg(process.pid, signal.SIGINT)
            elif how == "interrupted":
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
            members = members or session_of(process)
            _, alive = psutil.wait_procs(members, timeout=20)
        finally:
            for member in (process, *members):
                with suppress(psutil.NoSuchProcess):
                    member.kill()
    assert alive == []
    assert process.returncode == code
    assert [path for path in shared if path.exists()] == []
    # PyTorch puts the process id in the names: also what was made since.
    made_by = [str(member.pid) for member in (process, *members)]
    assert [p for p in Path("/dev/shm").glob("torch_*") if p.name.split("_")[1] in made_by] == []
    if how != "killed":
        # Of the parent alone. A worker may still tell of a batch that nobody took over.
        assert errors.count("KeyboardInterrupt") == (how == "interrupted"), errors
        assert errors.rstrip().endswith("KeyboardInterrupt" if how == "interrupted" else "")
