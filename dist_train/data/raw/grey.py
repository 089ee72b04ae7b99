"""Values of any depth and range -> uint8 grey, 0 black and 255 white."""

from __future__ import annotations

from functools import cache

import numpy as np

from dist_train.errors import DecodeError

# Depths that cameras have.
DEPTHS = (8, 10, 12, 14, 16)


@cache
def levels(bits: int, *, full_range: bool) -> np.ndarray:
    """The grey of each coded value: uint8 [2 ** bits].

    Full range keeps the 8 highest bits. This restores each grey level whether the writer filled the
    other bits with zeros or with the highest bits. Limited range (ITU-R BT.601 and BT.709) has
    black at 16 and white at 235 of 8 bits, and is stretched.
    """
    values = np.arange(1 << bits)
    if full_range:
        return np.asarray(values >> (bits - 8), np.uint8)
    black, white = (level << (bits - 8) for level in (16, 235))
    stretched = np.rint((values - black) * (255 / (white - black)))
    return np.asarray(np.clip(stretched, 0, 255), np.uint8)


@cache
def levels_16(bits: int, *, full_range: bool) -> np.ndarray:
    """The grey of each coded value in 16 bits: uint16 [2 ** bits], 0 black and 65535 white."""
    black, white = 0, (1 << bits) - 1
    if not full_range:
        black, white = 16 << (bits - 8), 235 << (bits - 8)
    stretched = np.rint((np.arange(1 << bits) - black) * (65535 / (white - black)))
    return np.asarray(np.clip(stretched, 0, 65535), np.uint16)


#: Limited range of 8 bits -> full range.
FULL_RANGE = levels(8, full_range=False)


def depth_of(largest: int) -> int:
    """The least of ``DEPTHS`` that holds a value.

    Raises:
        DecodeError: none does.
    """
    for bits in DEPTHS:
        if largest < 1 << bits:
            return bits
    raise DecodeError(
        f"holds the value {largest}, which needs more than 16 bits",
        fix="Prepare with --intensity 'window LOW HIGH'.",
    )


def to_8_bits(values: np.ndarray, bits: int | None) -> np.ndarray:
    """Keep the 8 highest of ``bits`` bits of uint16 values, as uint8 (see ``levels``).

    Raises:
        DecodeError: see ``checked_bits``.
    """
    return np.asarray(values >> (checked_bits(values, bits) - 8), np.uint8)


def checked_bits(values: np.ndarray, bits: int | None) -> int:
    """Return ``bits``, the number of bits in use in uint16 values.

    Raises:
        DecodeError: ``bits`` is None, or a value has more bits.
    """
    largest = int(values.max(initial=0))
    if bits is None:
        raise DecodeError(
            f"holds values of 16 bits (up to {largest}), and how many of the bits are in use is "
            "not known",
            fix=f"Prepare with --bits, such as --bits {depth_of(largest)}.",
        )
    if largest >> bits:
        raise DecodeError(
            f"holds the value {largest}, and {bits} bits end at {(1 << bits) - 1}",
            fix=f"Remove it, or prepare anew with --bits {depth_of(largest)}.",
        )
    return bits
