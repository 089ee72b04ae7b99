"""CPU augmentation: one draw per clip, keyed by seed, epoch and clip only."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys

import cv2
import numpy as np
import pytest
from helpers import CHANGES

from dist_train.config import AugmentSettings
from dist_train.data.augment.cpu import Augment
from dist_train.data.orientation import Orientation
from dist_train.data.types import Volume

OFF = dict.fromkeys(CHANGES, 0.0)
PICTURE = cv2.GaussianBlur(
    np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8), (7, 7), 2
)
STILL = np.repeat(PICTURE[None], 5, axis=0)
MOVING = np.stack([np.roll(PICTURE, 3 * i, axis=1) for i in range(5)])


def augment(seed: int = 0, **settings: float) -> Augment:
    return Augment(AugmentSettings(**(OFF | settings)), seed)


EVERYTHING = dict.fromkeys(OFF, 0.8)


def test_nothing_at_zero() -> None:
    for number in range(10):
        np.testing.assert_array_equal(augment()(MOVING, epoch=1, number=number), MOVING)


def frame_by_frame(one: Augment, clip: Volume, number: int) -> Volume:
    """A clip augmented by albumentations itself in epoch 0, each frame with the same random state,
    without the reversal."""
    key = np.random.SeedSequence((one.seed, 0, number))
    numbers, choices, _ = (int(word) for word in key.generate_state(3))
    pipeline, frames = one.draw.transform, []
    assert pipeline is not None
    for frame in clip:
        pipeline.set_random_state(np.random.default_rng(numbers), random.Random(choices))
        frames.append(pipeline(image=frame)["image"])
    return np.stack(frames)


@pytest.mark.parametrize("name", [*sorted(set(OFF) - {"reverse"}), "everything"])
def test_each_frame_is_that_of_albumentations_to_the_bit(name: str) -> None:
    """On white noise, which shows a shift by a hundredth of a pixel."""
    settings = EVERYTHING | {"reverse": 0.0} if name == "everything" else {name: 1.0}
    one = augment(**settings)
    noise = np.random.default_rng(1)
    for number in range(16):
        clip = noise.integers(0, 256, (1 + number % 6, 40, 40), dtype=np.uint8)
        given = one(clip, epoch=0, number=number)
        np.testing.assert_array_equal(given, frame_by_frame(one, clip, number))


def test_orientations_are_what_numpy_makes_of_them() -> None:
    picture = np.arange(25).reshape(5, 5)
    places = np.stack([*np.indices((5, 5))[::-1], np.ones((5, 5), int)]).reshape(3, -1)
    for times in range(4):
        for rows in (False, True):
            how = Orientation().turned(times).flipped(rows=rows)
            expected = np.rot90(picture, times)
            expected = expected[::-1] if rows else expected
            x, y, _ = (how.matrix(5, 5) @ places).astype(int)
            np.testing.assert_array_equal(expected[y, x], picture.ravel())


def test_reversal_is_in_depth() -> None:
    np.testing.assert_array_equal(augment(reverse=1.0)(MOVING, epoch=0, number=0), MOVING[::-1])
    half = [augment(reverse=0.5)(MOVING, epoch=0, number=n)[0] for n in range(200)]
    assert 70 < sum((frame == MOVING[-1]).all() for frame in half) < 130


@pytest.mark.parametrize("name", sorted(set(OFF) - {"reverse"}))
def test_one_draw_for_all_frames(name: str) -> None:
    """Equal frames stay equal, noise included, so augmentation never adds motion."""
    for number in range(12):
        clip = augment(**{name: 1.0})(STILL, epoch=0, number=number)
        assert (clip == clip[:1]).all()


def test_draw_does_not_depend_on_global_random_state() -> None:
    first = augment(**EVERYTHING)(MOVING, epoch=0, number=1)
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(augment(**EVERYTHING)(MOVING, epoch=0, number=1), first)


def test_pickled_copy_draws_the_same() -> None:
    one = augment(**EVERYTHING)
    copy = pickle.loads(pickle.dumps(one))
    for number in range(10):
        np.testing.assert_array_equal(
            copy(MOVING, epoch=0, number=number), one(MOVING, epoch=0, number=number)
        )


def test_input_is_left_alone() -> None:
    clip = MOVING.copy()
    for number in range(20):
        augment(**EVERYTHING)(clip, epoch=0, number=number)
    np.testing.assert_array_equal(clip, MOVING)


def test_frames_that_are_not_square_without_turns() -> None:
    one = augment(**(EVERYTHING | {"rotate90": 0.0}))
    clip = MOVING[:, :32]
    assert {one(clip, epoch=0, number=n).shape for n in range(20)} == {clip.shape}


def test_import_asks_no_network() -> None:
    """albumentations looks for a newer version of itself on import, unless that is disabled."""
    command = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('the network was asked')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
        "import dist_train.data.augment.cpu\n"
    )
    ended = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
