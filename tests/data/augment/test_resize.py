"""Resizing by OpenCV, and by the equivalent matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_train.data.augment.resize import resize, resize_weights

CPU = torch.device("cpu")


def test_resize_to_its_own_size_is_the_clip() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, 7, 9), dtype=np.uint8)
    assert resize(clip, (7, 9)) is clip


def test_shrinking_averages_areas() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, 12, 20), dtype=np.uint8)
    blocks = clip.reshape(3, 6, 2, 10, 2).mean(axis=(2, 4))
    assert np.abs(resize(clip, (6, 10)) - blocks).max() <= 0.5


def test_growing_interpolates() -> None:
    ramp = np.tile(np.arange(0, 200, 20, dtype=np.uint8), (2, 10, 1))
    grown = resize(ramp, (10, 40)).astype(int)
    assert grown.shape == (2, 10, 40)
    steps = np.diff(grown, axis=2)
    assert steps.min() >= 0
    assert steps.max() <= 6


def test_an_axis_that_shrinks_is_averaged_beside_one_that_grows() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, 12, 20), dtype=np.uint8)
    rows = clip.reshape(3, 6, 2, 20).mean(axis=2)
    assert np.abs(resize(clip, (6, 40))[:, :, 1::2][:, :, :-1]
                  - (0.75 * rows[:, :, :-1] + 0.25 * rows[:, :, 1:])).max() <= 1.5  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (40, 5)])
def test_any_size(size: tuple[int, int]) -> None:
    clip = np.full((2, 11, 13), 77, np.uint8)
    resized = resize(clip, size)
    assert resized.shape == (2, *size)
    assert resized.dtype == np.uint8
    assert (resized == 77).all()


@pytest.mark.parametrize("native", [(64, 64), (30, 41), (70, 133), (128, 96), (40, 100), (1, 3)])
def test_the_matrices_do_the_same_to_a_grey_level(native: tuple[int, int]) -> None:
    """On white noise. OpenCV rounds to grey levels (twice if one axis grows and one shrinks), and
    bilinear weights to 1/2048."""
    clip = np.random.default_rng(0).integers(0, 256, (4, *native), dtype=np.uint8)
    rows, columns = (resize_weights(length, 64, CPU) for length in native)
    ours = rows @ (torch.from_numpy(clip).float() @ columns.T)
    assert np.abs(ours.numpy() - resize(clip, (64, 64))).max() <= 1.2
    for weights in (rows, columns):
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(64))


def test_the_matrix_of_the_same_size_changes_nothing() -> None:
    assert torch.equal(resize_weights(9, 9, CPU), torch.eye(9))
