"""Several channels get one draw, and 16-bit pixels the changes of 8-bit ones without rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CHANGES

from dist_train.config import AugmentSettings
from dist_train.data.augment.cpu import Augment, augmented
from dist_train.data.augment.gpu import augmented_batch
from dist_train.data.augment.original import OriginalAugment, OriginalDraw, applied
from dist_train.data.augment.packed_clips import pack
from dist_train.data.augment.resize import resize

OFF = dict.fromkeys(CHANGES, 0.0)
EVERYTHING = AugmentSettings.model_validate(dict.fromkeys(OFF, 0.8))
SETTINGS = [*sorted(OFF), "everything"]
SIZE = (24, 24)
DTYPES = ("uint8", "uint16", "float16")


def settings_of(name: str) -> AugmentSettings:
    return EVERYTHING if name == "everything" else AugmentSettings.model_validate(OFF | {name: 1.0})


def clip_of(dtype: str, channels: int, number: int = 0) -> np.ndarray:
    """Noise, [D, 24, 24, C]."""
    shape = (3 + number % 3, *SIZE, channels)
    values = np.random.default_rng(number).random(shape, np.float32)
    white = 1 if dtype == "float16" else np.iinfo(dtype).max
    return (values * white).astype(dtype)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_channel_is_the_grey_augmentation_of_that_channel(dtype: str, name: str) -> None:
    for kind in (Augment, OriginalAugment):
        one = kind(settings_of(name), 3)
        for number, channels in enumerate((2, 3, 5)):
            clip = clip_of(dtype, channels, number)
            given = one(clip, epoch=1, number=number)
            assert given.dtype == clip.dtype
            for channel in range(channels):
                alone = one(clip[..., channel], epoch=1, number=number)
                np.testing.assert_array_equal(given[..., channel], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_channel_on_the_device_is_that_channel_alone(dtype: str) -> None:
    one = Augment(EVERYTHING, 3)
    clips = [clip_of(dtype, 3, number) for number in range(6)]
    draws = [one.draw((16, 16), epoch=0, number=number) for number in range(6)]
    both = augmented_batch(pack([torch.from_numpy(clip) for clip in clips], draws), (16, 16))
    assert both.shape == (6, 3, 5, 16, 16)
    for channel in range(3):
        grey = [torch.from_numpy(clip[..., channel].copy()) for clip in clips]
        alone = augmented_batch(pack(grey, draws), (16, 16))
        # Matrices of another size are multiplied in another order.
        torch.testing.assert_close(both[:, channel : channel + 1], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", [Augment, OriginalAugment])
@pytest.mark.parametrize("name", sorted(OFF))
def test_16_bits_agree_with_8_within_rounding(name: str, kind: type) -> None:
    """8 bits are truncated after each of at most two changes; blur and maps round to 1/2 level."""
    one = kind(settings_of(name), 5)
    for number in range(8):
        clip = clip_of("uint8", 1, number)[..., 0]
        wide, half = clip.astype(np.uint16) * np.uint16(257), (clip / 255).astype(np.float16)
        grey, deep, fraction = (one(c, epoch=0, number=number) for c in (clip, wide, half))
        assert np.abs(deep / 257.0 - grey).max() <= 2.6
        assert np.abs(deep / 257.0 - grey).mean() <= 1.3
        # float16 has 11 significant bits.
        assert np.abs(fraction.astype(float) * 255 - deep / 257).max() < 0.3


def test_tones_of_16_bits_are_not_rounded_to_8() -> None:
    """A ramp of 8-bit steps would have at most 256 values."""
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(1, 64, 64)
    one = Augment(settings_of("brightness"), 0)
    draw = next(
        d for d in (one.draw((64, 64), epoch=0, number=n) for n in range(99)) if d.gamma != 1
    )
    for changed in (augmented(ramp, draw), applied(ramp, OriginalDraw(gamma=0.9))):
        assert len(np.unique(changed)) > 3000
    noisy = next(
        d
        for d in (
            Augment(settings_of("blur_noise"), 0).draw((64, 64), epoch=0, number=n)
            for n in range(99)
        )
        if d.is_noisy
    )
    grey = np.full((1, 64, 64), 30000, np.uint16)
    assert len(np.unique(augmented(grey, noisy))) > 500


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(9, 7), (40, 24), (12, 48), SIZE])
def test_each_channel_is_resized_alone(dtype: str, size: tuple[int, int]) -> None:
    clip = clip_of(dtype, 2)
    out = np.empty((len(clip), *size, 2), dtype)
    resized = resize(clip, size)
    np.testing.assert_array_equal(resize(clip, size, out), resized)
    np.testing.assert_array_equal(out, resized)
    for channel in range(2):
        alone = resize(np.ascontiguousarray(clip[..., channel]), size)
        np.testing.assert_array_equal(resized[..., channel], alone)
