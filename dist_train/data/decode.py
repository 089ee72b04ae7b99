"""File bytes -> frames: videos by PyAV, TIFF stacks by tifffile, npy and npz without pickle."""

from __future__ import annotations

import errno
import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO

import av
import cv2
import numpy as np
import tifffile
from av.video.reformatter import ColorRange, VideoReformatter

from dist_train.data.orientation import AS_IT_IS, Orientation
from dist_train.data.types import Plane, Volume
from dist_train.errors import DecodeError
from dist_train.os_advice import ADVICE, blame_machine

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpeg", ".mpg"}
VOLUME_SUFFIXES = {".npy", ".npz", ".tif", ".tiff"}

# Of errors that tell of the machine, those that a single file may be the cause of. FFmpeg uses most
# numbers for purposes of its own.
OF_A_VIDEO = ADVICE.keys() - {errno.EMFILE, errno.ENFILE, errno.ESTALE}
OF_A_VOLUME = {errno.EACCES, errno.EPERM, errno.ENOMEM}

# A file can be a playlist in disguise: FFmpeg must not follow it to the network.
_ONLY_FILES = {"protocol_whitelist": "file"}

# ITU-R BT.601 and BT.709 limited range puts black at 16 and white at 235.
FULL_RANGE = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Frame:
    """One upright video frame, in planes that cannot be written to.

    They are the decoder's own, not copied, unless the picture had to be turned.

    ``y``: uint8 [H, W], luma as it is coded: 0 black and 255 white if ``full_range``, else 16 and
    235. ``cb``, ``cr``: uint8 [ceil(H/2), ceil(W/2)], 128 is grey. ``bt709``: the colour matrix is
    BT.709 rather than BT.601.
    """

    y: Plane
    cb: Plane
    cr: Plane
    full_range: bool
    bt709: bool

    @property
    def luma(self) -> Plane:
        """The whole frame's grey: uint8 [H, W], a copy, 0 black and 255 white."""
        return self.grey(slice(None), slice(None))

    def grey(self, rows: slice, columns: slice) -> Plane:
        """A part of ``luma``, at the cost of that part."""
        part = self.y[rows, columns]
        return part.copy() if self.full_range else np.asarray(cv2.LUT(part, FULL_RANGE))


class Video:
    """The frames of a video file. It can be iterated again; each time the file is decoded anew.

    Every coded frame comes once, whatever its time stamp says. Where the file says that a player
    must turn the picture by a multiple of 90 degrees, or mirror it (its display matrix, ISO/IEC
    14496-12), this is done; other angles are ignored.

    Args:
        path: where the bytes are.
        where: how messages name the file; None takes ``path``.

    After an iteration ``frames_decoded`` is the number of frames that truly decoded,
    ``frames_declared`` what the container's header says (0 where it says nothing, as in mkv, webm
    and mpeg), and ``stopped_by`` the decoder's error if the stream broke off.

    Raises:
        DecodeError: while iterating: not a video, no frame decodes, frames differ in size, or
            memory does not suffice.
    """

    def __init__(self, path: Path, where: object | None = None) -> None:
        self.path = path
        self.where = path if where is None else where
        self.frames_declared = 0
        self.frames_decoded = 0
        self.stopped_by: str | None = None

    @property
    def truncated(self) -> bool:
        """Whether the file holds fewer frames than it declares, or broke off."""
        return self.stopped_by is not None or self.frames_decoded < self.frames_declared

    def __iter__(self) -> Iterator[Frame]:
        self.frames_decoded, self.stopped_by = 0, None
        try:
            with av.open(
                str(self.path), options=_ONLY_FILES, metadata_errors="ignore"
            ) as container:
                if not container.streams.video:
                    raise DecodeError("holds no video stream", where=self.where)
                stream = container.streams.video[0]
                # Parallelism is over files, in processes.
                stream.codec_context.thread_count = 1
                self.frames_declared = _declared(container, stream)
                try:
                    size: tuple[int, int] | None = None
                    turn = None
                    converter = VideoReformatter()
                    for frame in container.decode(stream):
                        if size is None:
                            size = frame.width, frame.height
                            turn = _turn(frame)
                        self._check_size(size, frame)
                        planes = _planes(frame, converter)
                        yield _upright(planes, turn) if turn else planes
                        self.frames_decoded += 1
                except av.error.FFmpegError as error:
                    # Else a file would count as damaged for what the machine lacks.
                    if isinstance(error, MemoryError) or _memory_is_short(stream):
                        raise MemoryError from None
                    self.stopped_by = _reason(error)
        except MemoryError:
            raise _too_large(self.where) from None
        except (av.error.FFmpegError, OSError) as error:
            blame_machine(error, self.where, but=OF_A_VIDEO)
            raise DecodeError(f"cannot be opened ({_reason(error)})", where=self.where) from None
        if self.frames_decoded == 0:
            because = f" ({self.stopped_by})" if self.stopped_by else ""
            raise DecodeError(f"holds no frame that decodes{because}", where=self.where)

    def _check_size(self, size: tuple[int, int], frame: av.VideoFrame) -> None:
        if (frame.width, frame.height) != size:
            raise DecodeError(
                f"changes size at frame {self.frames_decoded}, from {size[0]}x{size[1]} to "
                f"{frame.width}x{frame.height}",
                where=self.where,
                fix="Cut it there, or encode it anew at one size.",
            )


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _declared(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """Number of coded frames that the header declares, 0 if it does not.

    AVI counts frames that a recorder dropped, too: they are there as empty chunks. Where the index,
    which comes last in the file, is whole, the number of its entries is that of true frames.
    """
    entries = stream.index_entries
    if container.format.name == "avi" and len(entries) > 0:
        is_whole = entries[len(entries) - 1].timestamp == stream.frames - 1
        if is_whole:
            return len(entries)
    return int(stream.frames)


def _memory_is_short(stream: av.VideoStream) -> bool:
    """Whether no more frames fit into memory: the H.264 decoder calls that invalid data."""
    try:
        # No format has more than 8 bytes a pixel.
        np.empty((stream.height, stream.width, 8), dtype=np.uint8)
    except MemoryError:
        return True
    return False


def _too_large(where: object) -> DecodeError:
    return DecodeError(
        "takes more memory to decode than it may",
        where=where,
        fix="Cut it into shorter clips, or prepare anew with a larger --clip-memory.",
    )


def _upright(frame: Frame, turn: Orientation) -> Frame:
    """With an odd size, reversed chroma is off by one luma pixel, as it is in FFmpeg's filters: a
    plane of half the size has no place for half a chroma pixel."""
    y, cb, cr = map(turn.laid, (frame.y, frame.cb, frame.cr))
    for plane in (y, cb, cr):
        plane.flags.writeable = False
    return Frame(y, cb, cr, frame.full_range, frame.bt709)


def _turn(frame: av.VideoFrame) -> Orientation | None:
    """What the frame's display matrix asks for, None if nothing.

    The matrix takes a coded column p and row q to the shown column a p + c q + x and row
    b p + d q + y. It is stored as a b u c d v x y w, in 16.16 fixed point where it matters here.
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
    return None if turn == AS_IT_IS else turn


def _planes(frame: av.VideoFrame, converter: VideoReformatter) -> Frame:
    full = frame.format.name.startswith("yuvj") or frame.color_range == 2
    if frame.format.name not in ("yuv420p", "yuvj420p"):
        # Grey and RGB become BT.601; a YUV format keeps its matrix.
        frame = converter.reformat(
            frame,
            format="yuv420p",
            src_color_range=frame.color_range or None,
            dst_color_range=ColorRange.MPEG,
            # By default it starts a thread for each of the machine's cores, frame by frame.
            threads=1,
        )
        full = False
    y, cb, cr = (_plane(plane) for plane in frame.planes[:3])
    return Frame(y, cb, cr, full_range=full, bt709=frame.colorspace == 1)


def _plane(plane: av.video.plane.VideoPlane) -> Plane:
    # The array holds the plane, which holds the decoder's buffer.
    rows = np.frombuffer(plane, dtype=np.uint8).reshape(plane.height, plane.line_size)
    rows.flags.writeable = False
    return rows[:, : plane.width]


def read_volume(path: Path, where: object | None = None, suffix: str | None = None) -> Volume:
    """A volume file as uint8 [D, H, W].

    ``.npy`` and ``.npz`` (with a single array) and multi-page ``.tif``. uint8 is kept; uint16 is
    divided by 257 (65535 becomes 255), rounding down; bool becomes 0 and 255. RGB(A), a last axis
    of 3 or 4, becomes BT.601 luma, and a last axis of 1 after three others is dropped. A single
    picture, [H, W] or [H, W, 3], is a volume of depth 1.

    Args:
        path: where the bytes are.
        where: how messages name the file; None takes ``path``. It ends in the file's name.
        suffix: the ending that tells the kind of file; None takes that of ``path``.

    Raises:
        DecodeError: naming the file and what is wrong with it.
    """
    where = path if where is None else where
    suffix = path.suffix if suffix is None else suffix
    try:
        with path.open("rb") as file:
            if suffix.lower() in (".tif", ".tiff"):
                array = _load_tiff(file, PurePath(str(where)).name)
            else:
                array = _load_numpy(file)
        return to_uint8_volume(array, where)
    except DecodeError:
        raise
    except MemoryError:
        raise _too_large(where) from None
    except OSError as error:
        blame_machine(error, where, but=OF_A_VOLUME)
        raise DecodeError(f"cannot be read ({_reason(error)})", where=where) from None
    # On damaged bytes the parsers raise whatever they stumble over: struct, zlib, zipfile, index
    # and type errors have all been seen.
    except Exception as error:
        raise DecodeError(f"cannot be read ({_reason(error)})", where=where) from None


def to_uint8_volume(array: np.ndarray, where: object) -> Volume:
    """Bring an array to uint8 [D, H, W] by the rules of ``read_volume``.

    Raises:
        DecodeError: another dtype or shape.
    """
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4)):
        array = array[None]
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype.newbyteorder("=") == np.uint16:
        array = (array // 257).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype != np.uint8:
        raise DecodeError(
            f"holds {array.dtype} values", where=where, fix="Use uint8, uint16 or bool."
        )
    if array.ndim == 4 and array.shape[-1] in (3, 4):
        weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
        array = np.rint(array[..., :3] @ weights).astype(np.uint8)
    if array.ndim != 3 or 0 in array.shape:
        raise DecodeError(f"has shape {list(array.shape)}, not [depth, height, width]", where=where)
    return np.ascontiguousarray(array)


def _load_tiff(file: IO[bytes], name: str) -> np.ndarray:
    # OME-TIFF says by name which file a page is in: this one is known by its own, and no other is
    # opened, wherever the name may point.
    return np.asarray(tifffile.imread(file, name=name, _multifile=False))


def _load_numpy(file: IO[bytes]) -> np.ndarray:
    is_zip = file.read(2) == b"PK"
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not is_zip:
        return read_npy(file, size)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) != 1:
            raise ValueError(f"holds {len(members)} arrays, one is needed")
        with archive.open(members[0]) as member:
            return read_npy(member, members[0].file_size)


def read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """An array in NumPy's format (NEP 1), refused before memory is taken for more than is there.

    Args:
        file: at its start, and able to go back there.
        size: bytes that ``file`` holds.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        # Only structured arrays with field names beyond Latin-1 need a later one.
        raise ValueError(f"version {version[0]}.{version[1]} of the npy format")
    declared, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if declared > held:
        raise ValueError(f"declares {declared} bytes of values, holds {held}")
    file.seek(0)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
