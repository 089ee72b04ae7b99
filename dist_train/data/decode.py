"""File bytes -> frames: videos by PyAV, TIFF stacks by tifffile, npy and npz without pickle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
import tifffile

from dist_train.errors import DecodeError

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpeg", ".mpg"}
VOLUME_SUFFIXES = {".npy", ".npz", ".tif", ".tiff"}

Volume = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]
Plane = np.ndarray[tuple[int, int], np.dtype[np.uint8]]

# A file can be a playlist in disguise: FFmpeg must not follow it to the network.
_ONLY_FILES = {"protocol_whitelist": "file"}

# ITU-R BT.601 and BT.709 limited range puts black at 16 and white at 235.
FULL_RANGE = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Frame:
    """One video frame in the decoder's own planes, which are not copied and cannot be written to.

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

    After an iteration ``frames_decoded`` is the number of frames that truly decoded,
    ``frames_declared`` what the container's header says (0 where it says nothing, as in mkv, webm
    and mpeg), and ``stopped_by`` the decoder's error if the stream broke off.

    Raises:
        DecodeError: while iterating: not a video, no frame decodes, or frames differ in size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
                    raise DecodeError("holds no video stream", where=self.path)
                stream = container.streams.video[0]
                # Parallelism is over files, in processes.
                stream.codec_context.thread_count = 1
                self.frames_declared = stream.frames
                try:
                    size: tuple[int, int] | None = None
                    for frame in container.decode(stream):
                        size = size or (frame.width, frame.height)
                        self._check_size(size, frame)
                        yield _planes(frame)
                        self.frames_decoded += 1
                except av.error.FFmpegError as error:
                    self.stopped_by = _reason(error)
        except (av.error.FFmpegError, OSError) as error:
            raise DecodeError(f"cannot be opened ({_reason(error)})", where=self.path) from None
        if self.frames_decoded == 0:
            because = f" ({self.stopped_by})" if self.stopped_by else ""
            raise DecodeError(f"holds no frame that decodes{because}", where=self.path)

    def _check_size(self, size: tuple[int, int], frame: av.VideoFrame) -> None:
        if (frame.width, frame.height) != size:
            raise DecodeError(
                f"changes size at frame {self.frames_decoded}, from {size[0]}x{size[1]} to "
                f"{frame.width}x{frame.height}",
                where=self.path,
                fix="Cut it there, or encode it anew at one size.",
            )


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _planes(frame: av.VideoFrame) -> Frame:
    full = frame.format.name.startswith("yuvj") or frame.color_range == 2
    if frame.format.name not in ("yuv420p", "yuvj420p"):
        # Grey and RGB become BT.601; a YUV format keeps its matrix.
        frame = frame.reformat(
            format="yuv420p",
            src_color_range=frame.color_range or None,
            dst_color_range=av.video.reformatter.ColorRange.MPEG,
        )
        full = False
    y, cb, cr = (_plane(plane) for plane in frame.planes[:3])
    return Frame(y, cb, cr, full_range=full, bt709=frame.colorspace == 1)


def _plane(plane: av.video.plane.VideoPlane) -> Plane:
    # The array holds the plane, which holds the decoder's buffer.
    rows = np.frombuffer(plane, dtype=np.uint8).reshape(plane.height, plane.line_size)
    rows.flags.writeable = False
    return rows[:, : plane.width]


def read_volume(path: Path) -> Volume:
    """A volume file as uint8 [D, H, W].

    ``.npy`` and ``.npz`` (with a single array) and multi-page ``.tif``. uint8 is kept; uint16 is
    divided by 257 (65535 becomes 255), rounding down; bool becomes 0 and 255. RGB(A), a last axis
    of 3 or 4, becomes BT.601 luma, and a last axis of 1 after three others is dropped. A single
    picture, [H, W] or [H, W, 3], is a volume of depth 1.

    Raises:
        DecodeError: naming the file and what is wrong with it.
    """
    load = _load_tiff if path.suffix.lower() in (".tif", ".tiff") else _load_numpy
    try:
        array = load(path)
    # On damaged bytes the parsers raise whatever they stumble over: struct, zlib, zipfile, index
    # and type errors have all been seen.
    except Exception as error:
        raise DecodeError(f"cannot be read ({_reason(error)})", where=path) from None
    return to_uint8_volume(array, path)


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


def _load_tiff(path: Path) -> np.ndarray:
    return np.asarray(tifffile.imread(path))


def _load_numpy(path: Path) -> np.ndarray:
    # Opened here, since NumPy leaves a file that it cannot read open.
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        if len(loaded.files) != 1:
            raise ValueError(f"holds {len(loaded.files)} arrays, one is needed")
        return np.asarray(loaded[loaded.files[0]])
