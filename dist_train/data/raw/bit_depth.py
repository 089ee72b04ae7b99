"""How many bits the 16-bit values of a whole set of files have: one number for the store.

A camera of 12 bits writes its values into 16. Which bits are in use is told by the metadata, or by
the largest value of all files; never by that of one file alone, or equal values of two files would
get different grey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dist_train.data.raw.container import open_container, video_stream
from dist_train.data.raw.frame import deep_channels, is_deep_format
from dist_train.data.raw.grey import depth_of
from dist_train.data.raw.outside_reader import OutsideReader
from dist_train.data.raw.source import LocalFolder, Source
from dist_train.data.raw.volume_file import VOLUME_SUFFIXES, is_deep, read_raw, values_of
from dist_train.data.types import Volume
from dist_train.errors import DecodeError, DistTrainError, StoreError
from dist_train.files import open_plain
from dist_train.system.supervised_pool import Steps

# In other videos no camera's raw values are found, and to open half a million of them takes hours.
SUFFIXES = VOLUME_SUFFIXES | {".avi", ".mkv", ".mov"}
# Files that a process looks at before it tells what it found.
FILES = 64


@dataclass(frozen=True)
class Look:
    """Files to look at; ``condemned``: those whose decoding took its process along."""

    source: Source
    names: Sequence[str]
    condemned: Mapping[int, str] = field(default_factory=dict)
    reader: OutsideReader | None = None

    def without(self, position: int, reason: str) -> Look:
        return replace(self, condemned={**self.condemned, position: reason})


Run = Callable[[Callable[[Look, Steps], int | None], Iterable[Look], Callable[..., Look]], Any]


def depth_of_files(
    source: Source, names: Sequence[str], run: Run, reader: OutsideReader | None = None
) -> int | None:
    """Bits of the values of 16-bit files: the most that any of them tells or needs; None if there
    is no such file. Files that cannot be read do not count: they are rejected later.

    Args:
        run: (function, items, without) -> results in any order, as ``supervise.supervised``.

    Raises:
        StoreError: there are such files, and others are not here, so that it cannot be known.
    """
    named = [
        name
        for name in names
        if PurePosixPath(name).suffix.lower() in SUFFIXES or (reader and reader.reads(name))
    ]
    names = [name for name in named if _may_be_deep(source, name)]
    if not names:
        return None
    parts = [names[first : first + FILES] for first in range(0, len(names), FILES)]
    looks = (Look(source.narrowed(part), part, reader=reader) for part in parts)
    found: list[int] = [bits for bits in run(look, looks, Look.without) if bits is not None]
    if not found:
        return None
    if missing := source.missing(named):
        raise StoreError(
            f"the files have values of 16 bits, and {len(missing)} of them are not here, so that "
            "the depth of the whole set cannot be known",
            where=source.where(missing[0]),
            fix="Say the depth with --bits.",
        )
    return max(found)


def depth_of_arrays(volumes: Sequence[Volume]) -> int | None:
    """The same for arrays at hand."""
    deep = [int(volume.max(initial=0)) for volume in volumes if volume.dtype.itemsize == 2]
    return depth_of(max(deep)) if deep else None


def look(part: Look, steps: Steps) -> int | None:
    """The most bits that values of these files have; None if none has 16-bit values."""
    return max(_bits(part, steps), default=None)


def _bits(part: Look, steps: Steps) -> Iterator[int]:
    for position, name in enumerate(part.names):
        if position in part.condemned:
            continue
        try:
            with part.source.fetched(name) as path, steps.at(position):
                if part.reader is not None and part.reader.reads(name):
                    bits = depth_of_arrays([part.reader.read(path)])
                else:
                    bits = file_bits(path, PurePosixPath(name).suffix.lower())
        except DecodeError:
            continue
        # That of the network or the machine, not of the file.
        except DistTrainError:
            raise
        # Whatever is wrong with the file is told when it is decoded to be stored.
        except Exception:
            continue
        if bits is not None:
            yield bits


def file_bits(path: Path, suffix: str) -> int | None:
    """Bits that 16-bit values of a file have by its metadata, else by its largest value.

    None if it has none of 16 bits. Raises what the decoders raise.
    """
    if suffix not in VOLUME_SUFFIXES:
        return _video_bits(path)
    dtype, bits = values_of(path, suffix)
    if not is_deep(dtype):
        return None
    return bits or depth_of(int(read_raw(path, path, suffix).max(initial=0)))


def _video_bits(path: Path) -> int | None:
    with open_plain(path) as file, open_container(file, path) as container:
        stream = video_stream(container, path)
        if not is_deep_format(stream.codec_context.pix_fmt or ""):
            return None
        largest = (
            int(np.max(channel))
            for frame in container.decode(stream)
            if is_deep_format(frame.format.name)
            for channel in deep_channels(frame)
        )
        return depth_of(max(largest, default=0))


def _may_be_deep(source: Source, name: str) -> bool:
    """False for files of this machine that are not there, or are npy files of other values: seen
    here, no process need be started."""
    if not isinstance(source, LocalFolder):
        return True
    path = source.folder / name
    if not path.is_file():
        return False
    if path.suffix.lower() != ".npy":
        return True
    try:
        return is_deep(values_of(path, ".npy")[0])
    # On damaged bytes NumPy raises whatever its parser does.
    except Exception:
        return False
