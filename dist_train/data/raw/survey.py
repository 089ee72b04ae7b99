"""What the files of a set have in common: bits in use, black and white, names of channels.

A camera of 12 bits writes its values into 16, and a float image may have any range. If each file
had its own black and white, equal values of two files would get different grey. So files are looked
at before the first is stored:

- Bits in use: the most that a file declares or needs. All files are looked at that may hold values
  of 16 bits.
- Black and white: the window that all files declare, else percentiles of the values of up to
  ``FILES`` files, evenly spaced in the table.
- Channels: those of the first file that can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

from dist_train.data.raw.clip import PrepareSettings, Values, open_stack, read_values, values_of
from dist_train.data.raw.container import open_container, video_stream
from dist_train.data.raw.frame import has_any_depth, unpacked
from dist_train.data.raw.grey import depth_of
from dist_train.data.raw.intensity import black_and_white, sample_of
from dist_train.data.raw.source import LocalFolder, Source
from dist_train.data.raw.stack import RGB, chosen_channels
from dist_train.data.raw.video import VIDEO_SUFFIXES
from dist_train.errors import DecodeError, DistTrainError, RoiError, StoreError
from dist_train.files import open_plain
from dist_train.system.supervised_pool import Steps

#: Files whose values are sampled, and values of each.
FILES, VALUES = 1024, 1 << 14
# Number of files that a process looks at before it reports.
PART = 64
# Other containers hold no raw values of cameras, and opening half a million of them takes hours.
DEEP_VIDEO = (".avi", ".mkv", ".mov")


@dataclass(frozen=True)
class Look:
    """Files to look at.

    Attributes:
        first: number of the first one among all files that are looked at.
        sampled: positions of files whose values are sampled.
        condemned: those that crashed their process, by position, and how.
    """

    source: Source
    names: Sequence[str]
    settings: PrepareSettings
    first: int
    sampled: frozenset[int]
    condemned: Mapping[int, str] = field(default_factory=dict)

    def without(self, position: int, reason: str) -> Look:
        return replace(self, condemned={**self.condemned, position: reason})


@dataclass
class Seen:
    """What was seen in some files.

    Attributes:
        bits: the most in use in values whose rule needs them.
        samples: values [N, C] by number of the file.
        depths: bits by which the values of deep video were scaled, by number of the file.
        windows: the windows that files declare, None for those without.
        channels: names of the chosen channels, by number of the file.
    """

    bits: int | None = None
    samples: dict[int, np.ndarray] = field(default_factory=dict)
    depths: dict[int, int] = field(default_factory=dict)
    windows: set[tuple[float, float] | None] = field(default_factory=set)
    channels: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def add(self, other: Seen) -> None:
        self.bits = max((b for b in (self.bits, other.bits) if b is not None), default=None)
        self.samples |= other.samples
        self.depths |= other.depths
        self.windows |= other.windows
        self.channels |= other.channels


Run = Callable[[Callable[[Look, Steps], Seen], Iterable[Look], Callable[..., Look]], Any]


def survey(
    source: Source, names: Sequence[str], settings: PrepareSettings, run: Run
) -> PrepareSettings:
    """Return the settings with what the rule for black and white and the channels need.

    Files that cannot be read are passed over; they are rejected later.

    Args:
        run: (function, items, without) -> results in any order, see ``supervised``.

    Raises:
        StoreError: files are missing on which black and white depend.
    """
    # The first readable file tells the channels.
    named = [
        name
        for number, name in enumerate(names)
        if _may_matter(name, settings) or (_needs_names(settings) and number < PART)
    ]
    here = [name for name in named if _is_here(source, name)]
    if not here:
        return _settled(settings, Seen())
    spaced = np.linspace(0, len(here) - 1, min(FILES, len(here))).round().astype(int).tolist()
    used = list(range(len(here)))
    if settings.intensity.rule == "percentile":
        used = [n for n in used if n in {*spaced} or _is_needed(here[n], n, settings)]
    looks = []
    for first in range(0, len(used), PART):
        numbers = used[first : first + PART]
        part = [here[n] for n in numbers]
        sampled = frozenset(position for position, n in enumerate(numbers) if n in {*spaced})
        looks.append(Look(source.narrowed(part), part, settings, first, sampled))
    seen = Seen()
    for found in run(look, looks, Look.without):
        seen.add(found)
    if (seen.bits is not None or seen.samples) and (missing := source.missing(named)):
        raise StoreError(
            f"black and white depend on all files, and {len(missing)} of them are not here",
            where=source.where(missing[0]),
            fix="Say them with --bits or --intensity 'window LOW HIGH'.",
        )
    return _settled(settings, seen)


def _settled(settings: PrepareSettings, seen: Seen) -> PrepareSettings:
    if settings.bits is None:
        settings = replace(settings, bits=seen.bits)
    if _needs_names(settings) and not seen.channels:
        raise StoreError(
            f"no file of the first {PART} could be read, and they tell the names of the channels",
            fix="Replace or remove them, or prepare with --channels grey.",
        )
    if seen.channels:
        settings = replace(settings, channel_names=seen.channels[min(seen.channels)])
    channels = len(settings.channel_names)
    samples = [
        # White was that of the file's own bits.
        s if n not in seen.depths else s * 2.0 ** (seen.depths[n] - (settings.bits or 0))
        for n, s in sorted(seen.samples.items())
        if s.shape[1] == channels
    ]
    windows = seen.windows
    if settings.intensity.rule == "auto" and len(windows) == 1 and None not in windows:
        ((low, high),) = (window for window in windows if window is not None)
        return replace(settings, black=(low,) * channels, white=(high,) * channels)
    if samples:
        black, white = black_and_white(
            np.concatenate(samples),
            settings.intensity.percentiles(),
            together=settings.channel_names == RGB,
        )
        settings = replace(settings, black=black, white=white)
    return settings


def look(part: Look, steps: Steps) -> Seen:
    """Look at some files."""
    seen = Seen()
    for position, name in enumerate(part.names):
        if position in part.condemned:
            continue
        try:
            with part.source.fetched(name) as path, steps.at(position):
                one = _look_at(path, name, part.source.where(name), part, position)
        except (DecodeError, RoiError):
            continue
        # The network or the machine is at fault.
        except DistTrainError:
            raise
        # The file is at fault, which is reported when it is decoded for the store.
        except Exception:
            continue
        seen.add(one)
    return seen


def _look_at(path: Path, name: str, where: str, part: Look, position: int) -> Seen:
    settings, number = part.settings, part.first + position
    rule, by_set = settings.intensity, settings.intensity.over == "set"
    # The store's channels are not known yet.
    stack = open_stack(path, name, where, settings)
    seen = Seen()
    if _needs_names(settings):
        names = RGB if stack is None else stack.channels
        chosen = chosen_channels(names, settings.choices.channels)
        seen.channels[number] = tuple(names[n] for n in chosen or ())
    if stack is None:
        if settings.bits is None and _is_deep_video(name):
            seen.bits = video_bits(path)
            if seen.bits is not None:
                settings = replace(settings, bits=seen.bits)
                seen.depths[number] = seen.bits
        if rule.rule == "percentile" and by_set and position in part.sampled:
            seen.add(_sampled(read_values(path, name, where, settings), number))
        return seen
    if by_set and rule.needs_percentiles(stack.dtype):
        seen.windows.add(stack.window)
    needs_bits = by_set and settings.bits is None and rule.needs_bits(stack.dtype)
    needs_values = by_set and rule.needs_percentiles(stack.dtype) and position in part.sampled
    if needs_bits and stack.bits is not None:
        seen.bits, needs_bits = stack.bits, False
    if needs_bits or needs_values:
        values = values_of(stack, settings)
        if needs_bits:
            seen.bits = depth_of(int(values.pixels.max(initial=0)))
        if needs_values:
            seen.add(_sampled(values, number))
    return seen


def _sampled(values: Values, number: int) -> Seen:
    # Those of luma count together.
    samples = sample_of(values.pixels, len(values.channels))
    samples = samples[:: max(1, len(samples) // VALUES)]
    return Seen(samples={number: samples})


def video_bits(path: Path) -> int | None:
    """Return the bits in use in a video whose values have any depth in 16 bits, else None."""
    with open_plain(path) as file, open_container(file) as container:
        stream = video_stream(container)
        if not has_any_depth(stream.codec_context.pix_fmt or ""):
            return None
        converter = VideoReformatter()
        largest = (
            int(unpacked(frame, converter).max())
            for frame in container.decode(stream)
            if has_any_depth(frame.format.name)
        )
        return depth_of(max(largest, default=0))


def survey_arrays(arrays: Sequence[np.ndarray], settings: PrepareSettings) -> PrepareSettings:
    """``survey`` of volumes in memory."""
    largest = [int(array.max(initial=0)) for array in arrays if array.dtype == np.uint16]
    return replace(settings, bits=depth_of(max(largest))) if largest else settings


def _needs_names(settings: PrepareSettings) -> bool:
    return settings.choices.channels not in ("auto", "grey")


def _is_deep_video(name: str) -> bool:
    return name.lower().endswith(DEEP_VIDEO)


def _may_matter(name: str, settings: PrepareSettings) -> bool:
    """Whether black and white of the set may depend on a file of this name."""
    reader = settings.reader
    is_video = name.lower().endswith(tuple(VIDEO_SUFFIXES)) and not (reader and reader.reads(name))
    if is_video and settings.bits is None and _is_deep_video(name):
        return True
    if settings.intensity.over == "clip":
        return False
    return settings.intensity.rule == "percentile" or not is_video


def _is_needed(name: str, number: int, settings: PrepareSettings) -> bool:
    """Whether a file is looked at even if its values are not sampled."""
    return (settings.bits is None and _is_deep_video(name)) or (
        _needs_names(settings) and number < PART
    )


def _is_here(source: Source, name: str) -> bool:
    """Whether a file may be read: False for a local one that is missing."""
    return not isinstance(source, LocalFolder) or source.path(name) is not None
