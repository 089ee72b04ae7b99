"""A writer of ND2 files (version 3), after the layout that the package nd2 documents."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LOOPS = {"T": 1, "P": 2, "Z": 4}


def variant(name: str, value: Any) -> bytes:
    """One entry of a "lite variant": type, length of the name, name, value."""
    head = struct.pack("<B", len(name) + 1) + (name + "\0").encode("utf-16-le")
    if isinstance(value, bool):
        return b"\1" + head + struct.pack("<?", value)
    if isinstance(value, int):
        return b"\3" + head + struct.pack("<I", value)
    if isinstance(value, float):
        return b"\6" + head + struct.pack("<d", value)
    if isinstance(value, str):
        return b"\x08" + head + (value + "\0").encode("utf-16-le")
    if isinstance(value, bytes):
        return b"\x09" + head + struct.pack("<Q", len(value)) + value
    items = list(value.items()) if isinstance(value, Mapping) else [("", item) for item in value]
    content = b"".join(variant(*item) for item in items)
    length = 1 + len(head) + 12 + len(content)
    return b"\x0b" + head + struct.pack("<IQ", len(items), length) + content + bytes(8 * len(items))


def experiment(loops: Sequence[tuple[str, int]], period: float, step: float) -> dict[str, Any]:
    (axis, count), *inner = loops
    pars: dict[str, Any] = {
        "T": {"uiCount": count, "dStart": 0.0, "dPeriod": period, "dDuration": 0.0},
        "P": {"Points": [{"dPosX": 0.0, "dPosName": f"well {n}"} for n in range(count)]},
        "Z": {"uiCount": count, "dZStep": step},
    }[axis]
    made = {"eType": LOOPS[axis], "uLoopPars": pars, "pItemValid": b"\1" * count}
    return made | ({"ppNextLevelEx": [experiment(inner, period, step)]} if inner else {})


def write_nd2(
    path: Path,
    frames: np.ndarray,
    loops: Sequence[tuple[str, int]] = (),
    *,
    names: Sequence[str] = ("",),
    bits: int | None = None,
    compressed: bool = False,
    pixel: float = 0.0,
    step: float = 0.0,
    period: float = 0.0,
    times: Sequence[float] | None = None,
    leave: Sequence[int] = (),
    padding: int = 0,
    colours: bool = False,
) -> Path:
    """Write [N, H, W, C] frames in the order of ``loops``, axes and sizes from the outermost.

    Args:
        names: of the channels.
        pixel, step: µm. ``period``: ms. ``times``: stamps of the frames in ms.
        leave: numbers of frames that are not written.
        padding: bytes at the end of each row.
        colours: the components are colours of one channel.
    """
    count, height, width, parts = frames.shape
    kind = frames.dtype.itemsize
    attributes = {
        "uiWidth": width,
        "uiWidthBytes": width * parts * kind + padding,
        "uiHeight": height,
        "uiComp": parts,
        "uiBpcInMemory": 8 * kind,
        "uiBpcSignificant": bits or 8 * kind,
        "uiSequenceCount": count,
        "eCompression": 0 if compressed else 2,
    }
    plane = {"uiColor": 255, "pFluorescentProbe": {"m_ExcitationSpectrum": {"uiCount": 0}}}
    plane |= {"uiCompCount": parts if colours else 1}
    planes = {f"a{n}": {"sDescription": name, **plane} for n, name in enumerate(names)}
    pictures = {
        "bCalibrated": pixel > 0,
        "dCalibration": pixel,
        "sPicturePlanes": {"uiCount": len(names), "sPlaneNew": planes},
    }
    content = bytearray()
    places: dict[bytes, tuple[int, int]] = {}

    def chunk(name: bytes, data: bytes, length: int = 4072) -> None:
        places[name] = len(content), len(data)
        content.extend(struct.pack("<IIQ", 0x0ABECEDA, length, len(data)))
        content.extend(name.ljust(length, b"\0") + data)

    chunk(b"ND2 FILE SIGNATURE CHUNK NAME01!", b"Ver3.0".ljust(64, b"\0"), 32)
    places.clear()
    chunk(b"ImageAttributesLV!", variant("SLxImageAttributes", attributes))
    chunk(b"ImageMetadataSeqLV|0!", variant("SLxPictureMetadata", pictures))
    if loops:
        made = experiment(loops, period, step)
        chunk(b"ImageMetadataLV!", variant("SLxExperiment", made))
    if times is not None:
        chunk(b"CustomData|AcqTimesCache!", np.asarray(times, "<f8").tobytes())
    for number, frame in enumerate(frames):
        if number not in leave:
            rows = np.ascontiguousarray(frame).reshape(height, -1).view(np.uint8)
            data = np.pad(rows, ((0, 0), (0, padding))).tobytes()
            data = zlib.compress(data) if compressed else data
            chunk(b"ImageDataSeq|%d!" % number, bytes(8) + data)
    at = len(content)
    listed = b"".join(name + struct.pack("<QQ", *place) for name, place in places.items())
    end = b"ND2 CHUNK MAP SIGNATURE 0000001!" + struct.pack("<Q", at)
    chunk(b"ND2 FILEMAP SIGNATURE NAME 0001!", listed + end, 32)
    path.write_bytes(content)
    return path
