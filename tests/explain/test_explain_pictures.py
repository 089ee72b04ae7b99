"""Pictures of a map: colour only where it is positive, and of clips of any size."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from dist_train.explain.pictures import as_gif, as_mp4, overlay, shares, side_by_side, strip


@pytest.mark.parametrize("shape", [(3, 20, 31), (2, 300, 100, 3), (1, 1, 1)])
def test_colour_is_where_the_map_is_positive(shape: tuple[int, ...]) -> None:
    frames = np.random.default_rng(0).integers(0, 200, shape, dtype=np.uint8)
    found = np.full(shape[:3], -1.0, np.float32)
    found[0, : shape[1] // 2 + 1] = 2.0
    plain, covered = overlay(frames, found)
    assert plain.shape == covered.shape
    assert plain.shape[3] == 3
    assert 128 <= plain.shape[1] <= 256
    changed = (plain != covered).any(3)
    assert changed[0, 0].all()
    assert not changed[1:].any()
    assert shares(found)[0] == 1
    both = side_by_side(plain, covered)
    assert both.shape[1] % 2 == both.shape[2] % 2 == 0
    with Image.open(io.BytesIO(as_gif(both))) as picture:
        assert picture.size == (both.shape[2], both.shape[1])
    content = strip(plain, covered, shares(found), np.zeros(shape[0]), "a $x^ name\x1b", "second")
    assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).shape[1] == 1000


def test_a_very_wide_clip_has_its_pictures() -> None:
    frames = np.zeros((2, 20, 1600), np.uint8)
    plain, covered = overlay(frames, frames)
    assert plain.shape == (2, 26, 2048, 3)
    both = side_by_side(plain, covered)
    assert as_mp4(both)
    assert as_gif(both)
    assert strip(plain, covered, np.zeros(2), np.zeros(2), "wide")


def test_an_empty_map_has_no_colour() -> None:
    plain, covered = overlay(np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8), np.float32))
    assert (plain == covered).all()
    assert shares(np.zeros((2, 8, 8))).tolist() == [0, 0]


def test_a_deep_clip_is_shown_in_part() -> None:
    plain = np.zeros((500, 2, 2, 3), np.uint8)
    assert len(side_by_side(plain, plain)) == 128
