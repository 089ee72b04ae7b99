"""The original recipe's augmentation: blocks, ranges, probabilities, and noise per frame."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import pytest
from helpers import CHANGES
from uniform import assert_even, assert_share

from dist_train.config import AugmentSettings
from dist_train.data.augment.original import Noise, OriginalAugment, OriginalDraw, _optical, applied
from dist_train.data.types import Volume

SIZE = 64, 64
MANY = 800
SMOOTH = cv2.GaussianBlur(
    np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8), (7, 7), 2
)
STILL: Volume = np.repeat(SMOOTH[None], 6, axis=0)


def original(**given: float) -> OriginalAugment:
    return OriginalAugment(AugmentSettings.model_validate({"preset": "original", **given}), seed=3)


@cache
def draws() -> list[OriginalDraw]:
    one = original()
    return [one.draw(SIZE, epoch=0, number=number) for number in range(MANY)]


def test_each_block_comes_half_the_time() -> None:
    settings = AugmentSettings.model_validate({"preset": "original"})
    assert set(settings.model_dump(include=CHANGES).values()) == {0.5}
    for hits in (
        [d.affine is not None for d in draws()],
        [d.displaced is not None for d in draws()],
        [d.blur is not None or d.noise is not None for d in draws()],
        [(d.contrast, d.gamma) != (1.0, 1.0) for d in draws()],
        [d.is_reversed for d in draws()],
    ):
        assert_share(hits, 0.5)
    assert len({str(d.orientation) for d in draws()}) == 8


def test_one_of_each_block_is_drawn_alike() -> None:
    toned = [d for d in draws() if (d.contrast, d.gamma) != (1.0, 1.0)]
    assert_share([d.gamma != 1.0 for d in toned], 1 / 2)
    softened = [d for d in draws() if d.blur is not None or d.noise is not None]
    for kind in ("gaussian", "box"):
        assert_share([d.blur is not None and d.blur[0] == kind for d in softened], 1 / 5)
    assert_share([d.noise is not None and d.noise.kind == "added" for d in softened], 2 / 5)
    assert_share([d.noise is not None and d.noise.kind == "multiplied" for d in softened], 1 / 5)
    distorted = [d for d in draws() if d.displaced is not None]
    assert_share([d.elastic is not None for d in distorted], 1 / 3)


def test_parameters_are_even_in_the_published_ranges() -> None:
    contrasts = [d for d in draws() if d.contrast != 1.0]
    assert_even([d.contrast for d in contrasts], 0.8, 1.2)
    assert_even([d.brightness for d in contrasts], -51, 51)
    assert_even([d.gamma for d in draws() if d.gamma != 1.0], 0.8, 1.2)
    taps = [d.blur[1] for d in draws() if d.blur is not None]
    for number in (3, 5, 7):
        assert_share([tap == number for tap in taps], 1 / 3)
    matrices = np.stack([d.affine for d in draws() if d.affine is not None])
    scales = np.linalg.norm(matrices[:, :, 0], axis=1)
    assert_even(scales, 0.8, 1.2)
    assert_even(np.degrees(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0])), -10, 10)
    middle = np.array([32.0, 32.0])
    shifts = matrices[:, :, :2] @ middle + matrices[:, :, 2] - middle
    assert_even(shifts[:, 0], -6.4, 6.4)
    assert_even(shifts[:, 1], -6.4, 6.4)


def test_noise_has_the_published_strength() -> None:
    scales = [d.noise.scale for d in draws() if d.noise is not None and d.noise.kind == "added"]
    # Half have a variance of 10 to 50, half a deviation of 1 to 5 % of white.
    assert min(scales) < 3.2
    assert 10 < max(scales) < 12.75
    flat = np.full((8, 64, 64), 100, np.uint8)
    added = applied(flat, OriginalDraw(noise=Noise("added", 5.0, 1)))
    assert added.std() == pytest.approx(5, rel=0.03)
    times = applied(flat, OriginalDraw(noise=Noise("multiplied", 0.0, 1)))
    assert_even(times[0, ::8, ::8].ravel() + np.random.default_rng(0).random(64), 50, 150)


@pytest.mark.parametrize("kind", ["added", "multiplied"])
def test_noise_is_drawn_for_each_frame(kind: str) -> None:
    noisy = applied(STILL, OriginalDraw(noise=Noise(kind, 5.0, 7)))  # type: ignore[arg-type]
    apart = noisy.astype(int) - STILL
    assert len({frame.tobytes() for frame in noisy}) == len(noisy)
    shared = np.corrcoef(apart.reshape(len(apart), -1)) - np.eye(len(apart))
    assert np.abs(shared).max() < 0.1


def test_all_but_noise_is_one_draw_for_all_frames() -> None:
    one = original(blur_noise=0.0)
    changed = 0
    for number in range(40):
        clip = one(STILL, epoch=0, number=number)
        assert (clip == clip[:1]).all()
        changed += bool((clip != STILL).any())
    assert changed > 35


def test_distortions_keep_the_picture_and_mirror_it_at_the_edges() -> None:
    white = np.full((1, *SIZE), 255, np.uint8)
    distorted = [d for d in draws()[:300] if d.displaced is not None]
    assert {d.elastic is None for d in distorted} == {True, False}
    for draw in distorted:
        only = OriginalDraw(elastic=draw.elastic, displaced=draw.displaced)
        assert (applied(white, only) == 255).all()
        away = np.stack(draw.displaced) - np.stack(np.meshgrid(*map(np.arange, SIZE)))  # type: ignore[arg-type]
        assert 0 < np.abs(away).max() < 80


def test_a_lens_moves_the_picture_by_whole_pixels() -> None:
    """The lens's centre is shifted by up to 3.6 pixels, rounded."""
    lenses = [_optical(np.random.default_rng(number), SIZE) for number in range(200)]
    # No radial distortion is at the middle, which lies between four pixels.
    shifts = np.array([[axis[31:33, 31:33].mean() - 32 for axis in maps] for maps in lenses])
    np.testing.assert_allclose(shifts, shifts.round(), atol=0.01)
    assert set(shifts.round().ravel()) == set(range(-4, 5))


def test_a_golden_draw() -> None:
    """Detects a changed range, or a changed order of draws."""
    one = original()
    sums = [int(one(STILL, epoch=5, number=n).astype(np.int64).sum()) for n in range(6)]
    again = [int(original()(STILL, epoch=5, number=n).astype(np.int64).sum()) for n in range(6)]
    assert sums == again
    assert [round(total / STILL.size) for total in sums] == GOLDEN


#: Mean grey of six clips.
GOLDEN = [125, 123, 126, 85, 126, 64]


def test_the_clip_is_left_alone() -> None:
    before = STILL.copy()
    for number in range(20):
        original()(STILL, epoch=1, number=number)
    np.testing.assert_array_equal(STILL, before)


def test_the_device_does_not_know_the_preset() -> None:
    with pytest.raises(ValueError, match="only the host can; leave out device: true"):
        AugmentSettings.model_validate({"preset": "original", "device": True})
