"""ND2 files of Nikon's NIS-Elements -> one stack, by the package nd2."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from dist_train.data.raw.open_frames import Frames, check_magic, holding
from dist_train.data.raw.stack import GREY, RGB, Choices, Stack, chosen_depth, chosen_series
from dist_train.data.raw.units import names_of, regular_interval
from dist_train.errors import DecodeError
from dist_train.files import open_plain

SUFFIXES = (".nd2",)
PACKAGES = ("nd2",)

_SAVE = "Save it anew with NIS-Elements."
# A chunk's header: magic, length of its name, length of its data. Frames have names of one length,
# and data of a time stamp and pixels.
_HEADER, _MAGIC, _NAME, _STAMP = struct.Struct("<IIQ"), 0x0ABECEDA, 4072, 8
# Bytes at the end of the file that say where the list of chunks is.
_END = 40
_LEGACY = b"\0\0\0\x0c"


def read(path: Path, where: object, choices: Choices) -> Stack:
    """Return the stack of one position in an ND2 file.

    Raises:
        DecodeError: frames are missing, a choice is, or the axes are not known.
    """
    import nd2

    with ExitStack() as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = opened.enter_context(open_plain(path))
        if file.read(len(_LEGACY)) == _LEGACY:
            raise DecodeError("is an ND2 file of the form before 2010", fix=_SAVE)
        size = check_magic(file, _MAGIC.to_bytes(4, "little"), "ND2")
        file.seek(max(0, size - _END))
        if not file.read().startswith(b"ND2 CHUNK MAP SIGNATURE"):
            raise DecodeError(
                "is cut short: its list of chunks is not there", fix="Replace the file."
            )
        form: Any = opened.enter_context(nd2.ND2File(file))
        sizes = {str(axis): int(size) for axis, size in form.sizes.items()}
        names = [f"position {number}" for number in range(sizes.pop("P", 1))]
        for loop in form.experiment:
            if loop.type == "XYPosLoop" and len(loop.parameters.points) == len(names):
                names = [p.name or n for p, n in zip(loop.parameters.points, names, strict=True)]
        position = chosen_series(names, choices.series)
        depth, plane = chosen_depth(sizes, choices)
        numbers = _numbers(form, {"P": position, "T": plane, "Z": plane}, sizes, depth)
        _check_whole(file, size, form, numbers)
        attributes = form.attributes
        bits = int(attributes.bitsPerComponentSignificant)
        volume = form.metadata.channels[0].volume
        x, y, z = (
            float(size) if known else None
            for size, known in zip(volume.axesCalibration, volume.axesCalibrated, strict=True)
        )
        return Stack(
            frames=holding(_frames(form, numbers, sizes), opened),
            dtype=np.dtype(form.dtype),
            count=len(numbers),
            channels=_channels(form, sizes),
            bits=bits if 8 < bits < 16 else None,
            spacing=(None if depth == "T" else z, y, x),
            interval=_interval(form, numbers) if depth == "T" else None,
        )


def _numbers(
    form: Any, chosen: Mapping[str, int], sizes: Mapping[str, int], depth: str | None
) -> list[int]:
    """Numbers of the frames in the file, in the order of the clip."""
    loops: Sequence[Mapping[str, int]] = form.loop_indices or ({},)
    frames = math.prod(size for axis, size in sizes.items() if axis in "TZ")
    declared = max(frames, form.attributes.sequenceCount if loops == ({},) else 0)
    if len(loops) < declared or (depth and depth not in loops[0]):
        raise DecodeError(f"declares {declared} frames, its loops {len(loops)}", fix=_SAVE)
    found = {
        place.get(depth or "", 0): number
        for number, place in enumerate(loops)
        if all(at == chosen.get(axis, 0) for axis, at in place.items() if axis != depth)
    }
    return [found[at] for at in range(sizes.get(depth or "", 1))]


def _check_whole(file: IO[bytes], size: int, form: Any, numbers: Sequence[int]) -> None:
    """Raise DecodeError unless the file has these frames: nd2 gives zeros for missing ones."""
    from nd2._parse._chunk_decode import get_chunkmap

    attributes = form.attributes
    if attributes.tileWidthPx is not None:
        raise DecodeError("has frames of tiles", fix=_SAVE)
    kind = attributes.compressionType
    if kind == "lossy":
        raise DecodeError("has frames of lossy JPEG 2000", fix=_SAVE)
    row = int(attributes.widthBytes or 0)
    least = int(attributes.widthPx or 0) * attributes.componentCount
    if row < least * attributes.bitsPerComponentInMemory // 8:
        raise DecodeError(f"declares rows of {row} bytes", fix="Replace the file.")
    needed = row * attributes.heightPx if kind != "lossless" else 1
    chunks = get_chunkmap(cast(Any, file))
    for at, number in enumerate(numbers):
        name = b"ImageDataSeq|%d!" % number
        offset = chunks.get(name, (size, 0))[0]
        file.seek(min(offset, size))
        header = file.read(_HEADER.size + len(name))
        if len(header) == _HEADER.size + len(name):
            magic, length, held = _HEADER.unpack_from(header)
            whole = offset + _HEADER.size + length + held <= size and held >= needed + _STAMP
            if (magic, length, header[_HEADER.size :]) == (_MAGIC, _NAME, name) and whole:
                continue
        raise DecodeError(f"frame {at} of {len(numbers)} is not there", fix="Replace the file.")


def _frames(form: Any, numbers: Sequence[int], sizes: Mapping[str, int]) -> Frames:
    channels, colours = sizes.get("C", 1), sizes.get("S", 1)
    for number in numbers:
        # A copy: the file cannot be closed while there is a view of it.
        frame = np.array(form.read_frame(number))
        frame = frame.reshape(channels, sizes["Y"], sizes["X"], colours)
        if colours == 3:
            # Stored as blue, green, red.
            yield frame[0, ..., ::-1]
        else:
            yield frame[0, ..., 0] if channels == 1 else np.moveaxis(frame[..., 0], 0, -1)


def _channels(form: Any, sizes: Mapping[str, int]) -> tuple[str, ...]:
    channels, colours = sizes.get("C", 1), sizes.get("S", 1)
    if colours == 3 and channels == 1:
        return RGB
    if colours > 1:
        raise DecodeError(f"has {channels} channels of {colours} colours each", fix=_SAVE)
    names = [channel.channel.name for channel in form.metadata.channels]
    return GREY if channels == 1 else names_of(names, channels)


def _interval(form: Any, numbers: Sequence[int]) -> float | None:
    """Time between frames by their stamps; by the loop's period in a file without stamps."""
    try:
        stamps = [form.frame_metadata(n).channels[0].time.relativeTimeMs / 1000 for n in numbers]
        return regular_interval(stamps)
    except IndexError:
        period = [loop.parameters.periodMs for loop in form.experiment if loop.type == "TimeLoop"]
        return period[0] / 1000 if period and period[0] > 0 else None
