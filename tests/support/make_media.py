"""Small real files for the tests of the data package: videos encoded by PyAV, and their truth."""

from __future__ import annotations

import csv
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
from av.video.reformatter import Colorspace, VideoReformatter

from dist_train.data.raw.clip import PrepareSettings, read_clip
from dist_train.data.raw.outline import Box
from dist_train.data.raw.stack import Choices
from dist_train.data.store.build import prepare
from dist_train.data.store.reader import Store
from dist_train.data.table.labels import Naming
from dist_train.data.table.manifest import Manifest, read_manifest

ORANGE = (224, 107, 34)
MPEG_RANGE, FULL_RANGE = 1, 2


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    full_range: bool = False,
    container: str | None = None,
    container_options: Mapping[str, str] | None = None,
    rate: int = 20,
    bt709: bool = False,
    times: Sequence[int] | None = None,
) -> Path:
    """Encode uint8 RGB [D, H, W, 3] frames, shown at ``times`` / ``rate`` seconds if given."""
    with av.open(str(path), "w", format=container, options=dict(container_options or {})) as output:
        stream = output.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        colour_range = FULL_RANGE if full_range else MPEG_RANGE
        if not codec.startswith("gif"):
            stream.codec_context.color_range = colour_range
        matrix = Colorspace.ITU709 if bt709 else Colorspace.ITU601
        if bt709:
            stream.codec_context.colorspace = Colorspace.ITU709
        converter = VideoReformatter()
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            # With several threads FFmpeg now and then damages a row of an odd-sized picture.
            frame = converter.reformat(
                frame,
                format=pix_fmt,
                dst_colorspace=matrix,
                dst_color_range=colour_range,
                threads=1,
            )
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def with_display_matrix(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """Let an mp4's track header say that column p, row q is shown at a p + c q, b p + d q."""
    content = bytearray(path.read_bytes())
    assert content.count(b"tkhd") == 1
    # ISO/IEC 14496-12, 8.3.2, version 0: 36 bytes after version and flags come nine of the matrix.
    matrix = content.index(b"tkhd") + 4 + 4 + 36
    assert struct.unpack_from(">5i", content, matrix) == (1 << 16, 0, 0, 0, 1 << 16)
    fixed = [round(value * (1 << 16)) for value in (a, b, 0, c, d)]
    struct.pack_into(">5i", content, matrix, *fixed)
    path.write_bytes(content)
    return path


def with_edits(
    source: Path, path: Path, edits: Sequence[tuple[float, float | None, float]]
) -> Path:
    """Copy an mp4 of ``write_video``, with another edit list.

    Args:
        edits: for each, how long it is shown, from which second of the media (None for a pause),
            and at which speed.
    """
    content = bytearray(source.read_bytes())
    # ISO/IEC 14496-12, version 0 of all.
    movie, media = (
        struct.unpack_from(">I", content, content.index(kind) + 16)[0]
        for kind in (b"mvhd", b"mdhd")
    )
    entries = b"".join(
        struct.pack(
            ">Iii",
            round(lasts * movie),
            -1 if start is None else round(start * media),
            round(rate * (1 << 16)),
        )
        for lasts, start, rate in edits
    )
    new = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    at = content.index(b"elst") - 4
    (old,) = struct.unpack_from(">I", content, at)
    content[at : at + old] = new
    # The header comes last, so that no place of a frame changes.
    assert content.index(b"moov") > content.index(b"mdat")
    for kind in (b"edts", b"trak", b"moov"):
        place = content.index(kind) - 4
        (size,) = struct.unpack_from(">I", content, place)
        struct.pack_into(">I", content, place, size + len(new) - old)
    path.write_bytes(content)
    return path


def grey_frames(depth: int = 8, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth ramp that brightens from frame to frame: uint8 RGB [D, H, W, 3]."""
    start = np.random.default_rng(seed).integers(0, 40)
    ramp = np.linspace(start, 180, width)[None, None, :] + 6 * np.arange(depth)[:, None, None]
    grey = np.broadcast_to(np.clip(ramp, 0, 255), (depth, height, width)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def outlined_frames(
    boxes: Sequence[Box | None], *, height: int = 96, width: int = 128, seed: int = 0
) -> np.ndarray:
    """Dark noise with an orange ellipse, 3 px wide, that just fills each frame's box."""
    rng = np.random.default_rng(seed)
    frames = rng.normal(45, 18, (len(boxes), height, width, 1)).clip(0, 255).astype(np.uint8)
    frames = np.repeat(frames, 3, axis=-1)
    for frame, box in zip(frames, boxes, strict=True):
        if box is not None:
            frame[_ellipse(box, height, width)] = ORANGE
    return frames


def _ellipse(box: Box, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] + 0.5
    middle = (box.top + box.bottom) / 2, (box.left + box.right) / 2
    half = (box.bottom - box.top) / 2, (box.right - box.left) / 2
    outer, inner = (
        ((y - middle[0]) / (half[0] - w)) ** 2 + ((x - middle[1]) / (half[1] - w)) ** 2
        for w in (0, 3)
    )
    return (outer <= 1) & (inner >= 1)


def drifting(start: Box, depth: int, *, step: tuple[int, int] = (0, 1)) -> list[Box]:
    """``start`` moved on by ``step`` (rows, columns) from frame to frame."""
    return [
        Box(
            start.top + i * step[0],
            start.left + i * step[1],
            start.bottom + i * step[0],
            start.right + i * step[1],
        )
        for i in range(depth)
    ]


def union_of(boxes: Sequence[Box | None]) -> Box:
    found = [box for box in boxes if box is not None]
    union = found[0]
    for box in found[1:]:
        union = union.union(box)
    return union


def write_manifest(
    path: Path, names: Sequence[str], labels: Sequence[int] | None = None
) -> Manifest:
    """A ``filename,label`` table; labels are 0 and 1 in turn unless given."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("filename", "label"))
        writer.writerows(zip(names, labels or [i % 2 for i in range(len(names))], strict=True))
    return read_manifest(path, allow_local=True)


def write_volumes(folder: Path, count: int, *, seed: int = 0) -> list[str]:
    """``count`` npy volumes of differing shape; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"clip{i:03d}.npy" for i in range(count)]
    for name, volume in zip(names, volumes(count, seed=seed), strict=True):
        np.save(folder / name, volume)
    return names


def store_of(
    folder: Path,
    clips: Sequence[np.ndarray],
    shard_clips: int = 1000,
    positive: Sequence[str] = (),
    **columns: Sequence[object],
) -> Store:
    """A store of clips, uint8 [D, H, W], named clip000.npy and so on.

    ``columns`` are those of the clip table; labels are 0 and 1 in turn unless given. ``positive``
    are names of labels.
    """
    (folder / "raw").mkdir(parents=True)
    names = [f"clip{i:03d}.npy" for i in range(len(clips))]
    for name, clip in zip(names, clips, strict=True):
        np.save(folder / "raw" / name, clip)
    table = {"filename": names, "label": [i % 2 for i in range(len(names))], **columns}
    pd.DataFrame(table).to_csv(folder / "clips.csv", index=False)
    settings = PrepareSettings(roi="none", shard_clips=shard_clips)
    manifest = read_manifest(folder / "clips.csv", naming=Naming(positive))
    prepare(manifest, folder / "raw", folder / "store", settings, workers=1)
    return Store(folder / "store")


def volumes(count: int, *, seed: int = 0) -> list[np.ndarray]:
    """Noise of differing shape, uint8 [D, H, W]."""
    rngs = [np.random.default_rng((seed, i)) for i in range(count)]
    return [
        rng.integers(0, 256, (4 + i % 5, 10 + i % 3, 12), dtype=np.uint8)
        for i, rng in enumerate(rngs)
    ]


def read_volume(
    path: Path,
    where: object | None = None,
    suffix: str | None = None,
    bits: int | None = None,
    **choices: Any,
) -> np.ndarray:
    """Read a volume file as ``prepare`` does: uint8 [D, H, W]."""
    settings = PrepareSettings(roi="none", bits=bits, choices=Choices(**choices))
    name = path.name if suffix is None else f"a{suffix}"
    return read_clip(path, name, str(path if where is None else where), settings)[0]
