"""The edit list of an MP4 or MOV file, refused where FFmpeg does not play it as it is written.

FFmpeg plays several parts in their order, and drops what they hide. It knows no speed other than 1,
and after a pause in the middle it plays all frames.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import IO

import av

from dist_train.errors import DecodeError

# Longest edit list in bytes that is read.
_MOST = 1 << 20


def check_edits(
    file: IO[bytes], container: av.container.InputContainer, stream: av.VideoStream
) -> None:
    """Refuse a pause between parts of a video, and a speed other than 1.

    Raises:
        DecodeError: the edit list of the stream has one of these.
    """
    if not container.format.name.startswith("mov"):
        return
    place, size = file.tell(), file.seek(0, os.SEEK_END)
    try:
        edits = _edits(file, size, stream.id)
    # FFmpeg judges damaged boxes.
    except (struct.error, OverflowError):
        return
    finally:
        file.seek(place)
    fix = "Encode it anew, such as by 'ffmpeg -i FILE -c:v ffv1 NEW.mkv'."
    for number, (media_time, rate) in enumerate(edits):
        if media_time == -1:
            if number:
                raise DecodeError("its edit list has a pause after its first frames", fix=fix)
        elif rate != 1:
            raise DecodeError(f"its edit list plays a part at {rate:g} times the speed", fix=fix)


def _edits(file: IO[bytes], size: int, track: int) -> list[tuple[int, float]]:
    """The media time (-1 for a pause) and speed of each edit (ISO/IEC 14496-12, 8.6.6)."""
    for kind, start, end in _boxes(file, 0, size):
        if kind != b"moov":
            continue
        for inner, *span in _boxes(file, start, end):
            if inner == b"trak":
                boxes = {name: (first, last) for name, first, last in _boxes(file, *span)}
                if b"edts" in boxes and _track_of(file, *boxes.get(b"tkhd", (0, 0))) == track:
                    lists = {name: (a, b) for name, a, b in _boxes(file, *boxes[b"edts"])}
                    return _edit_list(file, *lists[b"elst"]) if b"elst" in lists else []
    return []


def _edit_list(file: IO[bytes], start: int, end: int) -> list[tuple[int, float]]:
    file.seek(start)
    content = file.read(min(end - start, _MOST))
    version, count = content[0], struct.unpack_from(">I", content, 4)[0]
    entry = struct.Struct(">Qqi" if version == 1 else ">Iii")
    whole = min(count, (len(content) - 8) // entry.size)
    edits = entry.iter_unpack(content[8 : 8 + whole * entry.size])
    return [(media_time, rate / 65536) for _, media_time, rate in edits]


def _track_of(file: IO[bytes], start: int, end: int) -> int:
    """The number of a track, 0 without a header."""
    file.seek(start)
    content = file.read(min(end - start, 24))
    return int(struct.unpack_from(">I", content, 20 if content[0] else 12)[0]) if content else 0


def _boxes(file: IO[bytes], start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The kinds of boxes, and where their contents begin and end."""
    while start + 8 <= end:
        file.seek(start)
        length, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8))
            header = 16
        last = start + length if length else end
        if last < start + header or last > end:
            return
        yield kind, start + header, last
        start = last
