"""Batches: padded with black at the end in depth, with true depths only where that happened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from make_media import store_of
from tables import table_of

from dist_train.data.augment.draw import Draw
from dist_train.data.augment.packed_clips import NativeClips, pack
from dist_train.data.loading.collate import Batch, collate, fill, size_of
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.sampler import Slot

DEPTHS, LABELS = (2, 5, 1, 5), (0, 1, 0, 1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipDataset:
    """Clip c is filled with c + 1; the last has no label."""
    folder = tmp_path_factory.mktemp("collate")
    arrays = [np.full((depth, 8, 9), clip + 1, np.uint8) for clip, depth in enumerate(DEPTHS)]
    store = store_of(folder, arrays, label=LABELS)
    store.table = table_of(store.table.frame().assign(label=[*LABELS[:3], -1]))
    return ClipDataset(store, size=(4, 5), max_frames=None, augment=None)


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
    used = torch.full((size_of(clips, slots),), 255, dtype=torch.uint8)
    batch = fill(used, clips, slots)
    assert batch.volumes.data_ptr() == used.data_ptr()
    assert batch.frames is not None
    assert batch.frames.dtype == torch.int64
    assert batch.frames.tolist() == [2, 5, 1]
    for row, depth in enumerate([2, 5, 1]):
        assert (batch.volumes[row, 0, :depth] == row + 1).all()
        assert (batch.volumes[row, 0, depth:] == 0).all()


def packed_noise(*shapes: tuple[int, int, int]) -> Batch:
    noise = np.random.default_rng(0)
    pictures = noise.normal(size=(2, 4, 4)).astype(np.float32)
    draws = [Draw(is_displaced=True, pictures=pictures), Draw(is_reversed=True)][: len(shapes)]
    clips = [torch.from_numpy(noise.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    none = torch.zeros(len(shapes))
    return Batch(pack(clips, draws), None, none, none.long())


def test_clips_for_the_device_lie_one_behind_the_other(clips: ClipDataset) -> None:
    native = ClipDataset(clips.store, size=(4, 5), max_frames=4, augment=None, on_device=True)
    slots = [Slot(clip, 0) for clip in (0, 1, 2)]
    used = torch.full((size_of(native, slots),), 255, dtype=torch.uint8)
    batch = fill(used, native, slots)
    assert isinstance(batch.volumes, NativeClips)
    assert batch.volumes.pixels.data_ptr() == used.data_ptr()
    assert batch.volumes.shapes == ((2, 8, 9), (4, 8, 9), (1, 8, 9))
    expected = [number + 1 for number, depth in enumerate((2, 4, 1)) for _ in range(depth * 8 * 9)]
    assert batch.volumes.pixels.tolist() == expected
    assert batch.frames is not None
    assert batch.frames.tolist() == [2, 4, 1]
    assert batch.labels.tolist() == [0.0, 1.0, 0.0]
    alone = fill(torch.empty(4 * 8 * 9, dtype=torch.uint8), native, slots[1:2])
    assert alone.frames is None


@pytest.mark.parametrize("native", [False, True])
def test_shared_and_moved(clips: ClipDataset, native: bool) -> None:
    batch = packed_noise((3, 5, 6), (2, 9, 4)) if native else batch_of(clips, 0, 1)
    before = [tensor.clone() for tensor in batch.pixels]
    assert batch.share_memory() is batch
    tensors = [*batch.pixels, batch.labels, batch.clips]
    tensors += [] if batch.frames is None else [batch.frames]
    assert all(tensor.is_shared() for tensor in tensors)
    assert all(map(torch.equal, batch.pixels, before))
    moved = batch.to(torch.device("meta"))
    assert all(tensor.device.type == "meta" for tensor in (*moved.pixels, moved.labels))
    assert moved.frames is batch.frames
    assert moved.clips is batch.clips


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned(clips: ClipDataset) -> None:
    batch = batch_of(clips, 0, 1).pin_memory()
    assert batch.volumes.is_pinned()
    assert batch.labels.is_pinned()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_part_of_a_batch_has_the_clips_in_its_place(clips: ClipDataset, on_device: bool) -> None:
    dataset = ClipDataset(
        clips.store, size=(4, 5), max_frames=None, augment=None, on_device=on_device
    )
    batch = batch_of(dataset, 0, 1, 2, 3)
    part = batch.part(1, 3)
    assert part.clips.tolist() == [1, 2]
    assert part.labels.tolist() == batch.labels[1:3].tolist()
    assert part.frames is not None
    assert part.frames.tolist() == [5, 1]
    if isinstance(part.volumes, NativeClips):
        assert part.volumes.shapes == ((5, 8, 9), (1, 8, 9))
        assert part.volumes.pixels.tolist() == [2] * (5 * 72) + [3] * 72
        assert len(part.volumes.draws) == 2
    else:
        assert torch.equal(part.volumes, batch.volumes[1:3])
    assert batch.part(3, 9).clips.tolist() == [3]
