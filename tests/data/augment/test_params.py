"""Draws: each parameter is uniform in its range, and depends on the key only."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from helpers import CHANGES
from uniform import assert_even, assert_share

from dist_train.config import AugmentSettings
from dist_train.data.augment.draw import Draw
from dist_train.data.augment.params import AugmentSampler
from dist_train.data.orientation import IDENTITY

OFF = dict.fromkeys(CHANGES, 0.0)
SIZE = 40, 40
MANY = 600


@cache
def drawn(name: str, probability: float = 1.0) -> list[Draw]:
    drawer = AugmentSampler(AugmentSettings.model_validate(OFF | {name: probability}), seed=3)
    return [drawer(SIZE, epoch=0, number=number) for number in range(MANY)]


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_each_is_drawn_as_often_as_the_settings_say(probability: float) -> None:
    for hits in (
        [d.affine is not None for d in drawn("shift_scale_rotate", probability)],
        [d.is_displaced for d in drawn("distort", probability)],
        [d.is_noisy or d.kernel is not None for d in drawn("blur_noise", probability)],
        [d.is_reversed for d in drawn("reverse", probability)],
        [d.orientation.rows_reversed for d in drawn("flip", probability)],
        [d.orientation.columns_reversed for d in drawn("flip", probability)],
    ):
        assert_share(hits, probability)


def test_the_four_turns_come_alike() -> None:
    turns = [IDENTITY.turned(times) for times in range(4)]
    for turn in turns:
        assert_share([d.orientation == turn for d in drawn("rotate90")], 1 / 4)


def test_affine_maps_are_of_even_angles_scales_and_shifts() -> None:
    matrices = np.stack([d.affine for d in drawn("shift_scale_rotate") if d.affine is not None])
    linear = matrices[:, :, :2]
    scales = np.linalg.norm(linear, axis=1)
    assert_even(scales[:, 0], 0.9, 1.1)
    assert_even(scales[:, 1], 0.9, 1.1)
    assert_even(np.degrees(np.arctan2(linear[:, 1, 0], linear[:, 0, 0])), -45, 45)
    middle = (np.array(SIZE) - 1) / 2
    shifts = matrices[:, :, 2] + linear @ middle - middle
    # Of 6 %, cut to whole pixels.
    assert set(np.rint(shifts).astype(int).ravel()) == set(range(-2, 3))
    np.testing.assert_allclose(shifts, np.rint(shifts), atol=1e-9)


def test_displacements_are_of_one_or_two_pixels_and_differ() -> None:
    here = np.stack(np.meshgrid(*map(np.arange, SIZE)))
    moved = [np.abs(d.pictures - here).mean() for d in drawn("distort")]
    assert all(d.pictures.shape == (2, *SIZE) for d in drawn("distort"))
    assert 0.02 < np.quantile(moved, 0.1) < np.quantile(moved, 0.9) < 3
    assert len({d.pictures.tobytes() for d in drawn("distort")}) == MANY


def test_tones_are_even() -> None:
    draws = drawn("brightness")
    changed = [d for d in draws if (d.contrast, d.brightness) != (1.0, 0.0)]
    assert_share([(d.contrast, d.brightness) != (1.0, 0.0) for d in draws], 0.8)
    assert_even([d.contrast for d in changed], 0.8, 1.2)
    assert_even([d.brightness for d in changed], -51, 51)
    bent = [d.gamma for d in draws if d.gamma != 1.0]
    assert_share([d.gamma != 1.0 for d in draws], 0.5)
    assert_even(bent, 0.8, 1.2)


def test_blur_and_noise_come_alike_in_their_ranges() -> None:
    draws = drawn("blur_noise")
    assert_share([d.is_noisy for d in draws], 1 / 2)
    kernels = [d.kernel for d in draws if d.kernel is not None]
    assert len(kernels) == sum(not d.is_noisy for d in draws)
    for kernel in kernels:
        assert len(kernel) % 2 == 1
        assert kernel.sum() == pytest.approx(1)
    # The ratio of the two middle taps gives sigma; a kernel is 3.5 of it to each side.
    wide = [k for k in kernels if len(k) > 1]
    sigmas = [(2 * np.log(k[len(k) // 2] / k[len(k) // 2 + 1])) ** -0.5 for k in wide]
    assert_even(sigmas, 0.5, 3.0)
    noises = np.stack([d.pictures[-1] for d in draws if d.is_noisy])
    deviations = noises.std(axis=(1, 2))
    assert 2.8 < deviations.min() < 3.3
    assert 6.7 < deviations.max() < 7.2
    assert abs(noises.mean()) < 0.05


def test_the_draw_is_that_of_seed_epoch_and_clip() -> None:
    everything = AugmentSettings.model_validate(dict.fromkeys(OFF, 0.8))
    first, second = AugmentSampler(everything, seed=1), AugmentSampler(everything, seed=1)
    for number in range(20):
        first(SIZE, epoch=7, number=number)
    for key in ((7, 3), (0, 19), (2, 0)):
        one, other = (d(SIZE, epoch=key[0], number=key[1]) for d in (first, second))
        for name in Draw.__slots__:
            np.testing.assert_equal(getattr(one, name), getattr(other, name))
    apart = [AugmentSampler(everything, seed)(SIZE, epoch=e, number=n)
             for seed, e, n in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]  # fmt: skip
    assert len({str(draw) for draw in apart}) == 4
