"""MedMNIST files: checked before they are unpacked, and never trusted with memory."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from stores import small_medmnist

from dist_train.data.raw import medmnist
from dist_train.data.raw.medmnist import read_medmnist
from dist_train.errors import StoreError


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_labels": None}, "val_labels"),
        ({"val_labels": np.full((3, 1), -1)}, "label -1 of val image 0 is no class"),
        ({"val_labels": np.full((3, 1), 0.5)}, "label 0.5 of val image 0 is no class"),
        ({"val_labels": np.array(1)}, "val has 3 images, 1 labels"),
        ({"val_labels": np.array([[{}]])}, "Object arrays cannot be loaded"),
        ({"val_images": np.zeros((3, 4, 5), np.uint8)}, r"val_images are uint8 \[3, 4, 5\]"),
        ({"val_images": np.zeros((3, 4, 5, 6))}, "val_images are float64"),
    ],
)
def test_another_form_is_refused(
    tmp_path: Path, changed: dict[str, np.ndarray | None], message: str
) -> None:
    path = small_medmnist(tmp_path / "a.npz", **changed)
    with pytest.raises(StoreError, match=rf"is not a MedMNIST file \(.*{message}"):
        read_medmnist(path)


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "npy", "half"])
def test_another_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = small_medmnist(tmp_path / "a.npz")
    whole = path.read_bytes()
    path.unlink()
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(9))
    elif damage != "missing":
        path.write_bytes(
            {"empty": b"", "garbage": b"PK\x03\x04" * 99, "half": whole[: len(whole) // 2]}[damage]
        )
    with pytest.raises(StoreError, match="is not a MedMNIST file"):
        read_medmnist(path)


def test_a_header_that_declares_a_huge_array(tmp_path: Path) -> None:
    path = small_medmnist(tmp_path / "a.npz")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    before, after = members["val_images.npy"].split(b"(3, 4, 5, 6)")
    large = b"(10000000, 1000, 1000)"
    # Blanks pad the header to a fixed length.
    after = after.replace(b" " * (len(large) - len(b"(3, 4, 5, 6)")), b"", 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | {"val_images.npy": before + large + after}).items():
            archive.writestr(name, content)
    with pytest.raises(StoreError, match=r"val_images: declares 10000000000000 bytes"):
        read_medmnist(path)


def test_an_archive_that_unpacks_to_more_than_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own word; if that is a lie, no more is unpacked than it said."""
    path = small_medmnist(tmp_path / "a.npz")
    with monkeypatch.context() as little:
        little.setattr(medmnist, "usable_memory", lambda: 1000)
        with pytest.raises(StoreError, match="bytes, more than there is memory"):
            read_medmnist(path)
    content = path.read_bytes()
    # The central directory's entry of val_images has its unpacked size 22 bytes before its name.
    place = content.rindex(b"val_images.npy") - 22
    assert content[place : place + 4] == (128 + 3 * 4 * 5 * 6).to_bytes(4, "little")
    path.write_bytes(content[:place] + (200).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(
        StoreError, match=r"Bad CRC-32 for file|declares 360 bytes of values, holds 72"
    ):
        read_medmnist(path)
