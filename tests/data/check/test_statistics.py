"""Statistics of clips: the same for every dtype, and torn frames are told from sound ones."""

from __future__ import annotations

import numpy as np
import pytest
from capillaries import capillaries

from dist_train.data.check.findings import TORN
from dist_train.data.check.statistics import ClipStatistics, grey_of, statistics_of, tear_of


@pytest.fixture(scope="module")
def sound() -> list[np.ndarray]:
    return capillaries(12)


def test_they_are_those_of_the_pixels() -> None:
    clip = np.random.default_rng(0).integers(3, 256, (7, 12, 9), dtype=np.uint8)
    clip[:2] = 255
    found = statistics_of(clip)
    assert found.means == pytest.approx([clip.mean()])
    assert found.spreads == pytest.approx([clip.std()])
    assert found.levels == len(np.unique(clip))
    assert found.brightest == 255
    assert found.saturated == pytest.approx((clip == 255).mean())


def close(a: ClipStatistics, b: ClipStatistics) -> None:
    assert a.means[0] == pytest.approx(b.means[0], abs=0.1)
    assert a.spreads[0] == pytest.approx(b.spreads[0], abs=0.1)
    assert a.tear == pytest.approx(b.tear, rel=0.02)
    assert (a.levels, a.saturated, a.repeated) == (b.levels, b.saturated, b.repeated)
    bits = np.bitwise_count(np.frombuffer(a.hash, np.uint8) ^ np.frombuffer(b.hash, np.uint8))
    assert bits.sum() <= 2


def test_every_dtype_and_number_of_channels_gives_the_same(sound: list[np.ndarray]) -> None:
    clip = sound[0].copy()
    clip[5] = clip[4]
    clip[9, 20:] = 128
    grey = statistics_of(clip)
    assert grey.repeated == pytest.approx(1 / 23)
    close(statistics_of(clip.astype(np.uint16) * 257), grey)
    close(statistics_of((clip / 255).astype(np.float16)), grey)
    twice = statistics_of(np.stack([clip, clip], axis=3))
    close(twice, grey)
    assert twice.means == grey.means * 2
    # Channels are measured each by itself; their mean is what is looked at.
    other = statistics_of(np.stack([clip, np.zeros_like(clip)], axis=3))
    assert other.means == (grey.means[0], 0)
    assert grey_of(np.stack([clip, np.zeros_like(clip)], axis=3)).max() == clip.max() / 2


def test_torn_frames_are_told_from_sound_ones(sound: list[np.ndarray]) -> None:
    assert max(map(tear_of, sound)) < TORN
    random = np.random.default_rng(0)
    caught = []
    for clip in sound * 2:
        frame, row = random.integers(len(clip)), int(clip.shape[1] * random.uniform(0.2, 0.7))
        grey, moved = clip.copy(), clip.copy()
        grey[frame, row:] = 128
        moved[frame, row:] = np.roll(moved[frame, row:], clip.shape[2] // 2, axis=1)
        caught += [tear_of(grey) >= TORN, tear_of(moved) >= TORN]
    assert np.mean(caught) > 0.9


def test_slices_of_a_volume_and_short_clips_are_not_torn() -> None:
    # A ball: neighbouring slices have sharp edges in other rows.
    z, y, x = np.mgrid[-1:1:20j, -1:1:40j, -1:1:40j]
    ball = np.where(z**2 + y**2 + x**2 < 0.8, 200, 0).astype(np.uint8)
    found = statistics_of(ball)
    assert found.tear < TORN
    assert statistics_of(ball[:1]).tear == 0
    # The two in the middle are equal. The empty slices at its ends do not count.
    assert found.repeated == pytest.approx(1 / 19)
    assert statistics_of(np.repeat(ball[8:10], 6, axis=0)).repeated > 0.9


def test_a_clip_without_structure_has_no_hash() -> None:
    flat = np.full((4, 8, 8), 90, np.uint8)
    found = statistics_of(flat)
    assert (found.hash, found.spreads, found.levels, found.repeated) == (None, (0.0,), 1, 0)
    assert statistics_of(np.zeros((1, 1, 1), np.uint8)).brightest == 0


def test_frames_of_one_colour_do_not_count_as_repeated() -> None:
    clip = np.broadcast_to(np.array([200, 30, 90], np.uint8), (6, 8, 8, 3)).copy()
    assert statistics_of(clip).repeated == 0
    clip[:, 0, 0, 1] = 31
    assert statistics_of(clip).repeated == 1
