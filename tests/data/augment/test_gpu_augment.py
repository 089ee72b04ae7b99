"""Device augmentation against the CPU's, for the same draws: each transform, each resize."""

from __future__ import annotations

from itertools import product

import cv2
import numpy as np
import pytest
import torch
from helpers import CHANGES

from dist_train.config import AugmentSettings
from dist_train.data.augment.cpu import augmented
from dist_train.data.augment.draw import Draw
from dist_train.data.augment.gpu import augmented_batch, blur_weights
from dist_train.data.augment.packed_clips import pack
from dist_train.data.augment.params import AugmentSampler
from dist_train.data.augment.resize import resize
from dist_train.data.types import Volume

OFF = dict.fromkeys(CHANGES, 0.0)
EVERYTHING = dict.fromkeys(OFF, 0.7)
SIZE = 64, 64
# Grows, stays, shrinks, and one of each.
NATIVE = [(3, 30, 41), (2, 64, 64), (3, 90, 70), (4, 40, 100)]
#: Grey levels between host and device, at most and on the mean. The host rounds to levels after
#: each step; by tones it cuts off what is behind the point, twice.
TOLERANCE = {
    "nothing": (1.2, 0.35),
    "flip": (1.2, 0.35),
    "rotate90": (1.2, 0.35),
    "reverse": (1.2, 0.35),
    "shift_scale_rotate": (2.5, 0.35),
    "distort": (2.5, 0.35),
    "brightness": (4.0, 1.4),
    "blur_noise": (1.7, 0.4),
}


def cells(shape: tuple[int, int, int], seed: int = 0) -> Volume:
    """Blurred noise, with the grain of blood cells."""
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return np.stack([cv2.GaussianBlur(frame, (9, 9), 2.5) for frame in noise])


def drawer(**settings: float) -> AugmentSampler:
    return AugmentSampler(AugmentSettings.model_validate(OFF | settings), seed=0)


def on_device(clip: Volume, draw: Draw, size: tuple[int, int] = SIZE) -> np.ndarray:
    """One clip, augmented alone, in grey levels: float64 [D, *size]."""
    batch = augmented_batch(pack([torch.from_numpy(clip)], [draw]), size)
    assert batch.shape == (1, 1, len(clip), *size)
    assert batch.dtype == torch.float32
    return batch[0, 0].double().numpy() * 255


@pytest.mark.parametrize(("name", "native"), product(TOLERANCE, NATIVE))
def test_each_transform_is_that_of_the_host(name: str, native: tuple[int, int, int]) -> None:
    clip = cells(native)
    draws = drawer(**({} if name == "nothing" else {name: 1.0}))
    most, mean = TOLERANCE[name]
    for number in range(16):
        draw = draws(SIZE, epoch=0, number=number)
        apart = np.abs(on_device(clip, draw) - augmented(resize(clip, SIZE), draw))
        assert apart.max() <= most
        assert apart.mean() <= mean


def test_of_all_at_once_only_the_second_resampling_is_missing() -> None:
    """The CPU blurs more, which shows at the edge of the black outside."""
    clip = cells((4, 50, 80))
    draws = drawer(**dict.fromkeys(OFF, 1.0))
    for number in range(24):
        draw = draws(SIZE, epoch=0, number=number)
        apart = np.abs(on_device(clip, draw) - augmented(resize(clip, SIZE), draw))
        assert apart.mean() < 3
        assert np.quantile(apart, 0.95) < 6


def test_frames_that_are_not_square() -> None:
    clip = cells((3, 50, 50))
    draws = drawer(**(EVERYTHING | {"rotate90": 0.0, "distort": 0.0, "brightness": 0.0}))
    for number in range(16):
        draw = draws((40, 64), epoch=0, number=number)
        apart = on_device(clip, draw, (40, 64)) - augmented(resize(clip, (40, 64)), draw)
        assert np.abs(apart).max() < 2.5


@pytest.fixture(scope="module")
def mixed() -> tuple[list[Volume], list[Draw]]:
    """Clips of unequal shapes; their draws include every kind."""
    clips = [cells((2 + i % 4, 20 + 7 * i, 90 - 5 * i), seed=i) for i in range(9)]
    draws = [drawer(**EVERYTHING)(SIZE, epoch=0, number=i) for i in range(9)]
    assert {len(draw.pictures) for draw in draws} == {0, 1, 2, 3}
    return clips, draws


def test_a_clip_is_the_same_in_any_company(mixed: tuple[list[Volume], list[Draw]]) -> None:
    clips, draws = mixed
    packed = pack([torch.from_numpy(clip) for clip in clips], draws)
    assert packed.pixels.nbytes == sum(clip.nbytes for clip in clips), "no byte is padding"
    batch = augmented_batch(packed, SIZE)
    assert batch.shape == (9, 1, 5, *SIZE)
    assert batch.min() >= 0
    assert batch.max() <= 1 + 1e-6
    for volume, clip, draw in zip(batch, clips, draws, strict=True):
        alone = augmented_batch(pack([torch.from_numpy(clip)], [draw]), SIZE)
        assert torch.equal(volume[:, : len(clip)], alone[0])
        assert (volume[:, len(clip) :] == 0).all(), "what follows a clip is black"


def test_autocast_changes_nothing(mixed: tuple[list[Volume], list[Draw]]) -> None:
    packed = pack([torch.from_numpy(clip) for clip in mixed[0]], mixed[1])
    plain = augmented_batch(packed, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augmented_batch(packed, SIZE), plain)


@pytest.mark.parametrize(("length", "taps"), [(20, 7), (20, 1), (5, 21), (1, 5), (2, 3)])
def test_a_blur_is_a_matrix(length: int, taps: int) -> None:
    kernel = np.hanning(taps + 2)[1:-1]
    kernel /= kernel.sum()
    picture = np.random.default_rng(0).random((length, length)).astype(np.float32)
    weights = blur_weights(kernel, length)
    expected = cv2.sepFilter2D(picture, -1, kernel, kernel)
    np.testing.assert_allclose(weights @ picture @ weights.T, expected, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_what_the_cpu_gives(mixed: tuple[list[Volume], list[Draw]]) -> None:
    packed = pack([torch.from_numpy(clip) for clip in mixed[0]], mixed[1])
    there = augmented_batch(packed.pin_memory().to(torch.device("cuda"), non_blocking=True), SIZE)
    apart = there.cpu() - augmented_batch(packed, SIZE)
    assert apart.abs().max() * 255 < 0.5
    assert apart.abs().mean() * 255 < 0.01
