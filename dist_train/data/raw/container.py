"""A video file, opened for FFmpeg as one known container, and what its header declares.

By itself FFmpeg would guess the format of a file, which may be a playlist or a script of other
files, and take a part of its name for a protocol. So it gets the open file and the format.
"""

from __future__ import annotations

import os
from typing import IO

import av

from dist_train.errors import DecodeError

# No protocol is allowed.
_NO_OTHER_FILE = {"protocol_whitelist": "none"}
_KNOWN = "Known: MP4 and MOV, AVI, Matroska and WebM, GIF, MPEG-1 and MPEG-2."
# ISO/IEC 14496-12 and QuickTime: what may come first in the file.
_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"styp"}
_TS_PACKET = 188


def open_container(file: IO[bytes]) -> av.container.InputContainer:
    """Open a video file as the container that its first bytes show.

    Raises:
        DecodeError: the first bytes belong to no known container.
        av.error.FFmpegError: the file cannot be read.
    """
    first = file.read(_TS_PACKET + 1)
    file.seek(0)
    name = _format(first)
    if name is None:
        raise DecodeError(
            "cannot be opened (its first bytes are those of no video file)"
            if first
            else "cannot be opened (it is empty)",
            fix=_KNOWN,
        )
    return av.open(
        file,
        "r",
        format=name,
        options=_NO_OTHER_FILE,
        metadata_errors="ignore",
        buffer_size=1 << 18,
    )


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Return the only video stream. A cover picture does not count as one.

    Raises:
        DecodeError: there is no stream or several, or no decoder for it.
    """
    picture = av.stream.Disposition.attached_pic
    streams = [one for one in container.streams.video if not one.disposition & picture]
    if not streams:
        raise DecodeError("holds no video stream")
    if len(streams) > 1:
        raise DecodeError(
            f"holds {len(streams)} video streams",
            fix="Save the one that you need as a separate file.",
        )
    if streams[0].codec_context is None:
        raise DecodeError(
            "is in a form that FFmpeg does not decode",
            fix="Save it as a multi-page TIFF, or as Matroska with the codec FFV1.",
        )
    # Files are decoded in parallel, by processes.
    streams[0].codec_context.thread_count = 1
    return streams[0]


def _format(first: bytes) -> str | None:
    """FFmpeg's name of the container that begins so."""
    if first[4:8] in _BOXES:
        return "mov"
    if first.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if first.startswith(b"RIFF") and first[8:12] == b"AVI ":
        return "avi"
    if first.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if first.startswith(b"\0\0\1") and len(first) > 3:
        # ISO/IEC 13818-1: codes from B9 on are those of systems, below of video alone.
        return "mpeg" if first[3] >= 0xB9 else "mpegvideo"
    if first[:1] == first[_TS_PACKET : _TS_PACKET + 1] == b"G":
        return "mpegts"
    return None


def shown_frames(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """Return the number of shown frames that the header declares, 0 if it declares none.

    AVI also counts frames that a recorder dropped, stored as empty chunks. A complete index, which
    comes last in the file, has one entry for each true frame.

    MP4 and MOV also count frames that an edit list hides, as after a trim without encoding. They
    are absent from the index, or marked there.
    """
    entries = stream.index_entries
    if len(entries) == 0:
        return int(stream.frames)
    if container.format.name == "avi":
        is_whole = entries[len(entries) - 1].timestamp == stream.frames - 1
        return len(entries) if is_whole else int(stream.frames)
    if container.format.name.startswith("mov") and stream.frames:
        return listed_frames(stream)
    return int(stream.frames)


def listed_frames(stream: av.VideoStream) -> int:
    """Number of frames in the part of the index that was read, without hidden ones."""
    return sum(not entry.is_discard for entry in stream.index_entries)


def declared_seconds(
    container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[float, bool]:
    """Return the end of the last frame, in seconds, that Matroska and WebM declare, else 0.

    The second value tells whether it is declared for this stream alone: sound may last longer.
    """
    if not container.format.name.startswith("matroska"):
        return 0.0, True
    try:
        hours, minutes, seconds = map(float, stream.metadata.get("DURATION", "").split(":"))
        return 3600 * hours + 60 * minutes + seconds, True
    except ValueError:
        return (container.duration or 0) / av.time_base, len(container.streams) == 1


def lacks_end(container: av.container.InputContainer, file: IO[bytes]) -> bool:
    """Whether the end of a GIF is missing, or that of a Matroska file that declares its size."""
    place, size = file.tell(), file.seek(0, os.SEEK_END)
    try:
        if container.format.name == "gif":
            file.seek(max(0, size - 4096))
            # Zeros may follow the trailer.
            return not file.read().rstrip(b"\0").endswith(b";")
        if container.format.name.startswith("matroska"):
            file.seek(0)
            return _matroska_size(file.read(4096)) > size
        return False
    finally:
        file.seek(place)


def _matroska_size(first: bytes) -> int:
    """Size of a file by the size of its segment (RFC 8794, RFC 9559), 0 if it declares none."""

    def number(at: int) -> tuple[int, int]:
        """Return the number coded at ``at``, -1 for "unknown", and the place after it."""
        length = 9 - first[at].bit_length()
        value = int.from_bytes(first[at : at + length]) & ((1 << 7 * length) - 1)
        return -1 if value == (1 << 7 * length) - 1 else value, at + length

    try:
        header, at = number(4)
        segment = at + header
        if first[segment : segment + 4] != b"\x18\x53\x80\x67":
            return 0
        size, at = number(segment + 4)
    except IndexError:
        return 0
    return at + size if size >= 0 else 0
