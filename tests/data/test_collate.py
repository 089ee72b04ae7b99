"""Batches: padded with black at the end in depth, with true depths only where that happened."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_train.data.augment_draw import Draw
from dist_train.data.collate import Batch, collate
from dist_train.data.dataset import Sample
from dist_train.data.native import NativeClips


def sample(depth: int, *, label: int = 0, clip: int = 0, value: int = 9) -> Sample:
    return Sample(torch.full((depth, 4, 5), value, dtype=torch.uint8), label, clip)


def test_clips_of_one_depth_are_stacked() -> None:
    batch = collate([sample(3, label=1, clip=7, value=1), sample(3, clip=2, value=2)])
    assert batch.volumes.shape == (2, 1, 3, 4, 5)
    assert batch.volumes.dtype == torch.uint8
    assert batch.volumes[:, 0, 0, 0, 0].tolist() == [1, 2]
    assert batch.frames is None
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [1.0, 0.0]
    assert batch.clips.dtype == torch.int64
    assert batch.clips.tolist() == [7, 2]


def test_shorter_clips_get_black_frames_at_their_end() -> None:
    batch = collate([sample(2), sample(5), sample(1)])
    assert batch.frames is not None
    assert batch.frames.dtype == torch.int64
    assert batch.frames.tolist() == [2, 5, 1]
    for row, depth in enumerate([2, 5, 1]):
        assert (batch.volumes[row, 0, :depth] == 9).all()
        assert (batch.volumes[row, 0, depth:] == 0).all()


def test_unlabelled_clip() -> None:
    assert collate([sample(2, label=-1)]).labels.tolist() == [-1.0]


def test_one_clip_is_never_padded() -> None:
    batch = collate([sample(6)])
    assert batch.frames is None
    assert batch.volumes.shape[2] == 6


def test_clips_of_other_sizes_are_not_mixed() -> None:
    other = Sample(torch.zeros(3, 6, 5, dtype=torch.uint8), 0, 0)
    with pytest.raises(RuntimeError, match="size"):
        collate([sample(3), other])


def test_host_parts_stay_on_the_host() -> None:
    batch = collate([sample(2), sample(3)]).to(torch.device("meta"))
    assert batch.volumes.device.type == batch.labels.device.type == "meta"
    assert batch.frames is not None
    assert batch.frames.device.type == batch.clips.device.type == "cpu"


@pytest.mark.parametrize("depths", [(2, 3), (2, 2)])
def test_shared(depths: tuple[int, int]) -> None:
    batch = collate([sample(depth) for depth in depths])
    before = batch.volumes.clone()
    assert batch.share_memory() is batch
    tensors = [batch.volumes, batch.labels, batch.clips]
    tensors += [] if batch.frames is None else [batch.frames]
    assert all(tensor.is_shared() for tensor in tensors)
    assert torch.equal(batch.volumes, before)


def packed(*shapes: tuple[int, int, int]) -> Batch:
    noise = np.random.default_rng(0)
    pictures = noise.normal(size=(2, 4, 4)).astype(np.float32)
    draws = [Draw(is_displaced=True, pictures=pictures), Draw(is_reversed=True)]
    return collate(
        [
            Sample(torch.from_numpy(noise.integers(0, 256, shape, dtype=np.uint8)), 1, 0, draw)
            for shape, draw in zip(shapes, draws, strict=True)
        ]
    )


def test_clips_with_draws_keep_their_sizes() -> None:
    batch = packed((3, 5, 6), (2, 9, 4))
    clips = batch.volumes
    assert isinstance(clips, NativeClips)
    assert clips.shapes == ((3, 5, 6), (2, 9, 4))
    assert clips.pixels.shape == (3 * 5 * 6 + 2 * 9 * 4,)
    assert clips.pictures.shape == (2, 4, 4)
    assert [draw.is_reversed for draw in clips.draws] == [False, True]
    assert batch.frames is not None
    assert batch.frames.tolist() == [3, 2]
    assert packed((3, 5, 6), (3, 9, 4)).frames is None


def test_clips_of_their_own_sizes_are_shared_and_moved() -> None:
    batch = packed((3, 5, 6), (2, 9, 4))
    assert isinstance(batch.volumes, NativeClips)
    before = batch.volumes.pixels.clone()
    assert batch.share_memory() is batch
    assert all(tensor.is_shared() for tensor in batch.volumes.tensors)
    assert torch.equal(batch.volumes.pixels, before)
    moved = batch.to(torch.device("meta")).volumes
    assert isinstance(moved, NativeClips)
    assert all(tensor.device.type == "meta" for tensor in moved.tensors)


def test_clips_without_pictures_are_shared_too() -> None:
    batch = collate([Sample(torch.zeros(2, 3, 4, dtype=torch.uint8), 0, 0, Draw())]).share_memory()
    assert isinstance(batch.volumes, NativeClips)
    assert len(batch.volumes.pictures) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned() -> None:
    batch: Batch = collate([sample(2), sample(3)]).pin_memory()
    assert batch.volumes.is_pinned()
    assert batch.labels.is_pinned()
