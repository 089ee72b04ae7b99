"""The loader: the sampler's batches, whatever the workers; errors that name the clip."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from make_media import write_manifest, write_volumes

from dist_train.config import AugmentSettings, LoaderSettings
from dist_train.data.augment import Augment
from dist_train.data.collate import Batch
from dist_train.data.dataset import ClipDataset
from dist_train.data.loader import Loader
from dist_train.data.plan import make_plan
from dist_train.data.prepare import PrepareSettings, prepare
from dist_train.data.sampler import HeldOutSampler, PlanSampler
from dist_train.data.shards import shard_name
from dist_train.data.store import SHARDS, Store
from dist_train.errors import StoreError

EVERYTHING = AugmentSettings(**dict.fromkeys(AugmentSettings.model_fields, 0.5))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    names = write_volumes(tmp_path / "raw", 24)
    manifest = write_manifest(tmp_path / "clips.csv", names)
    settings = PrepareSettings(roi="none", shard_clips=6)
    prepare(manifest, tmp_path / "raw", tmp_path / "store", settings, workers=1)
    return Store(tmp_path / "store")


def batches(store: Store, workers: int, *, passes: int = 1) -> list[Batch]:
    labels = store.table["label"].to_numpy()
    plan = make_plan(
        np.flatnonzero(labels == 1), np.flatnonzero(labels == 0), batch=4, ratio=(1, 1), seed=0
    )
    sampler = PlanSampler(plan, rank=0, world=1, accumulate=1, first=0, last=14)
    dataset = ClipDataset(store, size=(12, 12), max_frames=6, augment=Augment(EVERYTHING, 0))
    loader = Loader(dataset, sampler, LoaderSettings(workers=workers))
    return [batch for _ in range(passes) for batch in loader]


def assert_same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.volumes, other.volumes)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.clips, other.clips)
        assert (one.frames is None) == (other.frames is None)
        assert one.frames is None or torch.equal(one.frames, other.frames)


def test_batches_do_not_depend_on_the_workers(store: Store) -> None:
    alone = batches(store, 0)
    assert len(alone) == 14
    assert any(batch.frames is not None for batch in alone)
    for workers in (1, 2):
        assert_same(batches(store, workers), alone)


def test_workers_that_live_on_give_the_same_again(store: Store) -> None:
    twice = batches(store, 2, passes=2)
    assert_same(twice[:14], twice[14:])


def test_held_out_clips_all_come(store: Store) -> None:
    clips = list(range(24))
    sampler = HeldOutSampler(clips, store.table["frames"].tolist(), rank=0, world=1, batch=5)
    dataset = ClipDataset(store, size=(12, 12), max_frames=None, augment=None)
    loader = Loader(dataset, sampler, LoaderSettings(workers=0))
    assert sorted(clip for batch in loader for clip in batch.clips.tolist()) == clips


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_clip_is_named_by_its_key(store: Store, workers: int) -> None:
    clip = store.clip_of("clip008")
    row = store.table.iloc[clip]
    path = store.folder / SHARDS / shard_name(int(row["shard"]))
    content = bytearray(path.read_bytes())
    content[int(row["offset"])] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(StoreError, match="clip 'clip008' cannot be read") as caught:
        batches(store, workers)
    assert "\n" not in str(caught.value)
    assert caught.value.where == path


WAIT_WITH_WORKERS = """
import sys
from pathlib import Path
from dist_train.config import LoaderSettings
from dist_train.data.dataset import ClipDataset
from dist_train.data.loader import Loader
from dist_train.data.sampler import HeldOutSampler
from dist_train.data.store import Store

store = Store(Path(sys.argv[1]))
clips = HeldOutSampler([0, 1, 2, 3], [1, 1, 1, 1], rank=0, world=1, batch=1)
dataset = ClipDataset(store, size=(8, 8), max_frames=4, augment=None)
batches = iter(Loader(dataset, clips, LoaderSettings(workers=2, prefetch=1)))
next(batches)
print("ready", flush=True)
sys.stdin.read()
"""


def test_workers_end_with_a_killed_parent(store: Store) -> None:
    """Their parent, for the system, is the fork server, so PyTorch's own watch does not see it."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT_WITH_WORKERS, str(store.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3, "a fork server, two workers"
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    process.communicate()
    assert alive == []
