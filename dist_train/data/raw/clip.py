"""One raw file -> one clip: decoded by its kind, and cropped."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from dist_train.data.raw.formats import format_of
from dist_train.data.raw.formats import suffixes as format_suffixes
from dist_train.data.raw.outline import LEAST, Box, OutlineColour, crop_to_outline, stack_planes
from dist_train.data.raw.outside_reader import OutsideReader
from dist_train.data.raw.stack import LUMA, RGB, Choices, Stack, chosen_channels
from dist_train.data.raw.video import VIDEO_SUFFIXES, Video
from dist_train.data.raw.volume_file import VOLUME_SUFFIXES, is_deep, read_raw, to_grey, too_large
from dist_train.data.types import Record, Volume
from dist_train.errors import DecodeError, DistTrainError, RoiError

# Fewer grey levels in a clip of more than 8 bits are reported: --bits may be wrong.
FEW_LEVELS = 32

# Settings that later versions added. A job has them only if they are not the default.
LATER = ("reader", "choices")

# Raised whenever the same file and settings give other pixels.
PIXELS_VERSION = 4
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
    record_version: int = RECORD_VERSION


# What to do with files in formats that are not read.
_ARRAY = "Convert it to uint8 or uint16, as an npy array [frames, height, width] or multi-page TIFF"
CONVERT = {
    ".nii.gz": f"{_ARRAY}: a = nibabel.load(file).get_fdata().transpose(2, 1, 0), then "
    "np.save(name, np.clip((a - LOW) * 255 / (HIGH - LOW), 0, 255).astype('uint8')), with the same "
    "LOW and HIGH for all files.",
    ".dcm": f"{_ARRAY}, as by pydicom's pixel_array.",
    ".jpg": "It is a single picture: let the table name the folder of a clip's pictures, or put "
    "them into one multi-page TIFF, in order.",
    ".zip": "Unpack it, and list what is in it.",
} | dict.fromkeys((".h5", ".hdf5", ".mat", ".mha", ".mhd", ".nrrd", ".nd2", ".czi"), f"{_ARRAY}.")
CONVERT |= {
    ".nii": CONVERT[".nii.gz"],
    ".gz": CONVERT[".zip"],
    ".tar": CONVERT[".zip"],
} | dict.fromkeys((".png", ".webp", ".jpeg", ".bmp", ".pgm", ".ppm", ".pnm"), CONVERT[".jpg"])


def read_clip(
    path: Path, name: str, where: str, settings: PrepareSettings
) -> tuple[Volume, Record]:
    """Return the clip in a file, uint8 [D, H, W], and what its record says of the decoding.

    Args:
        path: the place of the bytes.
        name: the file's name, whose suffix tells the format.
        where: the file's name in messages.

    Raises:
        DecodeError: the file does not decode, or not within the memory limit.
        RoiError: the clip has no outline.
    """
    try:
        return _read(path, name, where, settings)
    except (DecodeError, RoiError) as error:
        raise type(error)(error.what, where=where, fix=error.fix) from None
    except DistTrainError:
        raise
    except MemoryError:
        raise too_large(where) from None
    # Corrupt files reach untested decoder paths. The file is rejected, and the run goes on.
    except Exception as error:
        raise DecodeError(f"cannot be decoded ({error!r})", where=where) from None


def suffixes_of(reader: OutsideReader | None) -> tuple[str, ...]:
    """The suffixes of a reader's files, none without a reader."""
    return () if reader is None else reader.suffixes


def suffix_of(name: str) -> str:
    name = name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else PurePosixPath(name).suffix


def _read(path: Path, name: str, where: str, settings: PrepareSettings) -> tuple[Volume, Record]:
    name, _, dataset = name.partition("::")
    suffix, reader = suffix_of(name), settings.reader
    form = format_of(name, path)
    if form is not None:
        choices = replace(settings.choices, dataset=dataset or None)
        return _from_stack(form.read(path, where, choices), settings)
    own = reader is not None and reader.reads(name)
    if own or suffix in VOLUME_SUFFIXES:
        if settings.roi == "outline":
            raise RoiError("a volume has no coloured outline", fix="Prepare it with --roi none.")
        raw = reader.read(path) if reader and own else read_raw(path, where, suffix)
        clip = to_grey(raw, settings.bits)
        record: Record = {"frames_declared": clip.shape[0], "box": None}
        return clip, record | (_few_levels(clip) if is_deep(raw.dtype) else {})
    if suffix not in VIDEO_SUFFIXES:
        own_suffixes = {*VIDEO_SUFFIXES, *VOLUME_SUFFIXES, *format_suffixes()}
        known = " ".join(sorted({*own_suffixes, *suffixes_of(reader)}))
        raise DecodeError(
            f"unknown kind of file '{suffix}'",
            fix=f"{CONVERT.get(suffix, '')} Known: {known}.".lstrip(),
        )
    chosen = chosen_channels(RGB, settings.choices.channels)
    video = Video(path, where, settings.bits, "grey" if chosen is None else "rgb")
    box = None
    if settings.roi == "outline":
        clip, found = crop_to_outline(video, settings.colour, settings.least_outline)
        box = list(astuple(found))
    else:
        planes = [frame.part(slice(None), slice(None)) for frame in video]
        clip = stack_planes(planes, Box(0, 0, *planes[0].shape[:2]))
    _refuse_faulty(video, settings)
    record = {"frames_declared": video.frames_declared, "box": box}
    if video.frames_damaged:
        record["frames_damaged"] = video.frames_damaged
    if settings.record_version > 1:
        record |= _timing(video)
    if chosen is not None:
        clip = np.ascontiguousarray(_channels_of(clip, chosen))
    return clip, record | (_few_levels(clip) if video.is_deep else {})


def _timing(video: Video) -> Record:
    """The record's entries on the time between frames and the light of their values."""
    record: Record = {"frame_rate": "variable"} if video.is_variable else {}
    if video.interval is not None:
        record["interval"] = video.interval
    if video.transfer is not None:
        record["transfer"] = video.transfer
    return record


def _from_stack(stack: Stack, settings: PrepareSettings) -> tuple[Volume, Record]:
    if settings.roi == "outline":
        raise RoiError("a volume has no coloured outline", fix="Prepare it with --roi none.")
    chosen = chosen_channels(stack.channels, settings.choices.channels)
    frames = [_channels_of(frame, chosen) for frame in stack.frames]
    if not frames:
        raise DecodeError("holds no frame")
    if stack.stopped_by and settings.truncated == "reject":
        raise DecodeError(
            f"{len(frames)} of {stack.count} frames are there: {stack.stopped_by}",
            fix="Replace the file, or prepare with --truncated keep.",
        )
    clip = to_grey(np.stack(frames), settings.bits or stack.bits)
    record: Record = {"frames_declared": stack.count, "box": None}
    return clip, record | (_few_levels(clip) if is_deep(stack.dtype) else {})


def _channels_of(frame: np.ndarray, chosen: tuple[int, ...] | None) -> np.ndarray:
    """The chosen channels of a frame: [H, W] for one channel or luma, else [H, W, C]."""
    if frame.ndim == 2:
        return frame
    if chosen is None:
        luma = frame[..., :3] @ np.array(LUMA, np.float32)
        return np.asarray(np.rint(luma).astype(frame.dtype))
    return frame[..., chosen[0]] if len(chosen) == 1 else frame[..., list(chosen)]


def _refuse_faulty(video: Video, settings: PrepareSettings) -> None:
    """Raise DecodeError for a truncated or damaged video, unless the settings keep it."""
    if video.truncated and settings.truncated == "reject":
        because = f": {video.stopped_by}" if video.stopped_by else ""
        of = f" of {video.frames_declared} declared" if video.frames_declared else ""
        raise DecodeError(
            f"the video stops after {video.frames_decoded}{of} frames{because}",
            fix="Replace the file, or prepare with --truncated keep.",
        )
    if video.frames_damaged and settings.damaged == "reject":
        raise DecodeError(
            f"{video.frames_damaged} of {video.frames_decoded} frames are damaged, and those that "
            "build on them",
            fix="Replace the file, or prepare with --damaged keep.",
        )


def _few_levels(clip: Volume) -> Record:
    """The record's entry for a clip with few grey levels."""
    levels = np.count_nonzero(np.bincount(clip.reshape(-1), minlength=256))
    return {"grey_levels": int(levels)} if levels < FEW_LEVELS else {}
