"""The clip table of a store: columns in one mapped file, in the order of the keys' bytes.

Numbers are arrays. ``group`` and ``split`` are codes into a sorted list of names. Other text is
UTF-8 bytes and the end of each value. Entries of a record's ``metadata`` are text columns, too.
The columns of ``SAMPLING`` are there if any clip says them.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice, pairwise
from pathlib import Path
from types import NoneType
from typing import IO, Any

import numpy as np
import pandas as pd

from dist_train.array_file import Array, ArrayFile, Pieces, Spool, write_arrays
from dist_train.data.store.shards import REPAIR, Form, form_of, form_text
from dist_train.data.types import METADATA, MOST_CLASSES, Record
from dist_train.errors import FileError, StoreError
from dist_train.files import written_whole

TABLE = "clips.safetensors"
#: Column -> its type in the file, the least and the most value.
NUMBERS: dict[str, tuple[type[np.generic], float, float]] = {
    "frames": (np.int32, 1, 2**31 - 1),
    "height": (np.int32, 1, 2**31 - 1),
    "width": (np.int32, 1, 2**31 - 1),
    "label": (np.int16, -1, MOST_CLASSES - 1),
    "shard": (np.int32, 0, 2**31 - 1),
    "offset": (np.int64, 0, 2**63 - 1),
    "crc32c": (np.uint32, 0, 2**32 - 1),
}
#: Spacing of voxels in um and seconds between frames, float64, NaN where unknown.
SAMPLING = ("spacing.z", "spacing.y", "spacing.x", "interval")
NAMED = ("group", "split")
TEXTS = ("key", "filename")
#: The order of a frame's columns.
COLUMNS = (
    *("key", "frames", "height", "width", "filename", "label", "group", "weight", "split"),
    *("crowd_score", "tier1", "shard", "offset", "crc32c"),
)
#: Clips that are converted at a time.
RUN = 1 << 15
FIX = "Run 'dist-train finalize', which rebuilds it from the shards."


def write_table(
    path: Path, records: Iterable[tuple[str, Record]], shards: int, form: Form, classes: int = 2
) -> int:
    """Write the table of (key, record) entries, in the order of the keys; returns its checksum.

    Memory grows only with the number of different groups.

    Args:
        shards: number of the store's shards.
        form: of all clips.
        classes: number of classes, which fit into int8 in most stores.

    Raises:
        StoreError: a record is not valid, or of another form.
        OSError: the disk is full.
    """
    try:
        with ExitStack() as files, written_whole(path) as file:
            return _write(file, records, (shards, form, classes), path.parent, files)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise StoreError(
            f"the records of the shards make no clip table ({error})",
            where=path.parent,
            fix=REPAIR,
        ) from None


class ClipTable:
    """One row per clip. The position of a row is the number of the clip. It is pickled as the
    file's path.

    A column is checked when a process first takes all of it. The values of single clips that
    ``unchecked`` gives may be damaged: of a clip's place, the checksum of its pixels tells.
    """

    def __init__(self, arrays: ArrayFile, where: Path | None, fix: str = FIX) -> None:
        self._arrays, self._where, self._fix = arrays, where, fix
        #: The checksum of the header, which vouches for all of it.
        self.checksum = arrays.header_crc32c
        extra = (n.removesuffix(".ends") for n in arrays if n.endswith(".ends"))
        self.metadata = tuple(sorted(name for name in extra if name.startswith(METADATA)))
        self.columns = (*COLUMNS, *self.metadata)

    @classmethod
    def open(cls, path: Path, checksum: int, clips: int | None, fix: str = FIX) -> ClipTable:
        """Map a table, in a time that does not depend on its size.

        Args:
            clips: how many there must be, if that is known.
            fix: what to do about a damaged file.

        Raises:
            StoreError: it is missing, damaged, or another store's.
        """
        try:
            table = cls(ArrayFile(path, checksum), path, fix)
            lengths = {len(table._arrays.unchecked(name)) for name in table._row_arrays()}
        except (FileError, KeyError) as error:
            what = error.what if isinstance(error, FileError) else f"has no {error}"
            raise StoreError(f"the clip table {what}", where=path, fix=fix) from None
        if len(lengths) > 1 or clips not in (None, *lengths):
            raise StoreError("the clip table is another store's", where=path, fix=fix)
        return table

    @classmethod
    def of(
        cls, records: Iterable[tuple[str, Record]], shards: int, form: Form, classes: int = 2
    ) -> ClipTable:
        """A table in memory, of a store that has no file.

        Raises:
            KeyError, ValueError, TypeError, OverflowError: a record is not valid.
        """
        content = io.BytesIO()
        with ExitStack() as files:
            _write(content, records, (shards, form, classes), None, files)
        return cls(ArrayFile(content.getvalue()), None)

    def _row_arrays(self) -> Iterator[str]:
        yield from (*NUMBERS, "weight", "crowd_score", "tier1")
        yield from (name for name in SAMPLING if name in self._arrays)
        yield from (f"{name}.codes" for name in NAMED)
        yield from (f"{name}.ends" for name in (*TEXTS, *self.metadata))

    def __len__(self) -> int:
        return len(self._arrays.unchecked("label"))

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipTable, (self._arrays, self._where, self._fix)

    def __getitem__(self, name: str) -> Array:
        """A column, read-only: numbers are mapped, text is an array of strings.

        Raises:
            StoreError: it is damaged.
        """
        if name in (*NAMED, *TEXTS, *self.metadata):
            return np.array(self.texts(name), object)
        return self._checked(name)

    def sampling(self, name: str) -> Array:
        """A column of ``SAMPLING``: float64 [clips], NaN where unknown, read-only."""
        if name not in self._arrays:
            return np.broadcast_to(np.nan, len(self))
        return self._checked(name)

    def unchecked(self, name: str) -> Array:
        """A column of numbers that may be damaged."""
        return self._arrays.unchecked(name)

    def codes(self, name: str) -> Array:
        """The position in ``names`` of each clip's ``group`` or ``split``, int32 [clips]."""
        return self._checked(f"{name}.codes")

    def names(self, name: str) -> list[str]:
        """The different values of ``group`` or ``split``, in order of their bytes."""
        return _texts(self._checked(f"{name}.names.bytes"), self._checked(f"{name}.names.ends"))

    def texts(self, name: str, clips: Array | None = None) -> list[str]:
        """The values of a column of text, of all clips or of some."""
        if name in NAMED:
            codes, names = self.codes(name), self.names(name)
            return [names[code] for code in (codes if clips is None else codes[clips]).tolist()]
        content, ends = self._checked(f"{name}.bytes"), self._checked(f"{name}.ends")
        if clips is None:
            return _texts(content, ends)
        return [self.text(name, clip) for clip in clips.tolist()]

    def text(self, name: str, clip: int) -> str:
        """One value of a column of text, unchecked."""
        return self._bytes(name, clip).decode(errors="replace")

    def _bytes(self, name: str, clip: int) -> bytes:
        content, ends = (self._arrays.unchecked(f"{name}.{part}") for part in ("bytes", "ends"))
        return content[int(ends[clip - 1]) if clip else 0 : int(ends[clip])].tobytes()

    def key(self, clip: int) -> bytes:
        """The bytes of one key, unchecked."""
        return self._bytes("key", clip)

    def clip_of(self, key: str) -> int | None:
        """The number of the clip with this key; None if there is none."""
        clips = range(len(self))
        found = bisect_left(clips, key.encode(), key=lambda clip: self.key(clip))
        return found if found < len(self) and self.key(found) == key.encode() else None

    def keys(self, first: int, last: int) -> list[bytes]:
        """The keys of clips ``first`` to ``last`` (excluded), as bytes, unchecked."""
        ends = self._arrays.unchecked("key.ends")
        begin = int(ends[first - 1]) if first else 0
        content = self._arrays.unchecked("key.bytes")[begin : int(ends[last - 1])].tobytes()
        edges = [0, *(ends[first:last] - begin).tolist()]
        return [content[a:b] for a, b in pairwise(edges)]

    def frame(
        self, clips: Array | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """Rows as a table of pandas, whose index is the clip number.

        Args:
            clips: clip numbers, integer [n]; None takes all.
            columns: None takes all.
        """
        values = {name: self._values(name, clips) for name in columns or self.columns}
        return pd.DataFrame(values, index=range(len(self)) if clips is None else clips)

    def _values(self, name: str, clips: Array | None) -> Any:
        if name in NUMBERS or name in ("weight", "crowd_score", "tier1"):
            values = self[name] if clips is None else self[name][clips]
            return values.astype(np.int64) if values.dtype.kind in "iu" else values.copy()
        return pd.Series(self.texts(name, clips), dtype="str").to_numpy()

    def _checked(self, name: str) -> Array:
        try:
            return self._arrays[name]
        except FileError as error:
            raise self._damaged(error) from None

    def check(self) -> None:
        """Check every byte.

        Raises:
            StoreError: one is not as it was written.
        """
        try:
            self._arrays.check()
        except FileError as error:
            raise self._damaged(error) from None

    def differs(
        self, records: Iterable[tuple[str, Record]], shards: int, form: Form, classes: int = 2
    ) -> str | None:
        """What is wrong with the file, read to the last byte; None if it says what the ``records``
        of the index say."""
        try:
            self._arrays.check()
            end = 0
            for part in _parts(records):
                first, end = end, end + len(part)
                numbers, texts = _converted(part, shards, form, classes)
                clips = np.arange(first, min(end, len(self)))
                if end > len(self) or texts.keys() - set(self.columns):
                    return "is not that of the index"
                for name, values in numbers.items():
                    own = self.sampling(name) if name in SAMPLING else self.unchecked(name)
                    if not np.array_equal(own[clips], values, equal_nan=True):
                        return f"is not that of the index ('{name}')"
                for name in (*NAMED, *TEXTS, *self.metadata):
                    if self.texts(name, clips) != texts.get(name, [""] * len(part)):
                        return f"is not that of the index ('{name}')"
        except FileError as error:
            return error.what
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            return f"is not that of the index ({error})"
        return None if end == len(self) else "is not that of the index"

    def _damaged(self, error: FileError) -> StoreError:
        return StoreError(f"the clip table {error.what}", where=self._where, fix=self._fix)


def _parts(records: Iterable[tuple[str, Record]]) -> Iterator[list[tuple[str, Record]]]:
    pending = iter(records)
    while part := list(islice(pending, RUN)):
        yield part


def _write(
    file: IO[bytes],
    records: Iterable[tuple[str, Record]],
    made: tuple[int, Form, int],
    folder: Path | None,
    files: ExitStack,
) -> int:
    """``write_table`` to an open file, with spools in ``folder``, or in memory; ``made``:
    the number of shards, the form of the clips, and the number of classes."""
    arrays: dict[str, Spool] = {}
    names: dict[str, dict[str, int]] = {name: {} for name in NAMED}
    lengths: dict[str, int] = {}
    unsaid = set(SAMPLING)
    clips = 0

    def append(name: str, values: Array) -> None:
        if name not in arrays:
            arrays[name] = Spool(folder, values.dtype)
            files.callback(arrays[name].close)
        arrays[name].append(values)

    # Also of no clip there are all columns.
    for part in chain([[]], _parts(records)):
        numbers, texts = _converted(part, *made)
        for name, values in numbers.items():
            append(name, values)
        unsaid -= {name for name in unsaid if not np.isnan(numbers[name]).all()}
        for name in NAMED:
            known = names[name]
            codes = [known.setdefault(text, len(known)) for text in texts.pop(name)]
            append(f"{name}.codes", np.array(codes, np.int32))
        for name in lengths.keys() - texts.keys():
            texts[name] = [""] * len(part)
        for name, column in texts.items():
            if name not in lengths:
                # The clips before have no such entry.
                append(f"{name}.bytes", np.empty(0, np.uint8))
                append(f"{name}.ends", np.zeros(clips, np.int64))
                lengths[name] = 0
            content, ends = _joined_bytes(column)
            append(f"{name}.bytes", content)
            append(f"{name}.ends", ends + lengths[name])
            lengths[name] += len(content)
        clips += len(part)
    written: dict[str, Array | Pieces] = {n: a for n, a in arrays.items() if n not in unsaid}
    for name, known in names.items():
        used = sorted(known, key=str.encode)
        place = np.empty(len(known), np.int32)
        place[[known[text] for text in used]] = np.arange(len(known), dtype=np.int32)
        written[f"{name}.codes"] = _Recoded(arrays[f"{name}.codes"], place)
        content, ends = _joined_bytes(used)
        written |= {f"{name}.names.bytes": content, f"{name}.names.ends": ends}
    return write_arrays(file, written)


class _Recoded:
    """Codes in another numbering."""

    def __init__(self, codes: Spool, place: Array) -> None:
        self.dtype, self._codes, self._place = codes.dtype, codes, place

    def __len__(self) -> int:
        return len(self._codes)

    def pieces(self) -> Iterator[Array]:
        return (self._place[codes] for codes in self._codes.pieces())


def _converted(
    part: Sequence[tuple[str, Record]], shards: int, form: Form, classes: int
) -> tuple[dict[str, Array], dict[str, list[str]]]:
    """The columns of some records: numbers, and text.

    Raises:
        KeyError, ValueError, TypeError, OverflowError: a record is not valid.
    """
    records = [record for _, record in part]
    columns: dict[str, list[Any]] = {
        name: [record[name] for record in records]
        for name in ("label", "shard", "offset", "crc32c", "weight", "tier1", *NAMED, "filename")
    }
    shapes = [record["shape"] for record in records]
    # With several channels there is a fourth axis.
    if not all(type(shape) is list and len(shape) in (3, 4) for shape in shapes):
        raise ValueError("a clip has no valid 'shape'")
    for record in records:
        if form_of(record) != form:
            raise ValueError(f"a clip is {form_text(form_of(record))}, not {form_text(form)}")
    for axis, name in enumerate(("frames", "height", "width")):
        columns[name] = [shape[axis] for shape in shapes]
    numbers: dict[str, Array] = {}
    for name, (dtype, least, most) in NUMBERS.items():
        most = {"shard": shards, "label": classes}.get(name, most + 1) - 1
        if not all(type(value) is int and least <= value <= most for value in columns[name]):
            raise ValueError(f"a clip has no valid '{name}'")
        numbers[name] = np.array(columns[name], dtype)
    if classes <= np.iinfo(np.int8).max:
        # As in files of earlier versions.
        numbers["label"] = numbers["label"].astype(np.int8)
    if not all(type(value) is bool for value in columns["tier1"]):
        raise ValueError("a clip has no valid 'tier1'")
    numbers["tier1"] = np.array(columns["tier1"], np.bool_)
    crowd = [np.nan if r["crowd_score"] is None else r["crowd_score"] for r in records]
    if not all(type(value) in (int, float) for value in (*columns["weight"], *crowd)):
        raise ValueError("a clip has no valid 'weight' or 'crowd_score'")
    numbers["weight"] = np.array(columns["weight"], np.float64)
    numbers["crowd_score"] = np.array(crowd, np.float64)
    if not ((numbers["weight"] >= 0) & (numbers["weight"] < np.inf)).all():
        raise ValueError("a clip has no valid 'weight'")
    spacing = [record.get("spacing") or (None, None, None) for record in records]
    if not all(len(three) == 3 for three in spacing):
        raise ValueError("a clip has no valid 'spacing'")
    said = [*zip(*spacing, strict=True)] if spacing else [(), (), ()]
    for name, column in zip(
        SAMPLING, [*said, [record.get("interval") for record in records]], strict=True
    ):
        if not all(type(value) in (int, float, NoneType) for value in column):
            raise ValueError(f"a clip has no valid '{name}'")
        lengths = np.array([np.nan if value is None else value for value in column], np.float64)
        numbers[name] = np.where((lengths > 0) & (lengths < np.inf), lengths, np.nan)
    texts = {"key": [key for key, _ in part]}
    texts |= {name: columns[name] for name in (*NAMED, "filename")}
    entries = [record.get("metadata", {}) for record in records]
    if not all(type(entry) is dict for entry in entries):
        raise ValueError("a clip has no valid 'metadata'")
    for name in sorted({name for entry in entries for name in entry}):
        texts[f"{METADATA}{name}"] = [entry.get(name, "") for entry in entries]
    for name, values in texts.items():
        if not all(type(value) is str for value in values):
            raise ValueError(f"a clip has no valid '{name}'")
    return numbers, texts


def _joined_bytes(values: Sequence[str]) -> tuple[Array, Array]:
    """The values' bytes in a row, and the end of each."""
    encoded = [value.encode() for value in values]
    ends = np.cumsum([len(value) for value in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def _texts(content: Array, ends: Array) -> list[str]:
    whole, edges = content.tobytes(), [0, *ends.tolist()]
    return [whole[a:b].decode() for a, b in pairwise(edges)]
