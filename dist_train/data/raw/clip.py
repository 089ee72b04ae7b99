"""One raw file -> one clip: decoded by its format, cropped, and mapped to the stored type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal, cast

import numpy as np

from dist_train.data.raw.axes import is_length
from dist_train.data.raw.damage import OF_A_FILE, too_large
from dist_train.data.raw.formats import format_of
from dist_train.data.raw.formats import suffixes as format_suffixes
from dist_train.data.raw.intensity import Intensity, SetRange, range_of, to_stored
from dist_train.data.raw.outline import LEAST, Box, OutlineColour, crop_to_outline, stack_planes
from dist_train.data.raw.outside_reader import OutsideReader
from dist_train.data.raw.picture import SUFFIXES as PICTURES
from dist_train.data.raw.source import split_dataset
from dist_train.data.raw.stack import LUMA, RGB, Choices, Stack, chosen_channels
from dist_train.data.raw.stored_picture import Pixels
from dist_train.data.raw.video import VIDEO_SUFFIXES, Video
from dist_train.data.types import FEW_LEVELS, GREY, MOST_SATURATED, DtypeName, Record, Volume
from dist_train.errors import ConfigError, DecodeError, DistTrainError, RoiError
from dist_train.system.advice import blame_machine

# Settings that later versions added. A job has them only if they are not the default.
LATER = (*("reader", "choices", "intensity", "black", "white", "store_dtype", "channel_names"),)

# Raised whenever the same file and settings give other pixels. ``pixels_version`` has the settings
# that a version concerns: 5 orders channels by their names, and windows and bits of one clip fit
# video and values beyond the declared bits.
PIXELS_VERSION = 5
# Raised whenever the record of the same file and settings gets other entries. A store is continued
# and repaired with its own: 1 has no times between frames.
RECORD_VERSION = 2


@dataclass(frozen=True)
class PrepareSettings:
    """The settings that the bytes of a store depend on.

    Attributes:
        roi: "outline" crops to the union of the outline's boxes; "none" keeps whole frames.
        truncated: what to do with a video of fewer frames than it declares.
        damaged: what to do with a video in which the decoder guessed parts of frames.
        clip_seconds, clip_memory (MiB): limits for decoding one file; beyond them it is rejected.
        bits: bits in use in the 16-bit values of all files. If None, such files are rejected.
        least_outline: least height and width of an outline in pixels.
        reader: reads the files of its suffixes, before all other readers.
        choices: what to take from files of several axes, channels or series.
        intensity: the rule for black and white.
        black, white: of each channel, found in the set; None if the rule needs none.
        store_dtype: type of the stored values.
        channel_names: of the store; all clips have as many.
        record_version: ``RECORD_VERSION`` of the release that began the store.
    """

    roi: Literal["outline", "none"] = "outline"
    colour: OutlineColour = field(default_factory=OutlineColour)
    truncated: Literal["reject", "keep"] = "reject"
    damaged: Literal["reject", "keep"] = "reject"
    shard_clips: int = 128
    clip_seconds: float = 600.0
    clip_memory: int = 2048
    bits: int | None = None
    least_outline: int = LEAST
    reader: OutsideReader | None = None
    choices: Choices = field(default_factory=Choices)
    intensity: Intensity = field(default_factory=Intensity)
    black: tuple[float, ...] | None = None
    white: tuple[float, ...] | None = None
    store_dtype: DtypeName = "uint8"
    channel_names: tuple[str, ...] = GREY
    record_version: int = RECORD_VERSION

    def __post_init__(self) -> None:
        check_names(self.channel_names)


def pixels_version(settings: PrepareSettings, *, of_files: bool = True) -> int:
    """The version that last changed pixels of such settings. Stores that it left alone keep theirs.

    Args:
        of_files: False for arrays, whose channels are stored as they are.
    """
    has_channels = of_files and len(settings.channel_names) > 1
    return PIXELS_VERSION if has_channels or settings.intensity != Intensity() else 4


def check_names(channels: Sequence[str]) -> None:
    """Raise ConfigError unless these are names of channels: not empty, and each once."""
    if not channels or len(set(channels)) < len(channels) or not all(map(str.strip, channels)):
        raise ConfigError(f"channels are {list(channels)}", fix="Give each a name of its own.")


# What to do with files in formats that are not read.
_PICTURE = (
    "It is a single picture: let the table name the folder of a clip's pictures, or put them into "
    "one multi-page TIFF, in order."
)
CONVERT = dict.fromkeys(PICTURES, _PICTURE) | dict.fromkeys(
    (".zip", ".gz", ".tar"), "Unpack it, and list what is in it."
)


@dataclass(frozen=True)
class Values:
    """A clip with the values of its file.

    Attributes:
        pixels: [D, H, W], or [D, H, W, C] with several channels; [D, H, W, 3] for luma, which is
            taken of stored values.
        channels: names of what is stored.
        bits, window: see ``Stack``.
        record: what its record says of the decoding.
        is_deep: the file has more than 8 bits.
        is_full: 0 and the largest value of the type are black and white already.
    """

    pixels: np.ndarray
    channels: tuple[str, ...]
    bits: int | None
    window: tuple[float, float] | None
    record: Record
    is_deep: bool = False
    is_full: bool = False


def read_clip(
    path: Path, name: str, where: str, settings: PrepareSettings
) -> tuple[Volume, Record]:
    """Return the clip in a file, and what its record says of the decoding.

    Args:
        path: the place of the bytes.
        name: the file's name, whose suffix tells the format.
        where: the file's name in messages.

    Returns:
        The clip: [D, H, W], or [D, H, W, C] with several channels, of ``settings.store_dtype``.

    Raises:
        DecodeError: the file does not decode, or not within the memory limit.
        RoiError: the clip has no outline.
    """
    with decoding(where):
        return to_clip(read_values(path, name, where, settings), settings)


@contextmanager
def decoding(where: str) -> Iterator[None]:
    """Turn what decoders raise on damaged bytes into a DecodeError that names the file."""
    try:
        yield
    except (DecodeError, RoiError) as error:
        raise type(error)(error.what, where=where, fix=error.fix) from None
    except DistTrainError:
        raise
    except MemoryError:
        raise too_large(where) from None
    # Corrupt files reach untested decoder paths. The file is rejected, and the run goes on.
    except Exception as error:
        blame_machine(error, where, but=OF_A_FILE)
        raise DecodeError(f"cannot be decoded ({error!r})", where=where) from None


def suffixes_of(reader: OutsideReader | None) -> tuple[str, ...]:
    """The suffixes of a reader's files, none without a reader."""
    return () if reader is None else reader.suffixes


def suffix_of(name: str) -> str:
    name = name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else PurePosixPath(name).suffix


def open_stack(path: Path, name: str, where: str, settings: PrepareSettings) -> Stack | None:
    """Open a file of any format but video; None for a video.

    Raises what decoders raise.
    """
    name, dataset = split_dataset(name)
    suffix, reader = suffix_of(name), settings.reader
    choices = replace(settings.choices, dataset=dataset or None)
    if reader is not None and reader.reads(name):
        return reader.read(path, choices)
    form = format_of(name, path)
    if dataset and not getattr(form, "HAS_DATASETS", False):
        raise DecodeError(
            f"'::{dataset}' names an array in the file, and such a file has none by name",
            fix="Give the file's name alone; --series chooses an image.",
        )
    if form is not None:
        return form.read(path, where, choices)
    if suffix in VIDEO_SUFFIXES:
        return None
    own_suffixes = {*VIDEO_SUFFIXES, *format_suffixes()}
    known = " ".join(sorted({*own_suffixes, *suffixes_of(reader)}))
    raise DecodeError(
        f"unknown kind of file '{suffix}'",
        fix=f"{CONVERT.get(suffix, '')} Known: {known}.".lstrip(),
    )


def read_values(path: Path, name: str, where: str, settings: PrepareSettings) -> Values:
    """Read the clip in a file, cropped to its outline, with the file's own values.

    Raises what decoders raise.
    """
    stack = open_stack(path, name, where, settings)
    return _of_video(path, where, settings) if stack is None else values_of(stack, settings)


def values_of(stack: Stack, settings: PrepareSettings) -> Values:
    """Read the chosen channels of a stack.

    Raises:
        DecodeError: they are not there, or frames are missing or damaged.
        RoiError: an outline is asked for.
    """
    if settings.roi == "outline":
        raise RoiError("a volume has no coloured outline", fix="Prepare it with --roi none.")
    chosen = chosen_channels(stack.channels, settings.choices.channels)
    frames = [_channels_of(frame, chosen) for frame in stack.frames]
    if not frames:
        raise DecodeError("holds no frame")
    _refuse_faulty(len(frames), stack.count, stack.damaged, stack.stopped_by, settings)
    record: Record = {"frames_declared": stack.count, "box": None}
    if stack.damaged:
        record["frames_damaged"] = stack.damaged
    # Readers may give what a file says, such as 0 or NaN.
    spacing = [float(each) if each and is_length(each) else None for each in stack.spacing]
    if any(spacing):
        record["spacing"] = spacing
    if stack.interval and is_length(stack.interval):
        record["interval"] = float(stack.interval)
    names = GREY if chosen is None else tuple(stack.channels[n] for n in chosen)
    is_deep = stack.dtype.itemsize > 1
    return Values(np.stack(frames), names, stack.bits, stack.window, record, is_deep)


def _channels_of(frame: np.ndarray, chosen: tuple[int, ...] | None) -> np.ndarray:
    """The chosen channels of a frame: [H, W] for one channel, else [H, W, C]; RGB for luma."""
    if frame.ndim == 2:
        return frame
    if chosen is None:
        return frame[..., :3]
    return frame[..., chosen[0]] if len(chosen) == 1 else frame[..., list(chosen)]


def _of_video(path: Path, where: str, settings: PrepareSettings) -> Values:
    chosen = chosen_channels(RGB, settings.choices.channels)
    colours = "grey" if chosen is None else "rgb"
    deep = "" if settings.store_dtype == "uint8" else "16"
    video = Video(path, where, settings.bits, cast(Pixels, colours + deep))
    box = None
    if settings.roi == "outline":
        clip, found = crop_to_outline(video, settings.colour, settings.least_outline)
        box = list(astuple(found))
    else:
        planes = [frame.part(slice(None), slice(None)) for frame in video]
        clip = stack_planes(planes, Box(0, 0, *planes[0].shape[:2]))
    declared, damaged = video.frames_declared, video.frames_damaged
    if video.truncated or damaged:
        because = video.stopped_by
        _refuse_faulty(video.frames_decoded, declared, damaged, because, settings, "video")
    record: Record = {"frames_declared": declared, "box": box}
    if damaged:
        record["frames_damaged"] = damaged
    if settings.record_version > 1:
        record |= _timing(video)
    if chosen is not None:
        clip = np.ascontiguousarray(_channels_of(clip, chosen))
    names = GREY if chosen is None else tuple(RGB[n] for n in chosen)
    return Values(clip, names, None, None, record, video.is_deep, is_full=True)


def _timing(video: Video) -> Record:
    """The record's entries on the time between frames and the light of their values."""
    record: Record = {"frame_rate": "variable"} if video.is_variable else {}
    if video.interval is not None:
        record["interval"] = video.interval
    if video.transfer is not None:
        record["transfer"] = video.transfer
    return record


def to_clip(values: Values, settings: PrepareSettings) -> tuple[Volume, Record]:
    """Map the values of a clip to the stored type.

    Raises:
        DecodeError: they do not fit the rule, or the clip has other channels than the store.
    """
    names, other = settings.channel_names, None
    if len(values.channels) != len(names):
        raise DecodeError(
            f"has {len(values.channels)} channels ({', '.join(values.channels)}), and the store "
            f"{len(names)} ({', '.join(names)})",
            fix="Choose the same channels in all files: --channels.",
        )
    if values.channels != names and set(values.channels) == set(names):
        order = [values.channels.index(name) for name in names]
        values = replace(values, pixels=values.pixels[..., order], channels=names)
    elif values.channels != names != GREY:
        other = list(values.channels)
    rule = settings.intensity
    if values.is_full and rule.rule in ("auto", "bits"):
        rule = Intensity("dtype")
    elif values.is_full and rule.rule == "window":
        rule = _window_of_video(values, rule)
    black, white = range_of(
        values.pixels,
        rule,
        SetRange(settings.bits, settings.black, settings.white),
        channels=len(names),
        bits=values.bits,
        window=values.window,
        is_colour=values.channels == RGB,
    )
    clip, not_numbers = to_stored(values.pixels, black, white, settings.store_dtype)
    if clip.ndim == 4 and values.channels == GREY:
        luma = clip @ np.array(LUMA, np.float32)
        clip = (luma if clip.dtype.kind == "f" else np.rint(luma)).astype(clip.dtype)
    if settings.record_version == 1:
        # As the release wrote them that began the store.
        return clip, values.record | (_few_levels(clip, 32) if values.is_deep else {})
    record = values.record | _few_levels(clip, FEW_LEVELS) | _saturated(clip)
    if values.pixels.dtype != np.uint8 or settings.intensity != Intensity():
        record["intensity"] = [list(black), list(white)]
    if not_numbers:
        record["not_numbers"] = not_numbers
    if other is not None:
        record["channels"] = other
    return clip, record


def _window_of_video(values: Values, rule: Intensity) -> Intensity:
    """A window in a video's values of 8 bits, on the scale of its pixels.

    Raises:
        DecodeError: the video has more bits; its pixels are on another scale than its values.
    """
    if values.is_deep:
        raise DecodeError(
            "is a video of more than 8 bits, for which --intensity window is not known",
            fix="Prepare with another --intensity, or save it as TIFF.",
        )
    scale = 257 if values.pixels.dtype == np.uint16 else 1
    return replace(rule, low=rule.low * scale, high=rule.high * scale)


def _few_levels(clip: np.ndarray, enough: int) -> Record:
    """The record's entry for a clip with few grey levels."""
    pixels = clip.reshape(-1)
    # Most clips have enough in a small part.
    if len(np.unique(pixels[:: max(1, len(pixels) >> 12)])) >= enough:
        return {}
    levels = len(np.unique(pixels))
    return {"grey_levels": levels} if levels < enough else {}


def _saturated(clip: np.ndarray) -> Record:
    """The record's entry for a clip with many pixels of the largest value."""
    top = 1 if clip.dtype.kind == "f" else np.iinfo(clip.dtype).max
    share = np.count_nonzero(clip == top) / clip.size
    return {"saturated": round(share, 4)} if share > MOST_SATURATED else {}


def _refuse_faulty(
    frames: int,
    declared: int,
    damaged: int,
    stopped_by: str | None,
    settings: PrepareSettings,
    kind: str = "clip",
) -> None:
    """Raise DecodeError for a truncated or damaged clip, unless the settings keep it."""
    if (frames < declared or stopped_by is not None) and settings.truncated == "reject":
        because = f": {stopped_by}" if stopped_by else ""
        of = f" of {declared} declared" if declared else ""
        raise DecodeError(
            f"the {kind} stops after {frames}{of} frames{because}",
            fix="Replace the file, or prepare with --truncated keep.",
        )
    if damaged and settings.damaged == "reject":
        raise DecodeError(
            f"{damaged} of {frames} frames are damaged, and those that build on them",
            fix="Replace the file, or prepare with --damaged keep.",
        )
