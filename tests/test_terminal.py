"""Terminals with few characters, closed terminals, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, dist_train, environment
from make_media import write_manifest

from dist_train.data.store.build import PrepareSettings, prepare
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import MachineError
from dist_train.run.folder import only_session


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "command"), [("ascii", "info"), ("latin-1", "verify")])
def test_names_that_a_terminal_has_no_characters_for(
    tmp_path: Path, encoding: str, command: str
) -> None:
    """Including the progress bar of a terminal."""
    folder = tmp_path / "Gef\xe4\xdfe 血管"
    folder.mkdir()
    np.save(folder / "1.npy", np.zeros((4, 8, 8), np.uint8))
    text = "filename,label,group\n1.npy,0,血管\n"
    (folder / "clips.csv").write_text(text, encoding="utf-8")
    settings = PrepareSettings(roi="none")
    prepare(read_manifest(folder / "clips.csv"), folder, folder / "store", settings, workers=1)
    done = subprocess.run(
        dist_train(command, folder / "store"),
        env=environment(PYTHONIOENCODING=encoding, LC_ALL="C", TTY_COMPATIBLE="1"),
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert b"\\u8840\\u7ba1" in done.stdout


def no_locks(descriptor: object, how: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_file_locks_the_user_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The lock call is replaced, as a file system without locks cannot be made here."""
    np.save(tmp_path / "1.npy", np.zeros((4, 8, 8), np.uint8))
    manifest = write_manifest(tmp_path / "clips.csv", ["1.npy"], [1])
    settings = PrepareSettings(roi="none")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    told = r"cannot be locked \(No locks available\).*set DIST_TRAIN_NO_LOCKS=1"
    with pytest.raises(MachineError, match=told):
        prepare(manifest, tmp_path, tmp_path / "out", settings, workers=1)
    with pytest.raises(MachineError, match=told), only_session(tmp_path / "run"):
        pass
    monkeypatch.setenv("DIST_TRAIN_NO_LOCKS", "1")
    assert prepare(manifest, tmp_path, tmp_path / "out", settings, workers=1)["clips"] == 1
    with only_session(tmp_path / "run"):
        pass
    assert caplog.text.count("is not locked") == 2
