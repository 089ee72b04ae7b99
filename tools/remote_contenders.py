"""The loaders that tools/bench_loader.py --remote compares, each run in a process of its own.

    python tools/remote_contenders.py NAME FOLDER TASK.json

Each reads the clips of ``loader_contenders`` from an S3 server, or the web, with an empty cache of
its own, for two epochs. The work on a clip is the same for all.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from loader_contenders import (
    CLASSES,
    RATIO,
    SEED,
    SIZE,
    Task,
    of_torch,
    one_thread,
    padded,
    plan_of,
    prepared,
    raw_clips,
    read_labels,
    rows_of,
    write_webdataset,
)
from torch import Tensor

from dist_train.config import CacheSettings, LoaderSettings
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.loader import Loader
from dist_train.data.loading.sampler import PlanSampler
from dist_train.data.store.reader import Store

EPOCHS = 2
#: Bytes of a file of the peers that have a size for them.
CHUNK = 1 << 26


@dataclass(frozen=True)
class RemoteTask(Task):
    """
    Attributes:
        endpoint: URL of the server; "" reads our store from the disk.
        bucket: has everything that was written for the contenders.
        cache: an empty folder.
    """

    endpoint: str = ""
    bucket: str = ""
    cache: str = ""

    def s3(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"


#: Each pass over the clips.
Passes = Callable[[Path, RemoteTask], Iterator[Iterable[Any]]]


# --- ours -----------------------------------------------------------------------------------------


def ours(folder: Path, task: RemoteTask, *, on_device: bool = False) -> Iterator[Iterable[Any]]:
    place = task.s3("store") if task.endpoint else folder / "store"
    store = Store(place, CacheSettings(dir=Path(task.cache)))
    clips = ClipDataset(store, size=SIZE, max_frames=None, augment=None, on_device=on_device)
    labels = store.table["label"].tolist()
    steps, plan = len(labels) // task.batch, plan_of(labels, task)
    store.expect(steps * task.batch)
    sampler = PlanSampler(plan, rank=0, world=1, accumulate=1, first=0, last=EPOCHS * steps)
    loader = Loader(clips, sampler, LoaderSettings(workers=task.workers, prefetch=task.prefetch))
    batches = iter(loader)
    first = next(batches)
    # Peers give no batch before their workers have started.
    loader.wait()
    yield chain([first], islice(batches, steps - 1))
    yield islice(batches, steps)


def ours_native(folder: Path, task: RemoteTask) -> Iterator[Iterable[Any]]:
    """Clips at their own sizes, packed, for a device to resize."""
    return ours(folder, task, on_device=True)


# --- WebDataset, over the web: it knows S3 by programs of others alone ----------------------------


def of_webdataset(folder: Path, task: RemoteTask) -> Iterator[Iterable[Any]]:
    import webdataset

    def clips(name: str) -> Any:
        names = sorted(path.name for path in (folder / "webdataset" / name).glob("*.tar"))
        read = webdataset.WebDataset(
            [f"{task.endpoint}/{task.bucket}/webdataset/{name}/{each}" for each in names],
            shardshuffle=len(names),
            cache_dir=str(Path(task.cache) / name),
        )
        return read.shuffle(100).decode().to_tuple("npy").map(lambda sample: prepared(sample[0]))

    for name in CLASSES:
        (Path(task.cache) / name).mkdir()
    mix = webdataset.RandomMix([clips(name) for name in CLASSES], probs=RATIO[::-1])
    batches = webdataset.DataPipeline(mix, webdataset.batched(task.batch, collation_fn=padded))
    loader = of_torch(batches, task, batch_size=None)
    for _ in range(EPOCHS):
        yield loader


# --- MosaicML Streaming ---------------------------------------------------------------------------


def stand_in_for_torchvision() -> None:
    """Streaming imports it for data sets that are not used here; its wheel does not load beside a
    CPU build of PyTorch."""
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        module = types.ModuleType(f"torchvision{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    vars(sys.modules["torchvision.datasets"])["VisionDataset"] = object
    vars(sys.modules["torchvision.transforms.functional"])["to_tensor"] = None
    # Otherwise it would ask the stand-in for what it lacks.
    import transformers.utils.import_utils as asked

    asked.is_torchvision_available = lambda: False


def write_streaming(folder: Path) -> None:
    stand_in_for_torchvision()
    from streaming import MDSWriter  # type: ignore[import-not-found, unused-ignore]

    for label, name in enumerate(CLASSES):
        out = str(folder / "streaming" / name)
        with MDSWriter(out=out, columns={"x": "ndarray:uint8"}, size_limit=CHUNK) as writer:
            for _, of_clip, clip in raw_clips(folder):
                if of_clip == label:
                    writer.write({"x": clip})


def of_streaming(folder: Path, task: RemoteTask) -> Iterator[Iterable[Any]]:
    stand_in_for_torchvision()
    from streaming import Stream, StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found, unused-ignore]
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found, unused-ignore]

    clean_stale_shared_memory()

    class Clips(StreamingDataset):  # type: ignore[misc, unused-ignore]
        def __getitem__(self, number: int) -> Tensor:
            return prepared(super().__getitem__(number)["x"])

    streams = [
        Stream(
            remote=task.s3(f"streaming/{name}"),
            local=str(Path(task.cache) / name),
            proportion=part / sum(RATIO),
        )
        for name, part in zip(CLASSES, RATIO[::-1], strict=True)
    ]
    clips = Clips(
        streams=streams,
        batch_size=task.batch,
        shuffle=True,
        shuffle_seed=SEED,
        batching_method="stratified",
        epoch_size=len(read_labels(folder)),
    )
    loader = StreamingDataLoader(
        clips,
        batch_size=task.batch,
        collate_fn=padded,
        num_workers=task.workers,
        prefetch_factor=task.prefetch,
        worker_init_fn=one_thread,
        persistent_workers=True,
    )
    for _ in range(EPOCHS):
        yield loader


# --- LitData --------------------------------------------------------------------------------------


def write_litdata(folder: Path) -> None:
    from litdata import optimize  # type: ignore[import-not-found, unused-ignore]

    by_class: list[list[str]] = [[], []]
    for number, label in enumerate(read_labels(folder)):
        by_class[label].append(str(folder / "raw" / f"{number:06d}.npy"))
    for name, paths in zip(CLASSES, by_class, strict=True):
        optimize(
            fn=_load,
            inputs=paths,
            output_dir=str(folder / "litdata" / name),
            chunk_bytes=CHUNK,
            num_workers=1,
            reorder_files=False,
            verbose=False,
        )


def _load(path: str) -> dict[str, Any]:
    return {"x": np.load(path)}


def of_litdata(folder: Path, task: RemoteTask) -> Iterator[Iterable[Any]]:
    from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found, unused-ignore]
    from litdata.streaming import downloader  # type: ignore[import-not-found, unused-ignore]

    # Otherwise it knows no server without TLS.
    vars(downloader)["_OBSTORE_CLIENT_OPTIONS"]["allow_http"] = True

    class Clips(StreamingDataset):  # type: ignore[misc, unused-ignore]
        def __getitem__(self, number: Any) -> Tensor:
            return prepared(super().__getitem__(number)["x"])

    parts = [
        Clips(
            task.s3(f"litdata/{name}"),
            cache_dir=str(Path(task.cache) / name),
            shuffle=True,
            seed=SEED,
            storage_options={"endpoint_url": task.endpoint},
        )
        for name in CLASSES
    ]
    shares = [part / sum(RATIO) for part in RATIO[::-1]]
    mix = CombinedStreamingDataset(parts, seed=SEED, weights=shares, iterate_over_all=False)
    loader = StreamingDataLoader(
        mix,
        batch_size=task.batch,
        collate_fn=padded,
        num_workers=task.workers,
        prefetch_factor=task.prefetch,
        worker_init_fn=one_thread,
        drop_last=True,
        persistent_workers=True,
    )
    for _ in range(EPOCHS):
        yield loader


CONTENDERS: dict[str, Passes] = {
    "ours": ours,
    "ours, native": ours_native,
    "ours, local": ours,
    "WebDataset": of_webdataset,
    "Streaming": of_streaming,
    "LitData": of_litdata,
}
WRITERS: dict[str, Callable[[Path], None]] = {
    "WebDataset": write_webdataset,
    "Streaming": write_streaming,
    "LitData": write_litdata,
}


def run(passes: Passes, folder: Path, task: RemoteTask) -> dict[str, Any]:
    """Clips a second of each epoch after the warm-up, and processor time of a clip: of
    ``task.batches``, or to the end of the epoch if that is 0."""
    rates, times, first = [], [], 0.0
    began = time.perf_counter()
    for batches in passes(folder, task):
        clips, timed, ended, used, spent = 0, began, 0.0, 0.0, 0.0
        for number, batch in enumerate(batches):
            now = time.perf_counter()
            first = first or now - began
            if number == task.warm_up:
                timed, used = now, processor_s()
            elif number > task.warm_up and not ended:
                clips += len(rows_of(batch))
                # The rest of the epoch only fills the cache.
                if number == task.warm_up + task.batches:
                    ended, spent = now, processor_s()
        if not ended:
            ended, spent = time.perf_counter(), processor_s()
        rates.append(clips / (ended - timed))
        times.append(1000 * (spent - used) / clips)
        began = time.perf_counter()
    return {"clips_per_second": rates, "processor_ms": times, "first_batch_s": first}


def processor_s() -> float:
    """Processor time of this process and all that it started and are not gone."""
    me = psutil.Process()
    return sum(sum(each.cpu_times()[:4]) for each in (me, *me.children(recursive=True)))


def main() -> None:
    name, folder, task = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if name.startswith("write "):
        WRITERS[name.removeprefix("write ")](folder)
        found: dict[str, Any] = {}
    else:
        found = run(CONTENDERS[name], folder, RemoteTask(**task))
    # Streaming and LitData print to standard output, and LitData's threads may outlive the rest.
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
