"""DICOM files and folders: real files of pydicom's own tests, and files written by ITK (GDCM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import pixel_array
from pydicom.uid import generate_uid
from raw_files import check_damaged, clip_in, stack_in

from dist_train.data.raw.stack import RGB
from dist_train.errors import DecodeError

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 2000, (5, 6, 7), np.uint16)


def real(name: str) -> Path:
    return Path(str(get_testdata_file(name, download=False)))


def write(
    path: Path, array: np.ndarray, packed: str = "", vector: bool = False, **tags: str
) -> Path:
    """By ITK; tags as "0028|1050"."""
    image = SimpleITK.GetImageFromArray(array, isVector=vector)
    for tag, value in tags.items():
        image.SetMetaData(tag, value)
    writer = SimpleITK.ImageFileWriter()
    writer.SetFileName(str(path))
    writer.KeepOriginalImageUIDOn()
    if packed:
        writer.UseCompressionOn()
        writer.SetCompressor(packed)
    writer.Execute(image)
    return path


def write_series(
    folder: Path, slices: np.ndarray, places: Sequence[float], series: str = "1.2.3", **tags: str
) -> Path:
    """One file a slice, in an order of names that is not that of the positions."""
    folder.mkdir(exist_ok=True)
    for number, (picture, place) in enumerate(zip(slices, places, strict=True)):
        own = {
            "0020|000e": series,
            "0020|000d": "1.2",
            "0008|0018": generate_uid(),
            "0008|0060": "CT",
            "0020|0013": str(number + 1),
            "0020|0032": f"0\\{place}\\0",
            # Coronal: the normal is along the second axis.
            "0020|0037": "1\\0\\0\\0\\0\\-1",
            "0028|0030": "0.25\\0.5",
        }
        image = SimpleITK.GetImageFromArray(picture)
        image.SetSpacing((0.5, 0.25))
        for tag, value in (own | tags).items():
            image.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{series}-{(number * 3) % 7}.dcm"))
        writer.Execute(image)
    return folder


def changed(path: Path, to: Path, change: Callable[[Dataset], Any]) -> Path:
    header = pydicom.dcmread(path)
    change(header)
    header.save_as(to)
    return to


def test_a_ct_slice_in_hounsfield_units() -> None:
    stack, frames = stack_in(real("CT_small.dcm"))
    # As the file's entries say: slope 1, intercept -1024, 0.661468 mm.
    np.testing.assert_array_equal(
        frames[0], pydicom.dcmread(real("CT_small.dcm")).pixel_array - 1024.0
    )
    assert frames.shape == (1, 128, 128)
    assert stack.spacing[1:] == pytest.approx((661.468, 661.468))
    assert stack.bits is None


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_expb.dcm",
    ],
)  # fmt: skip
def test_one_slice_in_every_form(name: str) -> None:
    """The same picture, as its writers packed it."""
    right = pydicom.dcmread(real("MR_small.dcm")).pixel_array
    stack, frames = stack_in(real(name))
    np.testing.assert_array_equal(frames[0], right)
    assert stack.dtype == np.int16
    assert stack.window == pytest.approx((600 - 0.5 - 1599 / 2, 600 - 0.5 + 1599 / 2))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("SC_rgb_rle_2frame.dcm", (2, 100, 100, 3)),
        ("examples_ybr_color.dcm", (30, 240, 320, 3)),
        ("examples_palette.dcm", (1, 350, 800, 3)),
        ("SC_rgb_jpeg_dcmtk.dcm", (1, 100, 100, 3)),
        ("SC_rgb_small_odd.dcm", (1, 3, 3, 3)),
        ("examples_jpeg2k.dcm", (1, 480, 640, 3)),
        ("image_dfl.dcm", (1, 512, 512)),
    ],
)
@pytest.mark.filterwarnings("ignore:Expected explicit VR")
def test_colours_and_other_kinds(name: str, shape: tuple[int, ...]) -> None:
    stack, frames = stack_in(real(name))
    assert frames.shape == shape
    assert stack.channels == (RGB if len(shape) == 4 else ("grey",))
    if name != "examples_palette.dcm":
        right = pixel_array(pydicom.dcmread(real(name)))
        np.testing.assert_array_equal(frames, right.reshape(shape))


# JPEG is lossless here.
@pytest.mark.parametrize("packed", ["", "JPEG"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_frames_of_one_file(tmp_path: Path, dtype: type, packed: str) -> None:
    array = VOLUME.astype(dtype)
    stack, frames = stack_in(write(tmp_path / "a.dcm", array, packed))
    np.testing.assert_array_equal(frames, array)
    assert stack.dtype == dtype
    assert stack.bits == 8 * np.dtype(dtype).itemsize


def test_slices_in_the_order_of_their_places(tmp_path: Path) -> None:
    places = [4.0, 0.0, 6.0, 2.0, 8.0]
    folder = write_series(tmp_path / "a", VOLUME, places)
    (folder / "DICOMDIR").write_text("")
    (folder / "notes.txt").write_text("")
    stack, frames = stack_in(folder)
    # The normal of these slices is the second axis: (1, 0, 0) x (0, 0, -1).
    np.testing.assert_array_equal(frames, VOLUME[np.argsort(places)])
    assert stack.spacing == pytest.approx((2000, 250, 500))
    assert stack.interval is None
    np.testing.assert_array_equal(
        frames, SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(
            SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            [0, 2, 4, 8, 10],
            r"a slice is missing between .* and .*, which are 4 mm apart \(others 2\)",
        ),
        ([0, 2, 4, 4, 6], "have one position"),
        ([0, 2, 0, 2, 0], "have one position"),
    ],
)
def test_missing_and_double_slices(tmp_path: Path, places: list[float], message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        stack_in(write_series(tmp_path / "a", VOLUME, places))


def test_uneven_slices_have_no_distance(tmp_path: Path) -> None:
    stack, _ = stack_in(write_series(tmp_path / "a", VOLUME, [0, 2, 4.3, 6, 8]))
    assert stack.spacing[0] is None


def test_several_series(tmp_path: Path) -> None:
    write_series(tmp_path / "a", VOLUME, range(5), "1.2.4", **{"0008|103e": "axial"})
    write_series(tmp_path / "a", VOLUME[:2], range(2), "1.2.5", **{"0008|103e": "scout"})
    with pytest.raises(DecodeError, match=r"2 series .*\(0 axial of 5 files, 1 scout of 2 files\)"):
        stack_in(tmp_path / "a")
    np.testing.assert_array_equal(stack_in(tmp_path / "a", series=1)[1], VOLUME[:2])


def test_slices_that_do_not_fit_or_are_damaged(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "a", VOLUME, range(5))
    one = sorted(folder.iterdir())[2]
    whole = one.read_bytes()
    one.write_bytes(whole[: len(whole) - 10])
    with pytest.raises(DecodeError, match="is cut short"):
        stack_in(folder)
    one.write_bytes(b"")
    with pytest.raises(DecodeError, match=f"{one.name} is no DICOM file"):
        stack_in(folder)
    one.write_bytes(whole)

    def turn(header: Dataset) -> None:
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]

    changed(one, one, turn)
    with pytest.raises(DecodeError, match="slices that are not parallel"):
        stack_in(folder)
    changed(real("MR_small.dcm"), one, lambda header: setattr(header, "SeriesInstanceUID", "1.2.3"))
    with pytest.raises(DecodeError, match=r"Rows is 6 in .*, and 64 in"):
        stack_in(folder)


def test_slices_without_places(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "a", VOLUME, [0] * 5)
    np.testing.assert_array_equal(stack_in(folder)[1], VOLUME)
    for path in folder.iterdir():
        changed(path, path, lambda header: header.__delattr__("ImagePositionPatient"))
    np.testing.assert_array_equal(stack_in(folder)[1], VOLUME)
    (folder / "1.2.3-3.dcm").unlink()
    with pytest.raises(DecodeError, match=r"after instance number 1 .* comes 3"):
        stack_in(folder)


def test_white_is_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", VOLUME)

    def to_white(header: Dataset) -> None:
        header.PhotometricInterpretation, header.RescaleSlope = "MONOCHROME1", 2
        header.RescaleIntercept, header.WindowCenter, header.WindowWidth = -5, 1000, 201

    stack, frames = stack_in(changed(path, path, to_white))
    np.testing.assert_array_equal(frames, 2.0 * (65535 - VOLUME) - 5)
    # Black was at 1099.5 and white at 899.5 of the values as they were.
    ends = 2 * 65535 - 10
    assert stack.window == (ends - 1099.5, ends - 899.5)


def test_frames_in_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", VOLUME)

    def set_times(header: Dataset) -> None:
        del header.PerFrameFunctionalGroupsSequence
        header.FrameTimeVector = [0, 40, 40, 40, 40]
        header.WindowCenter, header.WindowWidth = [10, 20], [5, 6]

    stack, _ = stack_in(changed(path, path, set_times))
    assert (stack.interval, stack.window, stack.spacing[0]) == (0.04, (7.5, 11.5), None)
    changed(path, path, lambda header: setattr(header, "FrameTimeVector", [0, 40, 40, 80, 40]))
    assert stack_in(path)[0].interval is None


def enhanced(header: Dataset, places: Sequence[float]) -> None:
    """Give each frame a place, a slope, and all of them a spacing (PS3.3 C.7.6.16)."""

    def item(**entries: object) -> Dataset:
        made = Dataset()
        for name, value in entries.items():
            setattr(made, name, value)
        return made

    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        header.pop(name, None)
    measures = item(PixelSpacing=[0.25, 0.5])
    turn = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    header.SharedFunctionalGroupsSequence = [
        item(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[turn])
    ]
    header.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, place])],
            PixelValueTransformationSequence=[item(RescaleSlope=place + 1, RescaleIntercept=0)],
        )
        for place in places
    ]


def test_frames_with_places_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", VOLUME)
    places = [4, 0, 6, 2, 8]
    stack, frames = stack_in(changed(path, path, lambda header: enhanced(header, places)))
    scaled = VOLUME * (np.array(places)[:, None, None] + 1.0)
    np.testing.assert_array_equal(frames, scaled[np.argsort(places)])
    assert stack.dtype == np.float32
    assert stack.spacing == (2000, 250, 500)


@pytest.mark.parametrize("packed", ["", "JPEG"])
def test_damaged(tmp_path: Path, packed: str) -> None:
    assert check_damaged(write(tmp_path / "a.dcm", VOLUME.astype(np.uint8), packed), 25) > 10


def test_damaged_runs(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(real("SC_rgb_rle_2frame.dcm").read_bytes())
    assert check_damaged(path, 15) > 5


def test_through_the_clip(tmp_path: Path) -> None:
    array = VOLUME.astype(np.uint8)
    path = write(tmp_path / "a.dcm", array).rename(tmp_path / "fetched")
    np.testing.assert_array_equal(clip_in(path, "a.DCM"), array)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"NumberOfFrames": 10**6}, "declares 84000000 bytes of values, holds"),
        ({"Rows": 65535, "Columns": 65535}, "is cut short: declares"),
        ({"PhotometricInterpretation": "HSV"}, "has the colours HSV in 1 samples"),
        ({"TotalPixelMatrixColumns": 70}, "is a whole slide in tiles"),
    ],
)
def test_refused(tmp_path: Path, entries: dict[str, object], message: str) -> None:
    path = write(tmp_path / "a.dcm", VOLUME)

    def change(header: Dataset) -> None:
        for name, value in entries.items():
            setattr(header, name, value)

    with pytest.raises(DecodeError, match=message):
        clip_in(changed(path, path, change))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtstruct.dcm", "is no DICOM file|holds no picture"),
        ("test-SR.dcm", "holds no picture"),
        ("MR_truncated.dcm", "is cut short"),
        ("liver_1frame.dcm", "declares 1 frames, and describes 3"),
    ],
)
def test_other_kinds_of_files(name: str, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        clip_in(real(name))


def test_video_is_not_unpacked(tmp_path: Path) -> None:
    header = pydicom.dcmread(real("MR_small_RLE.dcm"))
    header.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
    header.save_as(tmp_path / "a.dcm")
    with pytest.raises(DecodeError, match=r"is packed as MPEG-4 .*Unpack it first"):
        clip_in(tmp_path / "a.dcm")


def test_white_is_zero_of_a_table(tmp_path: Path) -> None:
    """The table comes first, and its largest value becomes 0."""
    path = write(tmp_path / "a.dcm", VOLUME)
    table = np.arange(2000) ** 2 // 200

    def to_white(header: Dataset) -> None:
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [2000, 0, 16])
        item.add_new("LUTData", "US", table.tolist())
        item.ModalityLUTType = "US"
        header.ModalityLUTSequence = [item]
        header.PhotometricInterpretation = "MONOCHROME1"
        header.WindowCenter, header.WindowWidth = 1000, 201
        for name in ("RescaleSlope", "RescaleIntercept"):
            if name in header:
                delattr(header, name)

    stack, frames = stack_in(changed(path, path, to_white))
    np.testing.assert_array_equal(frames, table[-1] - table[VOLUME])
    assert stack.window == (table[-1] - 1099.5, table[-1] - 899.5)
