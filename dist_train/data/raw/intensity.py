"""Values of any type -> the stored type, in which 0 is black and the largest value white.

Which values are black and white is known from the type, from the bits in use, from a given window,
or from percentiles, of one clip or of the set: equal values of two files then give equal grey.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from dist_train.data.raw.grey import depth_of, to_8_bits
from dist_train.data.types import DtypeName
from dist_train.errors import ConfigError, DecodeError

Rule = Literal["auto", "dtype", "bits", "window", "percentile"]
#: Percentiles of types that have no plain black and white, such as float32 and int16.
PERCENTILES = (0.5, 99.5)
MOST = float(np.finfo(np.float32).max)
# Values of a channel that percentiles are taken from, evenly spaced in the clip.
SAMPLE = 1 << 18
# Pixels that are mapped at a time: float32 takes four times as much memory as the clip.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Intensity:
    """The rule for black and white.

    Attributes:
        rule:
            "auto": uint8 and bool by their type, uint16 by the bits in use, other types by the
            window that all files declare, else by ``PERCENTILES``.
            "dtype": the range of the type; 0 and 1 for floating-point numbers.
            "bits": 0 and 2 ** bits - 1, by the bits in use.
            "window": ``low`` and ``high``.
            "percentile": those of the values, per channel; of red, green and blue together.
        low, high: values of a window, or percents.
        over: take bits and percentiles from the set or from each clip.
    """

    rule: Rule = "auto"
    low: float = 0.0
    high: float = 0.0
    over: Literal["set", "clip"] = "set"

    @classmethod
    def parse(cls, text: str, over: Literal["set", "clip"] = "set") -> Intensity:
        """Read "auto", "dtype", "bits", "window LOW HIGH" or "percentile LOW HIGH".

        Raises:
            ConfigError: the text has another form, or HIGH is not above LOW.
        """
        rule, *numbers = text.split() or [""]
        try:
            if rule in ("auto", "dtype", "bits") and not numbers:
                return cls(cast(Rule, rule), over=over)
            if rule in ("window", "percentile"):
                low, high = map(float, numbers)
                least, most = (0.0, 100.0) if rule == "percentile" else (-MOST, MOST)
                if least <= low < high <= most:
                    return cls(cast(Rule, rule), low, high, over)
        except ValueError:
            pass
        raise ConfigError(
            f"'{text}' is no rule for black and white",
            where="--intensity",
            fix="It is auto, dtype, bits, 'window LOW HIGH' or 'percentile LOW HIGH', with LOW "
            "below HIGH.",
        )

    def percentiles(self) -> tuple[float, float]:
        return (self.low, self.high) if self.rule == "percentile" else PERCENTILES

    def needs_bits(self, dtype: np.dtype[np.generic]) -> bool:
        """Whether black and white of such values depend on the bits in use."""
        return self.rule == "bits" or (self.rule == "auto" and dtype == np.uint16)

    def needs_percentiles(self, dtype: np.dtype[np.generic]) -> bool:
        """Whether black and white of such values depend on what the clips hold."""
        is_plain = dtype in (np.uint8, np.uint16, np.bool_)
        return self.rule == "percentile" or (self.rule == "auto" and not is_plain)


@dataclass(frozen=True)
class SetRange:
    """What was found in the files of a set.

    Attributes:
        bits: in use in integer values.
        black, white: for each channel.
    """

    bits: int | None = None
    black: tuple[float, ...] | None = None
    white: tuple[float, ...] | None = None


def sample_of(values: np.ndarray, channels: int) -> np.ndarray:
    """Return evenly spaced values of a clip: float64 [N, channels], finite ones."""
    pixels = values.reshape(-1, channels)
    part = pixels[:: max(1, len(pixels) // SAMPLE)].astype(np.float64)
    return np.asarray(part[np.isfinite(part).all(axis=1)])


def black_and_white(
    samples: np.ndarray, percents: tuple[float, float], *, together: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the percentiles of ``samples``, [N, C], for each channel or for all together.

    Raises:
        DecodeError: there are no values.
    """
    if not samples.size:
        raise DecodeError("holds no numbers")
    low, high = np.percentile(samples, percents, axis=None if together else 0)
    channels = samples.shape[1]
    return (
        tuple(np.broadcast_to(low, channels).tolist()),
        tuple(np.broadcast_to(high, channels).tolist()),
    )


def range_of(
    values: np.ndarray,
    intensity: Intensity,
    found: SetRange,
    *,
    channels: int,
    bits: int | None = None,
    window: tuple[float, float] | None = None,
    is_colour: bool = False,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the values of a clip that become black and white, for each channel.

    Args:
        bits, window: by the file's metadata.
        is_colour: the channels are red, green and blue.

    Raises:
        DecodeError: the values do not fit the rule.
    """
    dtype = values.dtype
    if intensity.rule == "window":
        return (intensity.low,) * channels, (intensity.high,) * channels
    if intensity.needs_bits(dtype):
        in_use = _bits_of(values, intensity, found, bits)
        return (0.0,) * channels, (float((1 << in_use) - 1),) * channels
    if intensity.needs_percentiles(dtype):
        if intensity.over == "clip":
            if window is not None and intensity.rule == "auto":
                return (window[0],) * channels, (window[1],) * channels
            samples = sample_of(values, channels)
            return black_and_white(samples, intensity.percentiles(), together=is_colour)
        if found.black is None or found.white is None:
            raise DecodeError(
                f"holds {dtype} values, whose black and white are not known",
                fix="Prepare with --intensity 'window LOW HIGH' or --intensity-over clip.",
            )
        return found.black, found.white
    if dtype.kind == "f" or dtype == np.bool_:
        return (0.0,) * channels, (1.0,) * channels
    limits = np.iinfo(dtype)
    return (float(limits.min),) * channels, (float(limits.max),) * channels


def _bits_of(values: np.ndarray, intensity: Intensity, found: SetRange, bits: int | None) -> int:
    if values.dtype.kind not in "ui" or int(values.min(initial=0)) < 0:
        raise DecodeError(
            f"holds {values.dtype} values, which have no number of bits in use",
            fix="Prepare with --intensity 'window LOW HIGH' or 'percentile LOW HIGH'.",
        )
    largest = int(values.max(initial=0))
    if intensity.over == "clip":
        # Some files declare fewer bits than their values have.
        return depth_of(largest) if bits is None or largest >> bits else bits
    if values.dtype == np.uint16:
        # Its errors name the bits that would do.
        to_8_bits(values[:0] if found.bits is not None else values, found.bits)
    if found.bits is None:
        return depth_of(largest)
    if largest >> found.bits:
        to_8_bits(values, found.bits)
    return found.bits


def to_stored(
    values: np.ndarray, black: tuple[float, ...], white: tuple[float, ...], dtype: DtypeName
) -> tuple[np.ndarray, int]:
    """Map ``values`` linearly from black..white to the stored range, and cut what is outside.

    uint16 values whose white is 2 ** bits - 1 keep their 8 highest bits as uint8 (see ``grey``).

    Args:
        values: [D, H, W] or [D, H, W, C].

    Returns:
        The clip: uint8 0 to 255, uint16 0 to 65535, or float16 0 to 1; and the number of values
        that are not numbers, which become black.
    """
    bits = int(white[0] + 1).bit_length() - 1
    is_binary = set(black) == {0.0} and set(white) == {float((1 << bits) - 1)}
    if dtype == "uint8" and values.dtype == np.uint8 and is_binary and bits == 8:
        return np.ascontiguousarray(values), 0
    if dtype == "uint8" and values.dtype == np.uint16 and is_binary and bits >= 8:
        return np.asarray(values >> (bits - 8), np.uint8), 0
    out = np.empty(values.shape, dtype)
    top = {"uint8": 255.0, "uint16": 65535.0, "float16": 1.0}[dtype]
    low, high = np.array(black), np.array(white)
    # A clip of one value has no range: what is above it is white.
    scale = 1 / np.where(high > low, high - low, np.finfo(np.float64).tiny)
    not_numbers = 0
    step = max(1, _CHUNK // max(1, values[0].size))
    for first in range(0, len(values), step):
        part = values[first : first + step].astype(np.float64)
        if values.dtype.kind == "f":
            wrong = np.isnan(part)
            not_numbers += int(wrong.sum())
            part[wrong] = -np.inf
        with np.errstate(over="ignore"):
            part = np.clip((part - low) * scale, 0, 1) * top
        out[first : first + step] = part if dtype == "float16" else np.rint(part)
    return out, not_numbers
