"""Frames as people see them: colours by name, other channels in three colours with a legend."""

from __future__ import annotations

import numpy as np
import pytest

from dist_train.data.pictures import as_picture, legend


def test_one_channel_is_grey_of_8_bits() -> None:
    grey = np.uint8([[[0, 127, 255]]])
    assert as_picture(grey, ("grey",)) is grey
    for other in (grey.astype(np.uint16) * np.uint16(257), (grey / 255).astype(np.float16)):
        np.testing.assert_array_equal(as_picture(other, ("gfp",)), grey)
    np.testing.assert_array_equal(as_picture(np.float32(grey / 255), ("gfp",)), grey)
    assert legend(("gfp",)) == ""


@pytest.mark.parametrize(
    ("channels", "order", "told"),
    [
        (("red", "green", "blue"), (0, 1, 2), ""),
        (("Blue", "Green", "Red"), (2, 1, 0), ""),
        (("dapi", "red", "blue", "green"), (1, 3, 2), "1 more not shown"),
        (("dapi", "gfp"), (0, 1, None), "dapi red, gfp green"),
        (("a", "b", "c", "d", "e"), (0, 1, 2), "a red, b green, c blue, 2 more not shown"),
    ],
)
def test_channels_are_colours(
    channels: tuple[str, ...], order: tuple[int | None, ...], told: str
) -> None:
    frames = np.arange(2 * 3 * 4 * len(channels), dtype=np.uint8).reshape(2, 3, 4, len(channels))
    picture = as_picture(frames, channels)
    assert picture.shape == (2, 3, 4, 3)
    for colour, channel in enumerate(order):
        expected = 0 if channel is None else frames[..., channel]
        np.testing.assert_array_equal(picture[..., colour], expected)
    assert legend(channels).startswith(told)
    assert bool(legend(channels)) == bool(told)
