"""Video files -> frames, by PyAV."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter

from dist_train.data.orientation import IDENTITY, Orientation
from dist_train.data.raw.container import (
    declared_seconds,
    lacks_end,
    listed_frames,
    open_container,
    shown_frames,
    video_stream,
)
from dist_train.data.raw.damage import too_large
from dist_train.data.raw.edit_list import check_edits
from dist_train.data.raw.frame import Frame, read_frame
from dist_train.data.raw.frame_times import interval_of
from dist_train.data.raw.stored_picture import Pixels, stored_picture
from dist_train.errors import DecodeError
from dist_train.files import open_plain, reason_of
from dist_train.system.advice import ADVICE, blame_machine

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpeg", ".mpg"}

# Errors of the machine that a single file may cause. FFmpeg uses most numbers with other meanings.
OF_A_VIDEO = ADVICE.keys() - {errno.EMFILE, errno.ENFILE, errno.ESTALE}

# FFmpeg's errors are counted, not shown.
av.logging.set_level(av.logging.PANIC)
# These decoders report errors that harm no frame. H.264 marks the frames that it guessed.
_ERRORS_SAY_LITTLE = {"h264", "hevc"}

# ISO/IEC 23001-8, TransferCharacteristics.
_TRANSFERS = {16: "PQ", 18: "HLG"}

# PyAV fails at FFmpeg's newer kinds of side data. Only the display matrix is used here.
Type._missing_ = classmethod(lambda cls, _: cls.PANSCAN)  # type: ignore[method-assign, assignment]


class Video:
    """The frames of a video file. Each iteration decodes the file anew.

    Each coded frame comes once, whatever its time stamp; the parts that an edit list shows come in
    its order. Frames are turned by multiples of 90 degrees and mirrored as the file's display
    matrix says (ISO/IEC 14496-12); other angles are ignored.

    Args:
        path: the place of the bytes.
        where: the file's name in messages; None takes ``path``.
        bits: bits in use in 16-bit values; None refuses such values.
        pixels: what ``Frame.part`` gives.

    Attributes, valid after an iteration:
        frames_decoded: number of decoded frames.
        frames_declared: number in the container's header, without frames that an edit list hides;
            0 if it has none, as in mkv, webm and mpeg.
        frames_damaged: number of frames in which the decoder guessed a part.
        stopped_by: what is missing if the stream broke off, else None.
        is_deep: whether values have more than 8 bits.
        interval: time between frames in seconds; None if it is not known, or varies.
        is_variable: whether the time between frames varies by more than 1 %.
        transfer: "PQ" or "HLG" (ITU-R BT.2100) in HDR video, whose luma stays as it is coded.

    Raises:
        DecodeError: while iterating: the file has no or several videos, or an edit list that is not
            read; no frame decodes, frames differ in size, or memory does not suffice.
        FileError: while iterating: the path is not a plain file.
    """

    def __init__(
        self,
        path: Path,
        where: object | None = None,
        bits: int | None = None,
        pixels: Pixels = "grey",
    ) -> None:
        self.path, self.bits, self.pixels = path, bits, pixels
        self.where = path if where is None else where
        self.frames_declared = self.frames_decoded = self.frames_damaged = 0
        self.stopped_by: str | None = None
        self.is_deep = self.is_variable = False
        self.interval: float | None = None
        self._stamps: list[int | None] = []
        self.transfer: str | None = None

    def again(self) -> Video:
        """The same video, whose attributes stay when this one is iterated."""
        return Video(self.path, self.where, self.bits, self.pixels)

    @property
    def truncated(self) -> bool:
        """Whether the file holds fewer frames than it declares, or broke off."""
        return self.stopped_by is not None or self.frames_decoded < self.frames_declared

    def __iter__(self) -> Iterator[Frame]:
        self.frames_decoded, self.frames_damaged, self.stopped_by = 0, 0, None
        self._stamps = []
        try:
            with open_plain(self.path) as file, open_container(file) as container:
                stream = video_stream(container)
                check_edits(file, container, stream)
                self.frames_declared = shown_frames(container, stream)
                try:
                    yield from self._frames(container, stream)
                    if self.stopped_by is None and lacks_end(container, file):
                        self.stopped_by = "its end is missing"
                except av.error.FFmpegError as error:
                    # A lack of memory is no damage.
                    if isinstance(error, MemoryError) or _memory_is_short(stream):
                        raise MemoryError from None
                    self.stopped_by = reason_of(error)
                unit = float(stream.time_base or 1)
                self.interval, self.is_variable = interval_of(self._stamps, unit)
            if self.frames_decoded == 0:
                because = f" ({self.stopped_by})" if self.stopped_by else ""
                raise DecodeError(f"holds no frame that decodes{because}")
        except DecodeError as error:
            raise DecodeError(error.what, where=self.where, fix=error.fix) from None
        except MemoryError:
            raise too_large(self.where) from None
        except (av.error.FFmpegError, OSError) as error:
            blame_machine(error, self.where, but=OF_A_VIDEO)
            raise DecodeError(f"cannot be opened ({reason_of(error)})", where=self.where) from None

    def _frames(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[Frame]:
        size: tuple[int, int] | None = None
        turn = None
        end = lasts = 0.0
        is_cut = False
        converter = VideoReformatter()
        for packet in container.demux(stream):
            # The file has fewer bytes than the packet's size.
            is_cut |= packet.is_corrupt
            if packet.pts is not None:
                lasts = float(packet.duration * packet.time_base)
                end = max(end, float(packet.pts * packet.time_base) + lasts)
            before = _errors(stream)
            frames = packet.decode()
            # FFV1 reports wrong checksums, but marks no frame.
            is_reported = _errors(stream) > before
            self.frames_damaged += max(is_reported, sum(frame.is_corrupt for frame in frames))
            for frame in frames:
                if size is None:
                    size = frame.width, frame.height
                    turn = _turn(frame)
                    self.is_deep = frame.format.components[0].bits > 8
                    self.transfer = _TRANSFERS.get(frame.color_trc)
                if (frame.width, frame.height) != size:
                    raise DecodeError(
                        f"changes size at frame {self.frames_decoded}, from {size[0]}x{size[1]} to "
                        f"{frame.width}x{frame.height}",
                        fix="Cut it there, or encode it anew at one size.",
                    )
                planes = read_frame(frame, converter, self.bits)
                if self.pixels != "grey":
                    wanted = stored_picture(frame, planes, converter, self.bits, self.pixels)
                    planes = replace(planes, wanted=wanted)
                self._stamps.append(frame.pts)
                yield _upright(planes, turn) if turn else planes
                self.frames_decoded += 1
        self.stopped_by = self._missing(container, stream, end, lasts)
        if self.stopped_by is None and is_cut:
            self.stopped_by = "a packet is cut short"

    def _missing(
        self,
        container: av.container.InputContainer,
        stream: av.VideoStream,
        end: float,
        lasts: float,
    ) -> str | None:
        """Say what is missing by the declared duration or the index, None if nothing is.

        Args:
            end: end of the last frame, in seconds.
            lasts: duration of a frame, in seconds; 0 if it is not known.
        """
        declared, is_own = declared_seconds(container, stream)
        slack = lasts / 2 or 1.5 / float(stream.average_rate or 10)
        if not is_own:
            slack += 1 + declared / 10
        if end + slack < declared:
            return f"it ends after {end:.2f} of {declared:.2f} declared seconds"
        if container.format.name.startswith("mov") and not self.frames_declared:
            # Fragments declare their frames one by one.
            listed = listed_frames(stream)
            if self.frames_decoded < listed:
                return f"its last fragments declare {listed} frames"
        return None


def _errors(stream: av.VideoStream) -> int:
    """Number of errors that the decoder reported, 0 for decoders whose errors say little."""
    return 0 if stream.codec_context.name in _ERRORS_SAY_LITTLE else av.logging.get_last_error()[0]


def _memory_is_short(stream: av.VideoStream) -> bool:
    """Whether no other frame fits into memory, which H.264's decoder reports as invalid data."""
    try:
        # No format has more than 8 bytes a pixel.
        np.empty((stream.height, stream.width, 8), dtype=np.uint8)
    except MemoryError:
        return True
    return False


def _upright(frame: Frame, turn: Orientation) -> Frame:
    """Turn a frame. With an odd size, reversed chroma is off by one luma pixel, as in FFmpeg."""
    y, cb, cr = map(turn.apply, (frame.y, frame.cb, frame.cr))
    wanted = None if frame.wanted is None else turn.apply(frame.wanted)
    for plane in (y, cb, cr, wanted):
        if plane is not None:
            plane.flags.writeable = False
    return Frame(y, cb, cr, frame.full_range, frame.bt709, wanted)


def _turn(frame: av.VideoFrame) -> Orientation | None:
    """Return the orientation in the frame's display matrix, None if the frame is upright.

    The matrix maps the coded column p and row q to the shown column a p + c q + x and row
    b p + d q + y. It is stored as a b u c d v x y w; a, b, c and d in 16.16 fixed point.
    """
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return None
    a, b, _, c, d = np.frombuffer(stored, dtype=np.int32)[:5].tolist()
    if b == c == 0 and a and d:
        turn = Orientation(False, rows_reversed=d < 0, columns_reversed=a < 0)
    elif a == d == 0 and b and c:
        turn = Orientation(True, rows_reversed=b < 0, columns_reversed=c < 0)
    else:
        return None
    return None if turn == IDENTITY else turn
