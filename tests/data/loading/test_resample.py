"""Resampling to one spacing and frame rate: lengths, values, and what the loader makes of it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from array_store import array_store
from hypothesis import given
from hypothesis import strategies as st

from dist_train.config import AugmentSettings
from dist_train.data.augment.cpu import Augment
from dist_train.data.augment.packed_clips import NativeClips
from dist_train.data.augment.resize import resize
from dist_train.data.loading.collate import collate
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.resample import fit, resample_depth, resampling_of
from dist_train.data.loading.sampler import Slot
from dist_train.data.store.reader import Store
from dist_train.errors import StoreError


def ramp(depth: int, dtype: str = "uint16") -> np.ndarray:
    """Frame j, centred at j + 1/2, has 100 (j + 1/2)."""
    values = 100 * (np.arange(depth) + 0.5)
    return np.broadcast_to(values[:, None, None], (depth, 8, 8)).astype(dtype)


@given(st.integers(1, 40), st.floats(0.1, 8), st.data())
def test_a_ramp_stays_a_ramp(depth: int, step: float, data: st.DataObject) -> None:
    """Linear interpolation is exact on it, and ends are held."""
    frames = max(1, int(np.floor(depth / step + 0.5)))
    start = data.draw(st.integers(0, frames - 1))
    count = data.draw(st.integers(1, frames - start))
    new = resample_depth(ramp(depth), step, start, count)
    centres = ((np.arange(start, start + count) + 0.5) * step).clip(0.5, depth - 0.5)
    np.testing.assert_allclose(new[:, 0, 0], 100 * centres, atol=0.6)
    assert new.dtype == np.uint16


def test_the_same_step_is_the_same_clip() -> None:
    np.testing.assert_array_equal(resample_depth(ramp(9), 1.0, 2, 5), ramp(9)[2:7])


def test_frames_of_a_larger_size_are_cropped_and_of_a_smaller_one_padded() -> None:
    clip = np.arange(2 * 6 * 4, dtype=np.uint8).reshape(2, 6, 4) + np.uint8(1)
    out = np.empty((2, 4, 6), np.uint8)
    fit(clip, (6, 4), (4, 6), out)
    np.testing.assert_array_equal(out[:, :, 1:5], clip[:, 1:5])
    assert (out[:, :, [0, 5]] == 0).all()


def store_of(folder: Path, about: dict[str, object] | None) -> Store:
    clips = [(ramp(depth, "uint8"), {"label": depth % 2}) for depth in (2, 1)]
    return Store(array_store(folder / "store", clips, about=about))


def test_depths_and_pixels_of_a_dataset(tmp_path: Path) -> None:
    """Frames of 0.5 um become frames of 0.25 um; pixels of 1 um become pixels of 2 um."""
    about = {"spacing": [0.5, 1.0, 1.0], "interval": 0.1}
    store = store_of(tmp_path, about)
    spacing = resampling_of(store, (0.25, 2.0, 2.0), None)
    assert spacing is not None
    assert spacing.frames([0, 1]).tolist() == [4, 2]
    augment = Augment(AugmentSettings(flip=0, rotate90=0, reverse=0), 0)
    for on_device in (False, True):
        dataset = ClipDataset(
            store, size=(8, 8), max_frames=3, augment=augment, on_device=on_device,
            resampling=spacing,
        )  # fmt: skip
        assert dataset.depths([0, 1]).tolist() == [3, 2]
        batch = collate(dataset, [Slot(0, 0), Slot(1, 0)])
        if isinstance(batch.volumes, NativeClips):
            assert batch.volumes.shapes == ((3, 8, 8), (2, 8, 8))
            clip = batch.volumes.pixels[: 3 * 64].view(3, 8, 8)
        else:
            clip = batch.volumes[0, 0]
        # 50 and 150 at the centres become 50, 75, 125 and 150, of which three are taken.
        taken = clip[:, 4, 4].tolist()
        assert taken in ([50, 75, 125], [75, 125, 150])
        # 8 pixels of 1 um are 4 of 2 um, in the middle of black.
        assert clip[0, 2:6, 2:6].min() == taken[0]
        assert clip[0].sum() == 16 * taken[0]
    faster = resampling_of(store, None, 20.0)
    assert faster is not None
    assert (faster.frames([0, 1]).tolist(), faster.resizes) == ([4, 2], False)
    held = ClipDataset(store, size=(4, 4), max_frames=None, augment=None, resampling=faster)
    copied = pickle.dumps(held)
    assert len(copied) < 10_000, "a path, no columns"
    volumes = collate(pickle.loads(copied), [Slot(0, 0)]).volumes
    assert isinstance(volumes, torch.Tensor)
    assert volumes[0, 0, :, 0, 0].tolist() == [50, 75, 125, 150]


def test_each_clip_by_its_own_spacing(tmp_path: Path) -> None:
    """In-plane spacing alone changes no depth, and equals the resize at equal size."""
    store = store_of(tmp_path, {"spacing": [None, 1.0, 2.0]} | {"interval": None})
    plane = resampling_of(store, (None, 2.0, 2.0), None)
    assert plane is not None
    assert plane.frames([0, 1]).tolist() == [2, 1]
    assert (plane.size(0), plane.size(1)) == ((4, 8), (4, 8))
    dataset = ClipDataset(store, size=(4, 8), max_frames=None, augment=None, resampling=plane)
    volumes = collate(dataset, [Slot(0, 0)]).volumes
    assert isinstance(volumes, torch.Tensor)
    np.testing.assert_array_equal(volumes[0, 0].numpy(), resize(store.read(0), (4, 8)))


@pytest.mark.parametrize(
    ("spacing", "fps", "told"),
    [
        ((1.0, None, None), None, "2 of 2 clips do not say their spacing, the first is 0000.npy"),
        (None, 5.0, "2 of 2 clips do not say their interval between frames"),
    ],
)
def test_clips_without_the_metadata_are_refused(
    tmp_path: Path, spacing: tuple[float, None, None] | None, fps: float | None, told: str
) -> None:
    with pytest.raises(StoreError, match=told):
        resampling_of(store_of(tmp_path, None), spacing, fps)


def test_a_spacing_in_another_unit_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"spacing": [1.0, 1.0, 1.0]})
    with pytest.raises(StoreError, match="would be resampled from 8 to 80000 voxels"):
        resampling_of(store, (None, 1e-4, 1e-4), None)
