"""Number of bits in use in the 16-bit values of all files: one number for the store.

A camera of 12 bits writes its values into 16. The bits in use are known from metadata, or from the
largest value of all files. If each file had its own number, equal values of two files would get
different grey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from av.video.reformatter import VideoReformatter

from dist_train.data.raw.container import open_container, video_stream
from dist_train.data.raw.formats import format_of, suffixes
from dist_train.data.raw.frame import has_any_depth, unpacked
from dist_train.data.raw.grey import depth_of
from dist_train.data.raw.outside_reader import OutsideReader
from dist_train.data.raw.source import LocalFolder, Source
from dist_train.data.raw.stack import Choices
from dist_train.data.raw.volume_file import VOLUME_SUFFIXES, is_deep, read_raw, values_of
from dist_train.data.types import Volume
from dist_train.errors import DecodeError, DistTrainError, StoreError
from dist_train.files import open_plain
from dist_train.system.supervised_pool import Steps

# Other containers hold no raw values of cameras, and opening half a million of them takes hours.
SUFFIXES = (*VOLUME_SUFFIXES, ".avi", ".mkv", ".mov", *suffixes())
# Number of files that a process examines before it reports.
FILES = 64


@dataclass(frozen=True)
class Look:
    """Files to examine. ``condemned``: those that crashed their process, by position, and how."""

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
    """Return the most bits that a file of 16-bit values declares or needs, None without such files.

    Files that cannot be read are passed over; they are rejected later.

    Args:
        run: (function, items, without) -> results in any order, see ``supervised``.

    Raises:
        StoreError: there are such files, and others are missing, so the number is not known.
    """
    named = [
        name for name in names if name.lower().endswith(SUFFIXES) or (reader and reader.reads(name))
    ]
    names = [name for name in named if _may_be_deep(source, name, reader)]
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
    """Return the bits that the uint16 arrays need, None without such arrays."""
    deep = [int(volume.max(initial=0)) for volume in volumes if is_deep(volume.dtype)]
    return depth_of(max(deep)) if deep else None


def look(part: Look, steps: Steps) -> int | None:
    """Return the most bits of these files' values, None if none has 16-bit values."""
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
                    bits = file_bits(path, name)
        except DecodeError:
            continue
        # The network or the machine is at fault.
        except DistTrainError:
            raise
        # The file is at fault, which is reported when it is decoded for the store.
        except Exception:
            continue
        if bits is not None:
            yield bits


def file_bits(path: Path, name: str) -> int | None:
    """Return the bits in use by a file's metadata, else by its largest value.

    None if its values do not have 16 bits. Raises what the decoders raise.
    """
    form = format_of(name, path)
    if form is not None:
        stack = form.read(path, name, Choices())
        if not is_deep(stack.dtype):
            return None
        return stack.bits or depth_of(max(int(frame.max(initial=0)) for frame in stack.frames))
    if PurePosixPath(name).suffix.lower() not in VOLUME_SUFFIXES:
        return _video_bits(path)
    if not is_deep(values_of(path)):
        return None
    return depth_of(int(read_raw(path, path).max(initial=0)))


def _video_bits(path: Path) -> int | None:
    with open_plain(path) as file, open_container(file) as container:
        stream = video_stream(container)
        if not has_any_depth(stream.codec_context.pix_fmt or ""):
            return None
        converter = VideoReformatter()
        largest = (
            int(unpacked(frame, converter).max())
            for frame in container.decode(stream)
            if has_any_depth(frame.format.name)
        )
        return depth_of(max(largest, default=0))


def _may_be_deep(source: Source, name: str, reader: OutsideReader | None) -> bool:
    """Whether a file may have 16-bit values: False for missing local files, and for npy files of
    other types, which need no process to examine them."""
    if not isinstance(source, LocalFolder):
        return True
    path = source.path(name)
    if path is None or not path.is_file():
        return False
    if path.suffix.lower() != ".npy" or (reader and reader.reads(name)):
        return True
    try:
        return is_deep(values_of(path))
    # NumPy's parser raises anything on damaged bytes.
    except Exception:
        return False
