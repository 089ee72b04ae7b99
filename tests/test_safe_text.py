"""Untrusted names and messages never reach a terminal or spreadsheet as commands."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import fails, said, tiny_store

from dist_train.data.store.build import prepare_npz
from dist_train.data.store.build_spec import read_job
from dist_train.data.store.reader import REJECTED
from dist_train.data.store.rejects import read_rejects
from dist_train.data.store.verify import verify
from dist_train.errors import ManifestError
from dist_train.safe_text import for_spreadsheet, printable, without_content


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain M\u00e4us 1.mp4", "plain M\u00e4us 1.mp4"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\nerror: b", "a\\nerror: b"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("\udcff", "\\udcff"),
        ("\x9b31m", "\\x9b31m"),
    ],
)
def test_what_cannot_be_seen_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_a_spreadsheet_would_compute() -> None:
    texts = ["=cmd|' /C calc'!A0", "+1", "-1.mp4", "@SUM(1)", "\t=1", "a=1"]
    safe = ["'=cmd|' /C calc'!A0", "'+1", "'-1.mp4", "'@SUM(1)", "'\\t=1", "a=1"]
    assert [for_spreadsheet(text) for text in texts] == safe


def test_messages_keep_their_own_words() -> None:
    own = "unknown kind of file '.dcm'. Convert it, as by pydicom's pixel_array and what else, 'x'."
    assert without_content(own) == own
    secret = "the secret that stood at the head of the file"
    for quoted in (repr(secret.encode()), repr(secret), f'"{secret}"'):
        told = without_content(f"cannot be read (bad header: {quoted}, 3). Mend it.")
        assert "secret" not in told
        assert told.startswith("cannot be read (bad header: ")
        assert told.endswith(", 3). Mend it.")


def test_hostile_names_through_the_command_line(tmp_path: Path) -> None:
    names = ["=cmd|calc.npy", "\x1b[31mred.npy", "good.npy", "better.npy"]
    raw, out, table = tmp_path / "raw", tmp_path / "store", tmp_path / "clips.csv"
    raw.mkdir()
    for name in names[:2]:
        (raw / name).write_bytes(b"SECRET and more")
    for number, name in enumerate(names[2:]):
        np.save(raw / name, np.full((2, 4, 4), number, np.uint8))
    rows = [f"{name},{i % 2},\x1b[2Jgroup" for i, name in enumerate(names)]
    table.write_text("\n".join(["filename,label,group", *rows]) + "\n")
    arguments = ["prepare", "--manifest", table, "--source", raw, "--out", out, "--roi", "none"]
    failed = fails(*arguments)
    assert "=cmd|calc.npy" in failed.partition("the first: ")[2]
    said(*arguments, "--max-rejected", "50%")
    rejects = pd.read_csv(out / REJECTED)
    assert rejects["file"].tolist() == ["'=cmd|calc.npy", "\\x1b[31mred.npy"]
    assert "SECRET" not in (out / REJECTED).read_text()
    # The shards' own lists have the real names, so that the files can be found.
    assert read_rejects(read_job(out).shards(out)[0].rejects_path)["file"].tolist() == names[:2]
    assert verify(out) == []
    assert "\\x1b[2Jgroup" in said("info", out)
    missing = fails("info", f"{tmp_path}/\x1b[31m\udcff")
    assert "\\x1b[31m\\udcff: there is no store here" in missing
    assert "\x1b" not in failed + missing


def test_names_that_are_no_text_end_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (os.fsencode("stalled/") + b"\xff.npy", b"flowing/a.npy"):
        path = tmp_path / "raw" / os.fsdecode(name)
        path.parent.mkdir(parents=True)
        np.save(path, np.zeros((2, 4, 4), np.uint8))
    (tmp_path / "clips.csv").write_bytes(b"filename,label\n\xff.npy,1\n")
    to = ("--out", tmp_path / "store", "--roi", "none")
    folders = ("--from-folders", tmp_path / "raw", "--positive", "stalled")
    assert "not UTF-8" in fails("prepare", *folders, *to)
    # A table may come from an old program; its name in UTF-8 is another.
    table = ("--manifest", tmp_path / "clips.csv", "--source", tmp_path / "raw")
    assert "the file is missing" in fails("prepare", *table, *to)
    assert "is not UTF-8, and is read as Windows-1252" in caplog.text
    assert not (tmp_path / "store").exists()


def test_a_store_in_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    store = tiny_store(folder / "store")
    assert "/store is whole" in said("verify", store, "--workers", 1)
    (folder / "store.npz").rename(folder / os.fsdecode(b"\xff.npz"))
    with pytest.raises(ManifestError, match="the name of a file is not UTF-8"):
        prepare_npz(folder / os.fsdecode(b"\xff.npz"), tmp_path / "other")
