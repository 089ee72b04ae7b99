"""DICOM, by pydicom: a file (.dcm) of one or more frames, or a folder with the slices of a series.

Slices are put in order by their position along the normal of their plane; without positions, by
their instance numbers. Values are those after the rescale slope and intercept, or the modality's
table. MONOCHROME1 is inverted, and a palette is applied.
Source: DICOM PS3.3, C.7.6 (image, frames) and C.11 (tables and windows).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np

from dist_train.data.raw.axes import is_length
from dist_train.data.raw.damage import check_held, reading
from dist_train.data.raw.picture import lies_beside
from dist_train.data.raw.stack import GREY, RGB, Choices, Stack, chosen_series
from dist_train.data.raw.units import MICROMETRES
from dist_train.errors import DecodeError
from dist_train.files import open_plain

SUFFIXES = (".dcm", ".dicom", ".ima")
PACKAGES = ("pydicom",)

_GREY = ("MONOCHROME1", "MONOCHROME2")
_PALETTE = "PALETTE COLOR"
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
# What all slices of a stack must have alike.
_ALIKE = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"),
    *("BitsStored", "PixelRepresentation"),
)
# A step between slices may differ from the median by this much.
_EVEN, _GAP = 0.01, 0.5


@dataclass(frozen=True)
class _Slice:
    """One frame: of which file, its number there, and the groups of its entries, nearest first."""

    path: Path
    number: int
    header: Any
    groups: tuple[Any, ...]

    def get(self, sequence: str | None, name: str) -> Any:
        """An entry of the frame, None if it has none."""
        for group in self.groups:
            items = [group] if group is self.header else group.get(sequence or "", [])
            for item in items[:1]:
                if item.get(name) is not None:
                    return item.get(name)
        return None


def reads_folder(path: Path) -> bool:
    """Whether a folder has a DICOM file."""
    return any(_is_dicom(file) for file in _candidates(path))


def read(path: Path, where: object, choices: Choices) -> Stack:
    with reading(where), warnings.catch_warnings(action="ignore"):
        files = _candidates(path) if path.is_dir() else [path]
        headers = _chosen([(file, _header(file)) for file in files], choices)
        slices = [one for file, header in headers for one in _slices(file, header)]
        _check_alike(slices)
        return _stack(*_in_order(slices), where)


def _candidates(folder: Path) -> list[Path]:
    """Files that may be DICOM."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [file for file in files if is_slice(file.name)]


def is_slice(name: str) -> bool:
    """Whether a file may be a slice: by suffix, or without one, as its numbers have dots."""
    suffix = PurePath(name).suffix.lower()
    return (suffix in (*SUFFIXES, "") or suffix[1:].isdecimal()) and not lies_beside(name)


def _is_dicom(file: Path) -> bool:
    with open_plain(file) as opened:
        return opened.read(132)[128:] == b"DICM"


def _header(file: Path) -> Any:
    from pydicom import dcmread

    from dist_train.data.raw.dicom_codecs import check_packed_frames

    if not _is_dicom(file):
        raise DecodeError(f"{file.name} is no DICOM file", fix="Replace it, or remove it.")
    with open_plain(file) as opened:
        header = dcmread(opened, stop_before_pixels=True)
        if header.get("PhotometricInterpretation") is None or not header.get("Rows"):
            raise DecodeError(f"{file.name} holds no picture", fix="Remove it.")
        if header.file_meta.TransferSyntaxUID.is_encapsulated:
            check_packed_frames(opened, header)
        elif not header.file_meta.TransferSyntaxUID.is_deflated:
            check_held(_bytes(header), file.stat().st_size - opened.tell())
    return header


def _bytes(header: Any) -> int:
    """Bytes of the pixels, unpacked. Those of YBR_FULL_422 have two samples, not three."""
    voxels = int(header.Rows) * int(header.Columns) * int(header.get("NumberOfFrames") or 1)
    is_halved = header.PhotometricInterpretation == "YBR_FULL_422"
    samples = 2 if is_halved else int(header.get("SamplesPerPixel") or 1)
    return -(-voxels * samples * int(header.BitsAllocated) // 8)


def _chosen(headers: Sequence[tuple[Path, Any]], choices: Choices) -> list[tuple[Path, Any]]:
    """The files of the chosen series, by number."""
    series: dict[str, list[tuple[Path, Any]]] = {}
    for file, header in headers:
        series.setdefault(str(header.get("SeriesInstanceUID")), []).append((file, header))
    ordered = sorted(series.values(), key=lambda one: (_number(one[0][1], "SeriesNumber"), one[0]))
    names = [
        f"{one[0][1].get('SeriesDescription') or 'without a name'} of {len(one)} files"
        for one in ordered
    ]
    return ordered[chosen_series(names, choices.series)]


def _number(header: Any, name: str) -> int:
    value = header.get(name)
    return int(value) if value not in (None, "") else -1


def _slices(file: Path, header: Any) -> Iterator[_Slice]:
    count = int(header.get("NumberOfFrames") or 1)
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = (header.get("SharedFunctionalGroupsSequence") or [])[:1]
    if own and len(own) != count:
        raise DecodeError(f"declares {count} frames, and describes {len(own)}")
    if int(header.get("TotalPixelMatrixColumns") or 0) > int(header.Columns):
        raise DecodeError("is a whole slide in tiles", fix="Save the region that you need.")
    for number in range(count):
        yield _Slice(file, number, header, (*own[number : number + 1], *shared, header))


def _check_alike(slices: Sequence[_Slice]) -> None:
    first = slices[0]
    for other in {one.path: one for one in slices}.values():
        for name in _ALIKE:
            if other.header.get(name) != first.header.get(name):
                raise DecodeError(
                    f"{name} is {first.header.get(name)} in {first.path.name}, and "
                    f"{other.header.get(name)} in {other.path.name}",
                    fix="Keep the slices of one stack.",
                )


def _in_order(slices: list[_Slice]) -> tuple[list[_Slice], float | None, float | None]:
    """The slices in order, the distance between two in mm, and the time between two in s.

    Both are None where the files do not say, or where they vary.
    """
    header, places = slices[0].header, _places(slices)
    if len(slices) == 1:
        return slices, None, None
    if places is None or np.ptp(places) == 0:
        interval = _interval(header)
        is_space = places is None and interval is None
        name = "SpacingBetweenSlices"
        step = slices[0].get("PixelMeasuresSequence", name) if is_space else None
        return _by_number(slices), step, interval
    order = np.argsort(places, kind="stable")
    slices = [slices[n] for n in order]
    steps = np.diff(places[order])
    # With several echoes or times, each position is there more than once.
    usual = float(np.median(steps[steps > 0]))
    for number in np.flatnonzero(np.abs(steps - usual) > _GAP * usual):
        one, other = slices[number : number + 2]
        if steps[number] < usual:
            raise DecodeError(
                f"{_name(one)} and {_name(other)} have one position, or nearly so",
                fix="Keep one stack: one time, one echo, and no slice twice.",
            )
        raise DecodeError(
            f"a slice is missing between {_name(one)} and {_name(other)}, which are "
            f"{steps[number]:.6g} mm apart (others {usual:.6g})",
            fix="Add it, or split the series there.",
        )
    return slices, usual if np.ptp(steps) <= _EVEN * usual else None, None


def _name(one: _Slice) -> str:
    return one.path.name if one.header.get("NumberOfFrames") is None else f"frame {one.number}"


def _places(slices: Sequence[_Slice]) -> np.ndarray | None:
    """Positions along the normal in mm, float64 [D]; None if a slice has none."""
    header = slices[0].header
    offsets = header.get("GridFrameOffsetVector")
    if offsets is not None and len(offsets) == len(slices):
        return np.asarray(offsets, float)
    places, normals = [], []
    for one in slices:
        # A position of the whole file is that of its first frame.
        is_own = len(one.groups) > 1 or _number(one.header, "NumberOfFrames") < 2
        place = one.get("PlanePositionSequence", "ImagePositionPatient") if is_own else None
        turn = one.get("PlaneOrientationSequence", "ImageOrientationPatient")
        if place is None or turn is None:
            return None
        row, column = np.asarray(turn, float).reshape(2, 3)
        places.append(np.asarray(place, float))
        normals.append(np.cross(row, column))
    if np.ptp(normals, axis=0).max() > 1e-3:
        raise DecodeError("holds slices that are not parallel", fix="Keep those of one stack.")
    return np.asarray(places @ normals[0])


def _by_number(slices: list[_Slice]) -> list[_Slice]:
    """Slices without different positions: frames as stored, files by instance number."""
    if len({one.path for one in slices}) == 1:
        return slices
    slices = sorted(slices, key=lambda one: (_number(one.header, "InstanceNumber"), one.number))
    numbers = [_number(one.header, "InstanceNumber") for one in slices]
    for one, number, other in zip(slices, numbers, numbers[1:], strict=False):
        if other != number + 1:
            raise DecodeError(
                f"slices have no positions, and after instance number {number} "
                f"({one.path.name}) comes {other}",
                fix="Add what is missing, or remove what is there twice.",
            )
    return slices


def _stack(
    slices: Sequence[_Slice], step: float | None, interval: float | None, where: object
) -> Stack:
    first = slices[0]
    header, dtype = first.header, _dtype(slices)
    kind, samples = str(header.PhotometricInterpretation), int(header.get("SamplesPerPixel") or 1)
    if (kind not in (*_GREY, _PALETTE) or samples != 1) and (kind not in _COLOUR or samples != 3):
        raise DecodeError(f"has the colours {kind} in {samples} samples")
    windows = {_window(one) for one in slices}
    rows = first.get("PixelMeasuresSequence", "PixelSpacing") or (None, None)
    is_stored = kind in _GREY and dtype.kind == "u" and not _is_mapped(slices)
    return Stack(
        _frames(slices, dtype, where),
        dtype,
        len(slices),
        GREY if kind in _GREY else RGB,
        bits=int(header.BitsStored) if is_stored else None,
        window=windows.pop() if len(windows) == 1 and kind in _GREY else None,
        spacing=(_micrometres(step), _micrometres(rows[0]), _micrometres(rows[1])),
        interval=interval,
    )


def _micrometres(length: Any) -> float | None:
    return float(length) * MICROMETRES["mm"] if length and is_length(float(length)) else None


def _frames(slices: Sequence[_Slice], dtype: np.dtype[Any], where: object) -> Iterator[np.ndarray]:
    from pydicom.pixels import iter_pixels

    with reading(where):
        for path, group in groupby(slices, lambda one: one.path):
            ours = list(group)
            whole = int(ours[0].header.get("NumberOfFrames") or 1)
            numbers = [one.number for one in ours]
            order = None if numbers == list(range(whole)) else numbers
            is_deflated = ours[0].header.file_meta.TransferSyntaxUID.is_deflated
            with (
                open_plain(path) as file,
                # pydicom reads single frames of files that are not deflated as a whole.
                closing(
                    iter_pixels(_whole(file) if is_deflated else file, indices=order)
                ) as decoded,
            ):
                for one in ours:
                    with warnings.catch_warnings(action="ignore"):
                        frame = next(decoded, None)
                    if frame is None:
                        raise DecodeError(f"{path.name} lacks frame {one.number} of {whole}")
                    values = _values(frame, one)
                    if dtype.kind not in "bf" and not np.can_cast(values.dtype, dtype):
                        raise DecodeError(f"{path.name} holds {values.dtype}, others {dtype}")
                    yield values.astype(dtype, copy=False)


def _whole(file: IO[bytes]) -> Any:
    from pydicom import dcmread

    with warnings.catch_warnings(action="ignore"):
        return dcmread(file)


def _values(frame: np.ndarray, one: _Slice) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    header = one.header
    if header.PhotometricInterpretation == _PALETTE:
        return np.asarray(apply_color_lut(frame, header))
    is_inverted = header.PhotometricInterpretation == "MONOCHROME1"
    if header.get("ModalityLUTSequence"):
        frame = np.asarray(apply_modality_lut(frame, header))
        return np.asarray(_table_end(header) - frame, frame.dtype) if is_inverted else frame
    if is_inverted:
        frame = np.asarray(_ends(one) - frame.astype(np.int64), frame.dtype)
    slope, intercept = _rescale(one)
    return frame if (slope, intercept) == (1, 0) else frame * slope + intercept


def _ends(one: _Slice) -> int:
    """The sum of the least and the greatest stored value: what an inverted value is taken from."""
    return -1 if one.header.PixelRepresentation else (1 << int(one.header.BitsStored)) - 1


def _table_end(header: Any) -> int:
    """The largest value that the modality's table gives."""
    from pydicom.pixels import apply_modality_lut

    entries, first = header.ModalityLUTSequence[0].LUTDescriptor[:2]
    stored = np.arange(first, first + (entries or 1 << 16))
    return int(np.asarray(apply_modality_lut(stored, header)).max())


def _rescale(one: _Slice) -> tuple[float, float]:
    if one.header.get("DoseGridScaling") is not None:
        return float(one.header.DoseGridScaling), 0.0
    name = "PixelValueTransformationSequence"
    slope, intercept = one.get(name, "RescaleSlope"), one.get(name, "RescaleIntercept")
    return float(1 if slope is None else slope), float(intercept or 0)


def _is_mapped(slices: Sequence[_Slice]) -> bool:
    """Whether values are other than stored."""
    return bool(slices[0].header.get("ModalityLUTSequence")) or any(
        _rescale(one) != (1, 0) for one in slices
    )


def _dtype(slices: Sequence[_Slice]) -> np.dtype[Any]:
    """The type of all values."""
    from pydicom.pixels.utils import pixel_dtype

    header = slices[0].header
    if header.PhotometricInterpretation == _PALETTE:
        bits = header.RedPaletteColorLookupTableDescriptor[2]
        return np.dtype(np.uint8 if bits == 8 else np.uint16)
    if header.BitsAllocated == 1:
        return np.dtype(bool)
    # Floats have no sign bit to speak of.
    stored = pixel_dtype(header, as_float=header.get("PixelRepresentation") is None)
    if header.get("ModalityLUTSequence"):
        return np.dtype(np.uint16)
    native = np.dtype(str(stored)).newbyteorder("=")
    # float32 for 16 bits: their rescaled values have no more.
    return np.result_type(native, np.float32) if _is_mapped(slices) else native


def _window(one: _Slice) -> tuple[float, float] | None:
    """The values that are shown black and white (C.11.2.1.2), None without a window."""
    centre, width = (
        one.get("FrameVOILUTSequence", name) for name in ("WindowCenter", "WindowWidth")
    )
    if centre is None or width is None:
        return None
    centre, width = (float(value if np.ndim(value) == 0 else value[0]) for value in (centre, width))
    if str(one.get("FrameVOILUTSequence", "VOILUTFunction") or "LINEAR") == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if not is_length(width):
        return None
    low, high = centre - width / 2, centre + width / 2
    if one.header.PhotometricInterpretation == "MONOCHROME1":
        if one.header.get("ModalityLUTSequence"):
            end = _table_end(one.header)
            return end - high, end - low
        slope, intercept = _rescale(one)
        ends = slope * _ends(one) + 2 * intercept
        return ends - high, ends - low
    return low, high


def _interval(header: Any) -> float | None:
    """Time between frames in seconds: the frames' own, or the rate at which they are shown."""
    times = header.get("FrameTimeVector")
    if times is not None and np.ndim(times) == 1 and len(times) > 1:
        steps = np.asarray(times, float)[1:]
        time = float(np.median(steps))
        return time / 1000 if is_length(time) and np.ptp(steps) <= _EVEN * time else None
    for name, unit in (("FrameTime", 1e-3), ("CineRate", None)):
        value = header.get(name)
        if value is not None and is_length(float(value)):
            return float(value) * unit if unit else 1 / float(value)
    return None
