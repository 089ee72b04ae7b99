"""The loaders that tools/bench_loader.py compares, each run in a process of its own.

    python tools/loader_contenders.py NAME FOLDER TASK.json

Every contender gives batches of uint8 [B, 1, D, H, W] of the same clips: one positive to three
negatives, in random order, frames resized by the same cv2 calls, padded to the deepest clip. The
peers make batches in shared memory, as PyTorch's ``default_collate`` does.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import psutil
import torch
from measuring import seconds
from plans import make_plan
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_train.config import LoaderSettings
from dist_train.data.augment.draw import Draw
from dist_train.data.augment.resize import resize
from dist_train.data.loading.collate import size_of
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.loader import Loader
from dist_train.data.loading.sampler import PlanSampler, Slot
from dist_train.data.plan.plan import Plan
from dist_train.data.plan.shuffle import Ints
from dist_train.data.store.reader import Store
from dist_train.data.types import Volume

SIZE, RATIO, SEED = (160, 160), (1, 3), 0
CLASSES = ("negative", "positive")
#: Clips of an epoch when a run resumes in its middle.
EPOCH = 100_000


@dataclass(frozen=True)
class Task:
    """``resume``: begin in the middle of an epoch of ``EPOCH`` clips."""

    batch: int
    workers: int
    prefetch: int
    warm_up: int = 0
    batches: int = 0
    resume: bool = False
    pause: float = 0.0


class CannotError(Exception):
    """The contender has no way to do this."""


Loaders = Callable[[Path, Task], Iterable[Any]]


# --- what all peers share -------------------------------------------------------------------------


def prepared(clip: Volume) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(resize(clip, SIZE)))


def padded(clips: list[Any]) -> Tensor:
    """One batch of resized clips, in shared memory."""
    shape = (len(clips), 1, max(map(len, clips)), *SIZE)
    pixels = int(np.prod(shape))
    if torch.utils.data.get_worker_info() is None:
        out = torch.zeros(shape, dtype=torch.uint8)
    else:
        none = torch.empty(0, dtype=torch.uint8)
        storage = none.untyped_storage()._new_shared(pixels)  # type: ignore[no-untyped-call]
        out = none.set_(storage).view(shape)
    for row, clip in zip(out, clips, strict=True):
        row[0, : len(clip)] = clip
    return out


def one_thread(_: int) -> None:
    cv2.setNumThreads(1)


def of_torch(dataset: Any, task: Task, **how: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=task.workers,
        prefetch_factor=task.prefetch,
        worker_init_fn=one_thread,
        **how,
    )


def read_labels(folder: Path) -> list[int]:
    return cast(list[int], json.loads((folder / "labels.json").read_text()))


def plan_of(labels: Iterable[int], task: Task) -> Plan:
    numbers = np.array(list(labels))
    positives, negatives = np.flatnonzero(numbers == 1), np.flatnonzero(numbers == 0)
    return make_plan(positives, negatives, batch=task.batch, ratio=RATIO, seed=SEED)


def planned(labels: Iterable[int], task: Task) -> PlanSampler:
    first = EPOCH // task.batch // 2 if task.resume else 0
    plan = plan_of(labels, task)
    last = first + task.warm_up + task.batches + task.workers * task.prefetch + 1
    return PlanSampler(plan, rank=0, world=1, accumulate=1, first=first, last=last)


# --- ours -----------------------------------------------------------------------------------------


class Repeated(ClipDataset):
    """``EPOCH`` clips: the clips of the store, repeated."""

    def __init__(self, store: Store, **how: Any) -> None:
        super().__init__(store, **how)
        self.clips = len(store.table)

    def labels(self, clips: list[int]) -> Ints:
        return super().labels([clip % self.clips for clip in clips])

    def depths(self, clips: list[int]) -> Ints:
        return super().depths([clip % self.clips for clip in clips])

    def depth(self, clip: int) -> int:
        return super().depth(clip % self.clips)

    def fill(self, out: Volume, slot: Slot) -> None:
        super().fill(out, Slot(slot.clip % self.clips, slot.epoch))

    def native_shape(self, clip: int) -> tuple[int, int, int]:
        return super().native_shape(clip % self.clips)

    def fill_native(self, out: Volume, slot: Slot) -> Draw:
        return super().fill_native(out, Slot(slot.clip % self.clips, slot.epoch))


def ours(
    folder: Path,
    task: Task,
    *,
    max_frames: int | None = None,
    store: Store | None = None,
    on_device: bool = False,
) -> Loader:
    kind = Repeated if task.resume else ClipDataset
    store = store or Store(folder / "store")
    clips = kind(store, size=SIZE, max_frames=max_frames, augment=None, on_device=on_device)
    settings = LoaderSettings(workers=task.workers, prefetch=task.prefetch)
    count = EPOCH if task.resume else len(store.table)
    return Loader(clips, planned(clips.labels([*range(count)]).tolist(), task), settings)


def ours_native(folder: Path, task: Task) -> Loader:
    """Clips of their own sizes, packed for a device to resize."""
    return ours(folder, task, on_device=True)


def ours_empty(folder: Path, task: Task) -> Loader:
    """One frame of each clip: the memory of the processes without batches."""
    return ours(folder, task, max_frames=1)


# --- plain files, and the original's LMDB of pickles ----------------------------------------------


@dataclass
class Files(Dataset[Tensor]):
    folder: Path
    clips: int

    def __getitem__(self, slot: Slot) -> Tensor:
        return prepared(np.load(self.folder / f"{slot.clip % self.clips:06d}.npy"))


def plain(folder: Path, task: Task) -> DataLoader[Any]:
    labels = read_labels(folder)
    sampler = planned(np.resize(labels, EPOCH) if task.resume else labels, task)
    files = Files(folder / "raw", len(labels))
    return of_torch(files, task, batch_sampler=sampler, collate_fn=padded)


@dataclass
class Pickles(Dataset[Tensor]):
    path: Path
    clips: int
    transaction: Any = None

    def __getitem__(self, slot: Slot) -> Tensor:
        if self.transaction is None:
            import lmdb

            self.transaction = lmdb.open(str(self.path), readonly=True, lock=False).begin()
        return prepared(pickle.loads(self.transaction.get(b"%06d" % (slot.clip % self.clips))))


def original(folder: Path, task: Task) -> DataLoader[Any]:
    labels = read_labels(folder)
    if task.resume:
        raise CannotError("draws at random, and keeps no state")
    pickles = Pickles(folder / "original", len(labels))
    return of_torch(pickles, task, batch_sampler=planned(labels, task), collate_fn=padded)


def write_original(folder: Path) -> None:
    import lmdb

    with (
        lmdb.open(str(folder / "original"), map_size=1 << 40) as environment,
        environment.begin(write=True) as transaction,
    ):
        for number, _, clip in raw_clips(folder):
            transaction.put(b"%06d" % number, pickle.dumps(clip))


def raw_clips(folder: Path) -> Iterator[tuple[int, int, Volume]]:
    for number, label in enumerate(read_labels(folder)):
        yield number, label, np.load(folder / "raw" / f"{number:06d}.npy")


# --- WebDataset -----------------------------------------------------------------------------------


def write_webdataset(folder: Path) -> None:
    import webdataset

    for label, name in enumerate(CLASSES):
        (folder / "webdataset" / name).mkdir(parents=True)
        pattern = str(folder / "webdataset" / name / "%03d.tar")
        with webdataset.ShardWriter(pattern, maxcount=32, verbose=0) as shards:
            for number, of_clip, clip in raw_clips(folder):
                if of_clip == label:
                    shards.write({"__key__": f"{number:06d}", "npy": clip})


def of_webdataset(folder: Path, task: Task) -> Any:
    import webdataset

    if task.resume:
        raise CannotError("keeps no state; it would read the first half of the epoch again")

    def clips(name: str) -> Any:
        shards = sorted(map(str, (folder / "webdataset" / name).glob("*.tar")))
        read = webdataset.WebDataset(
            shards, resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node
        )
        return read.shuffle(100).decode().to_tuple("npy").map(lambda sample: prepared(sample[0]))

    mix = webdataset.RandomMix([clips(name) for name in CLASSES], probs=RATIO[::-1])
    batches = webdataset.DataPipeline(mix, webdataset.batched(task.batch, collation_fn=padded))
    return of_torch(batches, task, batch_size=None)


CONTENDERS: dict[str, Loaders] = {
    "ours": ours,
    "ours, native": ours_native,
    "original": original,
    "plain files": plain,
    "WebDataset": of_webdataset,
}
WRITERS: dict[str, Callable[[Path], None]] = {
    "original": write_original,
    "WebDataset": write_webdataset,
}
OTHERS: dict[str, Loaders] = {"ours, empty": ours_empty}


# --- a run ----------------------------------------------------------------------------------------


def run(loader: Loaders, folder: Path, task: Task) -> dict[str, Any]:
    """Measure seconds from opening the store to the first batch, and clips a second after the
    warm-up, or with ``task.pause`` the peak memory."""
    began = time.perf_counter()
    made = loader(folder, task)
    batches = iter(made)
    next(batches)
    found = {"first_batch_s": time.perf_counter() - began}
    if isinstance(made, Loader):
        made.wait()
    for _ in range(task.warm_up):
        next(batches)
    peak, clips, began = 0.0, 0, time.perf_counter()
    for _ in range(task.batches):
        clips += len(rows_of(next(batches)))
        if task.pause:
            time.sleep(task.pause)
            peak = max(peak, tree_mb())
    if task.batches and not task.pause:
        found["clips_per_second"] = clips / (time.perf_counter() - began)
    return found | ({"peak_mb": peak} if task.pause else {})


def run_again(folder: Path, task: Task) -> dict[str, Any]:
    """Measure seconds to the first batch of our second loader in a process: the store is open and
    the fork server runs."""
    store = Store(folder / "store")
    next(iter(ours(folder, task)))
    return {"first_batch_s": seconds(lambda: next(iter(ours(folder, task, store=store))))}


def rows_of(batch: Any) -> Tensor:
    return cast(Tensor, batch if isinstance(batch, Tensor) else batch.labels)


def tree_mb() -> float:
    """Memory of this process and its children, shared pages counted once, in 10^6 bytes."""
    me = psutil.Process()
    return sum(int(each.memory_full_info().pss) for each in (me, *me.children(True))) / 1e6


def queue_mb(folder: Path, task: Task) -> float:
    """Largest size of ``workers * prefetch + 1`` batches in a row, in 10^6 bytes."""
    clips = ClipDataset(Store(folder / "store"), size=SIZE, max_frames=None, augment=None)
    batches = planned(clips.store.table["label"].tolist(), task)
    sizes = np.array([size_of(clips, slots) for slots in batches])
    return float(np.convolve(sizes, np.ones(task.workers * task.prefetch + 1), "valid").max() / 1e6)


def against_pread(folder: Path, batch: int, rounds: int) -> dict[str, float]:
    """GB/s of bare ``preadv``, and of the store, for the same clips into the same buffer."""
    store = Store(folder / "store")
    sides = [store.table[name] for name in ("frames", "height", "width")]
    sizes = np.prod(sides, axis=0, dtype=np.int64)
    paths = sorted((folder / "store" / "shards").glob("*.tar"))
    files = [os.open(path, os.O_RDONLY) for path in paths]
    shards, offsets = (store.table[name].tolist() for name in ("shard", "offset"))
    where = [(files[shard], offset) for shard, offset in zip(shards, offsets, strict=True)]
    order = np.random.default_rng(SEED).permutation(len(sizes))
    order = order[: len(order) // batch * batch].reshape(-1, batch)
    buffer = np.zeros(int(sizes[order].sum(1).max()), np.uint8)

    def bare(clip: int, out: Volume) -> None:
        os.preadv(where[clip][0], [out.data], where[clip][1])

    def checked(clip: int, out: Volume) -> None:
        store.read_into(out, clip)

    def read_all(read: Callable[[int, Volume], None]) -> None:
        for clips in order:
            start = 0
            for clip in clips.tolist():
                end = start + int(sizes[clip])
                read(clip, buffer[start:end])
                start = end

    ways = [partial(read_all, read) for read in (bare, checked)]
    times = [[seconds(way) for way in ways] for _ in range(rounds + 1)][1:]
    raw, of_store = np.median(np.array(times), axis=0)
    total = sizes[order].sum() / 1e9
    return {"pread_gb_s": float(total / raw), "store_gb_s": float(total / of_store)}


def main() -> None:
    name, folder, task = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    try:
        if name == "pread":
            found: dict[str, Any] = against_pread(folder, **task)
        elif name == "again":
            found = run_again(folder, Task(**task))
        elif name == "queue":
            found = {"queue_mb": queue_mb(folder, Task(**task))}
        elif name.startswith("write "):
            WRITERS[name.removeprefix("write ")](folder)
            found = {}
        else:
            found = run((CONTENDERS | OTHERS)[name], folder, Task(**task))
    except CannotError as error:
        found = {"cannot": str(error)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
