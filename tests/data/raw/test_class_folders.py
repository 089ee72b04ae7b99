"""A folder for each class: every file becomes a row, or is told to be left out."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from helpers import said
from make_media import write_volumes

from dist_train.data.raw.class_folders import manifest_from_folders
from dist_train.data.store.reader import Store
from dist_train.errors import ManifestError


def test_every_file_is_stored_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    write_volumes(raw / "stalled", 2, seed=1)
    write_volumes(raw / "flowing" / "monday", 3, seed=2)
    write_volumes(raw / "unclear", 1, seed=3)
    # Left out: a file beside the classes, a link to a folder, a file of another kind.
    write_volumes(raw, 1, seed=4)
    (raw / "stalled" / "tuesday").symlink_to(raw / "unclear")
    (raw / "flowing" / "brain.nii.gz").write_text("x")
    (raw / "stalled" / ".hidden.npy").write_text("x")
    options = ("--from-folders", raw, "--out", tmp_path / "store", "--roi", "none")
    assert "6 clips in" in said("prepare", *options, "--positive", "stalled")
    assert "positive clips are those of stalled (2)" in caplog.text
    assert "negative clips are those of flowing (3), unclear (1)" in caplog.text
    assert "3 files and links are left out" in caplog.text
    table = Store(tmp_path / "store").table.frame()
    assert table["label"].tolist() == [int(name[0] == "s") for name in table["filename"]]

    (raw / "clip000.npy").unlink()
    with pytest.raises(ManifestError, match=r"no folder 'stalls'. Did you mean 'stalled'?"):
        manifest_from_folders(raw, ["stalls"])
    with pytest.raises(ManifestError, match="there are no negative clips"):
        manifest_from_folders(raw, ["stalled", "flowing", "unclear"])
    assert "The first is flowing/brain.nii.gz. Convert it to uint8 or uint16" in caplog.text
    scan = os.scandir

    def refusing(folder: str) -> object:
        # Root may look into any folder.
        if str(folder).endswith("flowing"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="flowing"):
        manifest_from_folders(raw, ["stalled"])
