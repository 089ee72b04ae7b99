"""Names of raw files: found under other systems' spellings, and nearly right ones are told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from make_media import write_volumes

from dist_train.data.raw.formats import may_be_folder
from dist_train.data.raw.source import LocalFolder
from dist_train.errors import DecodeError, MachineError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two volumes, and two in a folder ``d``; one name is in Unicode's decomposed form."""
    write_volumes(tmp_path, 2)
    write_volumes(tmp_path / "d", 1)
    np.save(tmp_path / "d" / "Ma\u0308us.npy", np.zeros((2, 4, 4), np.uint8))
    return tmp_path


@pytest.mark.parametrize("name", ["d/M\u00e4us.npy", "d\\Ma\u0308us.npy", "d\\M\u00e4us.npy"])
def test_a_file_is_found_under_another_systems_name(folder: Path, name: str) -> None:
    with LocalFolder(folder).fetched(name) as path:
        assert path == folder / "d" / "Ma\u0308us.npy"


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("Clip001.npy", "clip001.npy"),
        ("clip001", "clip001.npy"),
        ("CLIP001.avi", "clip001.npy"),
        ("D/M\u00e4us.npy", "d/Ma\u0308us.npy"),
        ("d\\MA\u0308US", "d/Ma\u0308us.npy"),
        ("raw/clip001.npy", "clip001.npy"),
        (r"E:raw\CLIP001.avi", "clip001.npy"),
    ],
)
def test_a_file_of_nearly_that_name_is_told_and_not_taken(
    folder: Path, name: str, there: str
) -> None:
    source = LocalFolder(folder)
    assert source.missing([name]) == [name]
    with (
        pytest.raises(DecodeError, match=f"the file is missing. It exists as '{there}'"),
        source.fetched(name),
    ):
        pass


@pytest.mark.parametrize("how", ["symbolic link", "hard link", "way round"])
def test_one_file_under_two_names(folder: Path, how: str) -> None:
    if how == "symbolic link":
        (folder / "other.npy").symlink_to("clip001.npy")
    elif how == "hard link":
        (folder / "other.npy").hardlink_to(folder / "clip001.npy")
    other = "d/../clip001.npy" if how == "way round" else "other.npy"
    names = ["clip000.npy", "clip001.npy", "gone.npy", other]
    assert LocalFolder(folder).twice(names) == ("clip001.npy", other)
    assert LocalFolder(folder).twice(names[:3]) is None


def test_an_array_in_a_file(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link.h5").symlink_to("a.h5")
    source = LocalFolder(tmp_path)
    with source.fetched("a.h5::t0/raw") as path:
        assert path == tmp_path / "a.h5"
    assert source.where("a.h5::t0/raw") == f"{tmp_path}/a.h5::t0/raw"
    assert source.missing(["a.h5::x", "c.h5::x"]) == ["c.h5::x"]
    assert source.hint("A.H5::x") == "It exists as 'a.h5'."
    assert source.changed_since("a.h5::x", 0)
    assert source.twice(["a.h5::x", "a.h5::y", "b.h5::x"]) is None
    for other in ("a.h5::/x", "link.h5::x", "./a.h5::x/"):
        assert source.twice(["a.h5::y", "a.h5::x", other]) == ("a.h5::x", other)


def test_a_folder_that_is_one_clip(tmp_path: Path) -> None:
    """Of a format that reads folders: DICOM, by a mark after 128 bytes."""
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / "1").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "link").symlink_to("scan")
    source = LocalFolder(tmp_path)
    with source.fetched("scan") as path:
        assert path == tmp_path / "scan"
    assert source.twice(["scan", "link"]) == ("scan", "link")
    # A slice of it is another clip.
    assert source.twice(["scan", "scan/1"]) is None
    changed = (tmp_path / "scan" / "1").stat().st_ctime
    assert source.changed_since("scan", changed - 1)
    assert not source.changed_since("scan", changed)
    # A name that is another format's.
    (tmp_path / "scan.npy").symlink_to("scan")
    with pytest.raises(DecodeError, match="is a folder, and none"), source.fetched("scan.npy"):
        pass
    (tmp_path / "scan" / "1").write_bytes(b"no mark")
    with pytest.raises(DecodeError, match="is a folder, and none"), source.fetched("scan"):
        pass


def test_a_folder_that_may_not_be_entered_is_no_missing_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def refusing(path: Path, **how: bool) -> os.stat_result:
        # Root may enter any folder.
        if path.parent == folder / "d":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", refusing)
    with pytest.raises(MachineError, match=r"d/a.npy: cannot be read \(Permission d"):
        LocalFolder(folder).missing(["d/a.npy"])


def test_an_array_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / ".zgroup").write_text("{}")
    with LocalFolder(tmp_path).fetched("a.zarr::0/1") as path:
        assert path == tmp_path / "a.zarr"


def test_names_of_folders_may_have_dots() -> None:
    for name in ("1.2.840.10008", "patient.01", "scan", "A.ZARR", "a/b.dcm"):
        assert may_be_folder(name)
    for name in ("a.npy", "a.nii.gz", "a.MP4", "1.2.tif"):
        assert not may_be_folder(name)
