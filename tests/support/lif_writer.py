"""A writer of LIF files (version 2), after Leica's description of the format."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

AXES = {"X": 1, "Y": 2, "Z": 3, "T": 4, "M": 10}


def tag(name: str, content: str = "", **attributes: object) -> str:
    said = "".join(f" {key}={quoteattr(str(value))}" for key, value in attributes.items())
    return f"<{name}{said}>{content}</{name}>"


def image(
    name: str,
    block: str,
    values: np.ndarray,
    axes: str,
    *,
    steps: Mapping[str, float] | None = None,
    names: Sequence[str] = ("Gray",),
    tags: Sequence[int] = (0,),
    bits: int | None = None,
    stamps: Sequence[int] = (),
) -> str:
    """The description of an image: ``values`` with ``axes``, C for channels; see ``write_lif``.

    Args:
        steps: distance of elements of an axis in m or s.
        tags: 1, 2 and 3 for red, green and blue channels.
        stamps: times in ms.
    """
    # Not the array's own strides: one that is declared need not exist.
    sizes = (*values.shape[1:], values.dtype.itemsize)
    inc = {axis: math.prod(sizes[number:]) for number, axis in enumerate(axes)}
    dimensions = "".join(
        tag(
            "DimensionDescription",
            DimID=AXES[axis],
            NumberOfElements=size,
            Origin=0,
            Length=(steps or {}).get(axis, 0) * (size - 1),
            Unit="s" if axis == "T" else "m",
            BytesInc=inc[axis],
            BitInc=0,
        )
        for axis, size in reversed(list(zip(axes, values.shape, strict=True)))
        if axis != "C"
    )
    channels = "".join(
        tag(
            "ChannelDescription",
            DataType=1 if values.dtype.kind == "f" else 0,
            ChannelTag=tags[number % len(tags)],
            Resolution=bits or 8 * values.dtype.itemsize,
            NameOfMeasuredQuantity="",
            Min=0,
            Max=1,
            Unit="",
            LUTName=channel,
            IsLUTInverted=0,
            BytesInc=number * inc.get("C", 0),
            BitInc=0,
        )
        for number, channel in enumerate(names)
    )
    times = " ".join(f"{116444736000000000 + 10000 * stamp:x}" for stamp in stamps)
    described = tag("Channels", channels) + tag("Dimensions", dimensions)
    told = tag("TimeStampList", times) if stamps else ""
    data = tag("Data", tag("Image", tag("ImageDescription", described) + told))
    memory = tag("Memory", Size=values.nbytes, MemoryBlockID=block)
    return tag("Element", data + memory, Name=name, UniqueID=name)


def write_lif(path: Path, images: Mapping[str, tuple[str, np.ndarray]]) -> Path:
    """Write blocks of pixels by their names, each with its description."""
    children = tag("Children", "".join(described for described, _ in images.values()))
    header = tag("LMSDataContainerHeader", tag("Element", children, Name="project"), Version=2)
    content = struct.pack("<IIBI", 0x70, 2 * len(header) + 5, 0x2A, len(header))
    content += header.encode("utf-16-le")
    for block, (_, values) in images.items():
        size = 14 + 2 * len(block)
        content += struct.pack("<IIBQBI", 0x70, size, 0x2A, values.nbytes, 0x2A, len(block))
        content += block.encode("utf-16-le") + values.tobytes()
    path.write_bytes(content)
    return path
