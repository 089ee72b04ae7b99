"""Zarr arrays by a writer of our own, and by the package where its own codecs are to be read."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_media import read_volume
from raw_files import stack_in
from zarr_writer import write_array, write_group

from dist_train.data.raw.formats import format_of
from dist_train.data.raw.formats.zarr import read, reads_folder
from dist_train.data.raw.stack import Choices
from dist_train.errors import DecodeError

zarr = pytest.importorskip("zarr")
VALUES = np.random.default_rng(0).integers(1, 1 << 16, (3, 2, 4, 5, 6), np.uint16)
STACK = VALUES[0, 0]


def zipped(path: Path, inside: bool = False) -> Path:
    """The archive of a folder; ``inside`` another one of its name."""
    root, base = (path.parent, path.name) if inside else (path, ".")
    made = shutil.make_archive(str(path.with_name("packed")), "zip", root, base)
    return Path(made).rename(path.with_name("packed.zarr.zip"))


def ome(path: Path, version: int = 3, axes: str = "tczyx", **more: Any) -> Path:
    """An OME-Zarr image of two levels: NGFF 0.4 in Zarr 2, or 0.5 in Zarr 3."""
    kinds = {"t": "time", "c": "channel"}
    units = {"t": "millisecond", "z": "micrometer", "y": "nanometer", "x": "micrometer"}
    scale = {"t": 40.0, "c": 1.0, "z": 2.0, "y": 250.0, "x": 0.5}
    image = {
        "name": "cells",
        "axes": [
            {"name": a, "type": kinds.get(a, "space")} | ({"unit": units[a]} if a in units else {})
            for a in axes
        ],
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [scale[a] * (level + 1) for a in axes]}
                ],
            }
            for level in range(2)
        ],
    }
    attrs = {"multiscales": [image], "omero": {"channels": [{"label": "DAPI"}, {"label": ""}]}}
    attrs |= more
    write_group(path, version, {"ome": attrs} if version == 3 else attrs)
    values = np.moveaxis(VALUES, range(5), ["tczyx".index(a) for a in "tczyx"])
    values = values.transpose(["tczyx".index(a) for a in axes])
    write_array(path / "0", values, version=version, chunks=[2] * 5, packed=True)
    write_array(path / "1", values[..., ::2, ::2], version=version)
    return path


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("axes", ["tczyx", "zctyx", "yxtzc"])
@pytest.mark.parametrize("archive", [False, True])
def test_ome_zarr(tmp_path: Path, version: int, axes: str, archive: bool) -> None:
    path = ome(tmp_path / "a.ome.zarr", version, axes)
    path = zipped(path) if archive else path
    stack, frames = stack_in(path, depth_axis="Z", plane=2)
    np.testing.assert_array_equal(frames, np.moveaxis(VALUES[2], 0, -1))
    assert stack.channels == ("DAPI", "channel 1")
    assert (stack.spacing, stack.interval, stack.damaged) == ((2.0, 0.25, 0.5), None, 0)
    stack, frames = stack_in(path, depth_axis="T", plane=3)
    np.testing.assert_array_equal(frames, np.moveaxis(VALUES[:, :, 3], 1, -1))
    assert (stack.spacing, stack.interval) == ((None, 0.25, 0.5), 0.04)
    with pytest.raises(DecodeError, match="both time and depth"):
        read(path, path, Choices())
    clip = read_volume(path, bits=16, depth_axis="Z", plane=0, channels="1")
    np.testing.assert_array_equal(clip, VALUES[0, 1] >> 8)


def test_ome_zarr_of_the_first_versions(tmp_path: Path) -> None:
    """Without units and scales; before 0.3 without axes."""
    write_array(tmp_path / "a.zarr" / "0", VALUES[:1, :1], version=2)
    write_group(tmp_path / "a.zarr", 2, {"multiscales": [{"datasets": [{"path": "0"}]}]})
    stack, frames = stack_in(tmp_path / "a.zarr")
    np.testing.assert_array_equal(frames, STACK)
    assert stack.spacing == (None, None, None)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["?", "u1", "<u2", "i2", "f4"])
def test_an_array(tmp_path: Path, version: int, packed: bool, dtype: str) -> None:
    values = (STACK >> 8).astype(dtype)
    path = write_array(tmp_path / "a.zarr", values, (3, 5, 4), version, packed=packed)
    _, frames = stack_in(path)
    np.testing.assert_array_equal(frames, values)


@pytest.mark.parametrize("version", [2, 3])
def test_names_of_axes(tmp_path: Path, version: int) -> None:
    names = ("channel", "z", "y", "x")
    path = write_array(tmp_path / "a.zarr", VALUES[0], None, version, names=names)
    np.testing.assert_array_equal(stack_in(path)[1], np.moveaxis(VALUES[0], 0, -1))
    path = write_array(tmp_path / "b.zarr", VALUES[0], None, version)
    with pytest.raises(DecodeError, match="4 axes without names"):
        read(path, path, Choices())
    path = write_array(tmp_path / "c.zarr", STACK, None, version, names=("q", "y", "x"))
    with pytest.raises(DecodeError, match="Q is neither time nor depth"):
        read(path, path, Choices())
    path = write_array(tmp_path / "d.zarr", STACK, None, version, names=("t", "z", "x"))
    with pytest.raises(DecodeError, match="not frames, row and column"):
        read(path, path, Choices())


def test_a_dataset_by_its_path(tmp_path: Path) -> None:
    path = write_group(tmp_path / "a.zarr", 3)
    write_array(write_group(path / "b", 3) / "c", STACK)
    np.testing.assert_array_equal(stack_in(path, dataset="b/c")[1], STACK)
    np.testing.assert_array_equal(stack_in(path, dataset="b")[1], STACK)
    write_array(path / "b" / "d", STACK[:2])
    with pytest.raises(DecodeError, match=r"2 arrays \(c \[4, 5, 6\], d \[2, 5, 6\]\)\. Name one"):
        read(path, path, Choices(dataset="b"))
    with pytest.raises(DecodeError, match="holds no group or array 'x'"):
        read(path, path, Choices(dataset="x"))
    for outside in ("../a.zarr/b/c", "/b/c"):
        with pytest.raises(DecodeError, match="is no place in it"):
            read(path, path, Choices(dataset=outside))


def test_codecs_and_shards_of_the_package(tmp_path: Path) -> None:
    for version, how in ((2, {}), (3, {"shards": (4, 10, 12)})):
        path = tmp_path / f"{version}.zarr"
        array = zarr.create_array(
            path, shape=STACK.shape, chunks=(2, 5, 3), dtype="u2", zarr_format=version, **how
        )
        array[:] = STACK
        stack, frames = stack_in(path)
        np.testing.assert_array_equal(frames, STACK)
        assert stack.damaged == 0


@pytest.mark.parametrize("inside", [False, True])
def test_archives(tmp_path: Path, inside: bool) -> None:
    path = zipped(write_array(tmp_path / "a.zarr", STACK), inside)
    assert format_of(path.name, path) is not None
    np.testing.assert_array_equal(stack_in(path)[1], STACK)


def test_series(tmp_path: Path) -> None:
    """Those of bioformats2raw, and of a group with several images."""
    path = write_group(tmp_path / "a.zarr", 2, {"bioformats2raw.layout": 3})
    for number in range(11):
        write_array(path / str(number) / "0", STACK + np.uint16(number), version=2)
        scales = [{"datasets": [{"path": "0"}], "axes": ["z", "y", "x"]}]
        write_group(path / str(number), 2, {"multiscales": scales})
    with pytest.raises(DecodeError, match="holds 11 series"):
        read(path, path, Choices())
    np.testing.assert_array_equal(stack_in(path, series=10)[1], STACK + np.uint16(10))
    write_group(path / "1", 2, {"multiscales": scales * 2})
    with pytest.raises(DecodeError, match="holds 2 series"):
        read(path, path, Choices(dataset="1"))
    write_group(path, 2, {"plate": {}})
    with pytest.raises(DecodeError, match="is a plate"):
        read(path, path, Choices())


def test_lost_chunks_are_damage(tmp_path: Path) -> None:
    """Zarr gives fill values for them."""
    path = write_array(tmp_path / "a.zarr", STACK, (3, 5, 3))
    (path / "c" / "0" / "0" / "1").unlink()
    assert stack_in(path)[0].damaged == 3
    with pytest.raises(DecodeError, match=r"3 of 4 frames are damaged.*--damaged keep"):
        read_volume(path, bits=16)
    shutil.rmtree(path / "c")
    with pytest.raises(DecodeError, match="has none of its 4 chunks"):
        read(path, path, Choices())
    path = write_array(tmp_path / "b.zarr", STACK, (1, 5, 6), shape=(1 << 40, 5, 6))
    with pytest.raises(DecodeError, match=f"has 5 of {1 << 40} chunks"):
        read(path, path, Choices())


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_cut_or_damaged(tmp_path: Path, packed: bool) -> None:
    path = write_array(tmp_path / "a.zarr", STACK, (1, 5, 6), packed=packed)
    chunk = path / "c" / "2" / "0" / "0"
    content = chunk.read_bytes()
    for length in range(len(content)):
        chunk.write_bytes(content[:length])
        with pytest.raises(DecodeError):
            read_volume(path, bits=16)
    said = (path / "zarr.json").read_text()
    for length in range(0, len(said), 7):
        (path / "zarr.json").write_text(said[:length])
        with pytest.raises(DecodeError):
            read_volume(path, bits=16)


def test_archives_cut_anywhere(tmp_path: Path) -> None:
    path = zipped(write_array(tmp_path / "a.zarr", STACK, (1, 5, 6)))
    content = path.read_bytes()
    for length in range(0, len(content), 41):
        path.write_bytes(content[:length])
        with pytest.raises(DecodeError):
            read_volume(path, bits=16)


def test_nothing_outside_is_opened(tmp_path: Path) -> None:
    write_array(tmp_path / "b.zarr", STACK)
    path = write_group(tmp_path / "a.zarr", 3)
    (path / "b").symlink_to(tmp_path / "b.zarr")
    with pytest.raises(DecodeError, match="holds links"):
        read(path, path, Choices())


class Bomb:
    """Would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_no_pickle_is_ever_loaded(tmp_path: Path, place: str) -> None:
    path = write_array(tmp_path / "a.zarr", STACK, version=2)
    said = json.loads((path / ".zarray").read_text())
    codec = {"id": "pickle", "protocol": 5}
    said[place] = [codec] if place == "filters" else codec
    (path / ".zarray").write_text(json.dumps(said))
    (path / "0.0.0").write_bytes(pickle.dumps(Bomb(tmp_path / "blown")))
    with pytest.raises(DecodeError, match="pickle"):
        read_volume(path, bits=16)
    assert not (tmp_path / "blown").exists()


def test_folders_that_are_zarr(tmp_path: Path) -> None:
    path = write_array(tmp_path / "a", STACK)
    assert reads_folder(path)
    assert not reads_folder(tmp_path)
    np.testing.assert_array_equal(read_volume(path, bits=16), STACK >> 8)
