"""One raw file -> one clip: decoded by its kind, and cropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from dist_train.data.raw.outline import LEAST, Box, OutlineColour, crop_to_outline, stack_planes
from dist_train.data.raw.outside_reader import OutsideReader
from dist_train.data.raw.video import VIDEO_SUFFIXES, Video
from dist_train.data.raw.volume_file import VOLUME_SUFFIXES, is_deep, read_raw, to_grey, too_large
from dist_train.data.types import GREY, DtypeName, Record, Volume
from dist_train.errors import ConfigError, DecodeError, DistTrainError, RoiError

# Fewer grey levels in a clip of more than 8 bits are reported: --bits may be wrong.
FEW_LEVELS = 32

# Raised whenever the same file and settings give other pixels.
PIXELS_VERSION = 4


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
        store_dtype: dtype of the stored clips; uint16 and float16 stand for 0 to 1, as uint8 does.
        channel_names: names of the channels of the stored clips.
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
    store_dtype: DtypeName = "uint8"
    channel_names: tuple[str, ...] = GREY

    def __post_init__(self) -> None:
        check_names(self.channel_names)


def check_names(channels: Sequence[str]) -> None:
    """Raise ConfigError unless these are names of channels: not empty, and each once."""
    if not channels or len(set(channels)) < len(channels) or not all(map(str.strip, channels)):
        raise ConfigError(f"channels are {list(channels)}", fix="Give each a name of its own.")


# What to do with files in formats that are not read.
_ARRAY = "Convert it to uint8 or uint16, as an npy array [frames, height, width] or multi-page TIFF"
CONVERT = {
    ".nii.gz": f"{_ARRAY}: a = nibabel.load(file).get_fdata().transpose(2, 1, 0), then "
    "np.save(name, np.clip((a - LOW) * 255 / (HIGH - LOW), 0, 255).astype('uint8')), with the same "
    "LOW and HIGH for all files.",
    ".dcm": f"{_ARRAY}, as by pydicom's pixel_array.",
    ".png": "It is one picture of a clip: put all of them into one multi-page TIFF, in order.",
    ".zip": "Unpack it, and list what is in it.",
} | dict.fromkeys((".h5", ".hdf5", ".mat", ".mha", ".mhd", ".nrrd", ".nd2", ".czi"), f"{_ARRAY}.")
CONVERT |= {
    ".nii": CONVERT[".nii.gz"],
    ".jpg": CONVERT[".png"],
    ".jpeg": CONVERT[".png"],
    ".bmp": CONVERT[".png"],
    ".gz": CONVERT[".zip"],
    ".tar": CONVERT[".zip"],
}


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
    suffix, reader = suffix_of(name), settings.reader
    own = reader is not None and reader.reads(name)
    if own or suffix in VOLUME_SUFFIXES:
        if settings.roi == "outline":
            raise RoiError("a volume has no coloured outline", fix="Prepare it with --roi none.")
        raw = reader.read(path) if reader and own else read_raw(path, where, suffix)
        clip = to_grey(raw, settings.bits)
        record: Record = {"frames_declared": clip.shape[0], "box": None}
        return clip, record | (_few_levels(clip) if is_deep(raw.dtype) else {})
    if suffix not in VIDEO_SUFFIXES:
        known = " ".join(sorted({*VIDEO_SUFFIXES, *VOLUME_SUFFIXES, *suffixes_of(reader)}))
        raise DecodeError(
            f"unknown kind of file '{suffix}'",
            fix=f"{CONVERT.get(suffix, '')} Known: {known}.".lstrip(),
        )
    video = Video(path, where, settings.bits)
    box = None
    if settings.roi == "outline":
        clip, found = crop_to_outline(video, settings.colour, settings.least_outline)
        box = list(astuple(found))
    else:
        planes = [frame.luma for frame in video]
        clip = stack_planes(planes, Box(0, 0, *planes[0].shape))
    _refuse_faulty(video, settings)
    record = {"frames_declared": video.frames_declared, "box": box}
    if video.frames_damaged:
        record["frames_damaged"] = video.frames_damaged
    return clip, record | (_few_levels(clip) if video.is_deep else {})


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
