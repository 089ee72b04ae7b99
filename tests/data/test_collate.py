"""Batches: padded with black at the end in depth, with true depths only where that happened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from make_media import write_manifest

from dist_train.data.collate import Batch, collate, fill, shape_of
from dist_train.data.dataset import ClipDataset
from dist_train.data.prepare import PrepareSettings, prepare
from dist_train.data.sampler import Slot
from dist_train.data.store import Store

DEPTHS, LABELS = (2, 5, 1, 5), (0, 1, 0, 1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipDataset:
    """Clip c is filled with c + 1; the last has no label."""
    folder = tmp_path_factory.mktemp("collate")
    (folder / "raw").mkdir()
    for clip, depth in enumerate(DEPTHS):
        np.save(folder / "raw" / f"{clip}.npy", np.full((depth, 8, 9), clip + 1, np.uint8))
    names = [f"{clip}.npy" for clip in range(len(DEPTHS))]
    manifest = write_manifest(folder / "clips.csv", names, list(LABELS))
    prepare(manifest, folder / "raw", folder / "store", PrepareSettings(roi="none"), workers=1)
    dataset = ClipDataset(Store(folder / "store"), size=(4, 5), max_frames=None, augment=None)
    dataset.labels = np.array([*LABELS[:3], -1])
    return dataset


def batch_of(clips: ClipDataset, *numbers: int) -> Batch:
    return collate(clips, [Slot(number, 0) for number in numbers])


def test_clips_of_one_depth_are_stacked(clips: ClipDataset) -> None:
    batch = batch_of(clips, 3, 1)
    assert batch.volumes.shape == (2, 1, 5, 4, 5)
    assert batch.volumes.dtype == torch.uint8
    assert (batch.volumes[0] == 4).all()
    assert (batch.volumes[1] == 2).all()
    assert batch.frames is None
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [-1.0, 1.0]
    assert batch.clips.dtype == torch.int64
    assert batch.clips.tolist() == [3, 1]


def test_shorter_clips_get_black_frames_at_their_end(clips: ClipDataset) -> None:
    slots = [Slot(clip, 0) for clip in (0, 1, 2)]
    # Of the batch before it, as in the arena.
    used = torch.full(shape_of(clips, slots), 255, dtype=torch.uint8)
    batch = fill(used, clips, slots)
    assert batch.volumes.data_ptr() == used.data_ptr()
    assert batch.frames is not None
    assert batch.frames.dtype == torch.int64
    assert batch.frames.tolist() == [2, 5, 1]
    for row, depth in enumerate([2, 5, 1]):
        assert (batch.volumes[row, 0, :depth] == row + 1).all()
        assert (batch.volumes[row, 0, depth:] == 0).all()


def test_one_clip_is_never_padded(clips: ClipDataset) -> None:
    batch = batch_of(clips, 0)
    assert batch.frames is None
    assert batch.volumes.shape[2] == 2


def test_host_parts_stay_on_the_host(clips: ClipDataset) -> None:
    batch = batch_of(clips, 0, 1).to(torch.device("meta"))
    assert batch.volumes.device.type == batch.labels.device.type == "meta"
    assert batch.frames is not None
    assert batch.frames.device.type == batch.clips.device.type == "cpu"


@pytest.mark.parametrize("numbers", [(0, 1), (1, 3)])
def test_shared(clips: ClipDataset, numbers: tuple[int, ...]) -> None:
    batch = batch_of(clips, *numbers)
    before = batch.volumes.clone()
    assert batch.share_memory() is batch
    tensors = [batch.volumes, batch.labels, batch.clips]
    tensors += [] if batch.frames is None else [batch.frames]
    assert all(tensor.is_shared() for tensor in tensors)
    assert torch.equal(batch.volumes, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned(clips: ClipDataset) -> None:
    batch = batch_of(clips, 0, 1).pin_memory()
    assert batch.volumes.is_pinned()
    assert batch.labels.is_pinned()
