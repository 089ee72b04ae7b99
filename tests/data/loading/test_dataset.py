"""Slot -> clip: cut, resized, augmented, in that order and the same every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from make_media import store_of

from dist_train.config import AugmentSettings
from dist_train.data.augment.cpu import Augment, augmented
from dist_train.data.augment.draw import Draw
from dist_train.data.augment.resize import resize
from dist_train.data.loading.collate import collate
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.sampler import Slot
from dist_train.data.store.reader import Store

STILL = AugmentSettings(flip=0, rotate90=0, reverse=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three clips; every frame of clip c is filled with its own number."""
    clips = [
        np.broadcast_to(np.arange(depth, dtype=np.uint8)[:, None, None], (depth, height, width))
        for depth, height, width in [(30, 8, 9), (10, 20, 12), (3, 16, 16)]
    ]
    return store_of(tmp_path_factory.mktemp("dataset"), clips, label=[1, 0, 1])


def volume_of(dataset: ClipDataset, slot: Slot) -> torch.Tensor:
    """One clip as the model sees it, uint8 [D, H, W]."""
    volumes = collate(dataset, [slot]).volumes
    assert isinstance(volumes, torch.Tensor)
    return volumes[0, 0]


def frames_of(volume: torch.Tensor) -> list[int]:
    return volume[:, 0, 0].tolist()


def test_whole_clip(store: Store) -> None:
    dataset = ClipDataset(store, size=(16, 16), max_frames=None, augment=None)
    for clip, (depth, label) in enumerate([(30, 1), (10, 0), (3, 1)]):
        batch = collate(dataset, [Slot(clip, 0)])
        volume = volume_of(dataset, Slot(clip, 0))
        assert volume.dtype == torch.uint8
        assert volume.shape == (depth, 16, 16)
        assert volume.is_contiguous()
        assert frames_of(volume) == list(range(depth))
        assert (batch.labels.tolist(), batch.clips.tolist()) == ([label], [clip])


def test_middle_is_taken_without_augmentation(store: Store) -> None:
    dataset = ClipDataset(store, size=(8, 8), max_frames=10, augment=None)
    assert frames_of(volume_of(dataset, Slot(0, 0))) == list(range(10, 20))
    assert frames_of(volume_of(dataset, Slot(0, 5))) == list(range(10, 20))
    assert len(volume_of(dataset, Slot(1, 0))) == 10
    assert len(volume_of(dataset, Slot(2, 0))) == 3


def test_place_of_the_cut_is_random_in_training_and_keyed(store: Store) -> None:
    first, second = (
        ClipDataset(store, size=(8, 8), max_frames=10, augment=Augment(STILL, seed=4))
        for _ in range(2)
    )
    starts = []
    for epoch in range(300):
        frames = frames_of(volume_of(first, Slot(0, epoch)))
        assert frames == list(range(frames[0], frames[0] + 10))
        starts.append(frames[0])
    assert set(starts) == set(range(21)), "every place is reached, also the first and the last"
    assert [frames_of(volume_of(second, Slot(0, e)))[0] for e in (299, 0, 7)] == [
        starts[e] for e in (299, 0, 7)
    ]


def test_augmentation_is_keyed_by_the_slot(store: Store) -> None:
    augment = Augment(AugmentSettings(reverse=0.5, flip=0, rotate90=0), seed=0)
    dataset = ClipDataset(store, size=(16, 16), max_frames=None, augment=augment)
    for epoch in range(20):
        expected = augment(resize(store.read(0), (16, 16)), epoch=epoch, number=0)
        np.testing.assert_array_equal(volume_of(dataset, Slot(0, epoch)).numpy(), expected)


def test_on_the_device_clips_keep_their_size_and_the_draw_goes_along(store: Store) -> None:
    settings = AugmentSettings(reverse=0.5, shift_scale_rotate=1, device=True)
    host, device = (
        ClipDataset(
            store,
            size=(16, 16),
            max_frames=10,
            augment=Augment(settings, seed=0),
            on_device=on_device,
        )
        for on_device in (False, True)
    )
    for epoch in range(6):
        there = np.empty(device.native_shape(0), np.uint8)
        draw = device.fill_native(there, Slot(0, epoch))
        assert there.shape == (10, 8, 9)
        clip = augmented(resize(there, (16, 16)), draw)
        np.testing.assert_array_equal(volume_of(host, Slot(0, epoch)).numpy(), clip)


def test_on_the_device_without_augmentation_nothing_is_drawn(store: Store) -> None:
    dataset = ClipDataset(store, size=(16, 16), max_frames=None, augment=None, on_device=True)
    clip = np.empty(dataset.native_shape(1), np.uint8)
    assert clip.shape == (10, 20, 12)
    assert str(dataset.fill_native(clip, Slot(1, 0))) == str(Draw())
