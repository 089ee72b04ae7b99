"""A clip table from names of files: every file becomes a row, or is told to be left out."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from helpers import ended, fails, said
from make_media import write_volumes

from dist_train.data.raw.folder_table import Pattern, folder_table, manifest_from_folders
from dist_train.data.store.reader import Store
from dist_train.data.table.labels import Naming
from dist_train.errors import ConfigError, ManifestError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def test_a_folder_of_classes_becomes_a_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw, table = tmp_path / "raw", tmp_path / "clips.csv"
    write_volumes(raw / "stalled", 2, seed=1)
    write_volumes(raw / "flowing" / "monday", 3, seed=2)
    write_volumes(raw / "unclear", 1, seed=3)
    printed = said("manifest", raw, "--out", table)
    assert printed.splitlines() == [
        "label: flowing (3), stalled (2), unclear (1)",
        f"6 clips in {table}",
    ]
    assert table.read_text().splitlines()[:2] == [
        "filename,label",
        "flowing/monday/clip000.npy,flowing",
    ]
    stores = []
    for name, source in (
        ("table", ("--manifest", table, "--source", raw)),
        ("folders", ("--from-folders", raw)),
    ):
        out = tmp_path / name
        said("prepare", *source, "--positive", "stalled", "--out", out, "--roi", "none")
        stores.append(Store(out))
    assert "positive clips are those of stalled (2)" in caplog.text
    assert "negative clips are those of flowing (3), unclear (1)" in caplog.text
    for store in stores:
        assert store.classes == {0: "flowing or unclear", 1: "stalled", -1: "unlabelled"}
        named = store.table.frame()["filename"].str.partition("/")[0]
        assert store.table["label"].tolist() == (named == "stalled").astype(int).tolist()
        assert store.table["meta:class"].tolist() == named.tolist()
    assert stores[0].content == stores[1].content
    assert "stalled" in said("info", tmp_path / "table")


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    touch(raw, "a/1.npy", "a/.2.npy", "b/3.npy", "b/brain.tar", "4.npy", "b/.git/5.npy")
    touch(raw, "b/6.png", "b/6.foo", "a/7.npy ")
    (raw / "a" / "empty.npy").write_bytes(b"")
    (raw / "a" / "gone.npy").symlink_to(raw / "nowhere")
    (raw / "a" / "copy.npy").symlink_to("1.npy")
    (raw / "a" / "same.npy").hardlink_to(raw / "a" / "1.npy")
    (raw / "a" / "loop").symlink_to(raw)
    os.mkfifo(raw / "a" / "pipe.npy")
    found = folder_table(raw)
    assert found.rows.to_dict("list") == {"filename": ["a/1.npy", "b/3.npy"], "label": ["a", "b"]}
    told = sorted(found.left_out())
    for line, start in zip(
        told,
        (
            "left out: 1 empty files, such as a/empty.npy",
            "left out: 1 files in no class folder, such as 4.npy",
            "left out: 1 files of an unknown kind '.foo', such as b/6.foo",
            "left out: 1 files of an unknown kind '.npy ', such as a/7.npy",
            "left out: 1 files of an unknown kind '.png' (--clip-folders makes one clip",
            "left out: 1 files of an unknown kind '.tar' (Unpack it",
            "left out: 1 links that lead nowhere, such as a/gone.npy",
            "left out: 1 links to folders, such as a/loop",
            "left out: 1 that are no plain files, such as a/pipe.npy",
            "left out: 2 hidden files and folders, such as a/.2.npy",
            "left out: 2 links to files that are listed already, such as a/copy.npy",
        ),
        strict=True,
    ):
        assert line.startswith(start)


def test_one_file_with_two_labels_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.npy", "b/2.npy")
    (tmp_path / "b" / "1.npy").hardlink_to(tmp_path / "a" / "1.npy")
    with pytest.raises(ManifestError, match=r"'a/1.npy' and 'b/1.npy' are one file, with the lab"):
        folder_table(tmp_path)


def test_a_pattern_names_columns(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "clips.csv"
    touch(raw, "m1/s_01.tif", "m1/f_02.tif", "m2/f_03.tif", "m2/notes.tif", "m2/deep/f_1.tif")
    printed = said(
        *("manifest", raw, "--out", out, "--pattern", "{group}/{label}_{number}.tif"),
        *("--label-names", "s=stalled,f=flowing"),
    )
    assert out.read_text().splitlines() == [
        "filename,label,group,number",
        "m1/f_02.tif,flowing,m1,02",
        "m1/s_01.tif,stalled,m1,01",
        "m2/f_03.tif,flowing,m2,03",
    ]
    assert "label: flowing (2), stalled (1)" in printed
    assert "group: m1 (2), m2 (1)" in printed
    assert "left out: 2 files that do not match the pattern, such as m2/deep/f_1.tif" in printed
    # The same table may be written again, and nothing else is replaced.
    said("manifest", raw, "--out", out, "--pattern", "{group}/{label}_{number}.tif",
         "--label-names", "s=stalled,f=flowing")  # fmt: skip
    message = fails("manifest", raw, "--out", out, "--pattern", "{group}/{label}_*.tif")
    assert "is there already. Remove it, or choose another --out" in message
    message = fails("manifest", raw, "--out", tmp_path / "b.csv", "--pattern", "{label}.avi")
    assert "there are no clips; left out: 5 files that do not match the pattern" in message


PATTERNS = {
    "{label}_*.tif": ("a_1.tif", {"label": "a"}),
    "**/{label}_*.tif": ("x/y/a_1.tif", {"label": "a"}),
    "**/{label}.tif": ("a.tif", {"label": "a"}),
    "{group}/**": ("m/x/y.tif", {"group": "m"}),
    "{group}/{group}-{n}.tif": ("m/m-3.tif", {"group": "m", "n": "3"}),
    "{m}_{label:stalled|flow_ok}_*": ("a_b_flow_ok_3.tif", {"m": "a_b", "label": "flow_ok"}),
    "a+(b)[{day of week}].tif": ("a+(b)[Mon].tif", {"day of week": "Mon"}),
    "./{label}/*": ("a/b", {"label": "a"}),
    "{label}/*.tif": ("a/b/c.tif", None),
    "{group}/{group}.tif ": ("m/n.tif", None),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_pattern_matches(pattern: str) -> None:
    path, values = PATTERNS[pattern]
    assert Pattern(pattern).match(path) == values


def test_a_name_that_fits_in_two_ways_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"two ways \(label 'a', n 'b_3'; or label 'a_b', n '3"):
        Pattern("{label}_{n}.tif").match("a_b_3.tif")
    with pytest.raises(ManifestError, match="two ways"):
        Pattern("*_{label:stalled|not_stalled}_*").match("m_not_stalled_3.tif")
    for pattern in ("{label", "label}", "{}", "{filename}.tif", "{a{b}}"):
        with pytest.raises(ConfigError, match="--pattern"):
            Pattern(pattern)


def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.npy", "Test/b/2.npy")
    with pytest.raises(ManifestError, match=r"each split \(test, train\).*\{split\}/\{label\}"):
        folder_table(tmp_path)
    rows = folder_table(tmp_path, pattern="{split}/{label}/**").rows
    assert rows["split"].tolist() == ["Test", "train"]
    assert list(rows) == ["filename", "label", "split"]


def test_a_folder_of_pictures_is_one_clip(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a/x/{i}.png" for i in range(3)), "a/x/.DS_Store", "a/x/Thumbs.db")
    touch(tmp_path, "b/y/IM1", "b/y/IM2", "b/z/1.pgm", "b/z/notes.txt", "b/c.npy", "a/w.zarr/0/0")
    touch(
        tmp_path,
        "b/s/1.2.3.4",
        "b/s/1.2.3.5",
        "b/s/DICOMDIR",
        "b/m/1.png",
        "b/m/2.bmp",
        "b/t/a.txt",
    )
    found = folder_table(tmp_path, clip_folders=True)
    assert found.rows["filename"].tolist() == ["a/w.zarr", "a/x", "b/c.npy", "b/s", "b/y", "b/z"]
    assert "clips that are folders: 5" in found.lines()
    assert folder_table(tmp_path).rows["filename"].tolist() == ["a/w.zarr", "b/c.npy"]
    # The folder of a class is no clip.
    touch(tmp_path / "other", "a/1.png", "b/2.npy")
    found = folder_table(tmp_path / "other", clip_folders=True)
    assert found.rows["filename"].tolist() == ["b/2.npy"]


def test_classes_are_asked_for_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = tmp_path / "raw"
    for name in ("stalled", "flowing", "unclear"):
        write_volumes(raw / name, 1)
    options = ("prepare", "--from-folders", raw, "--out", tmp_path / "store", "--roi", "none")
    _, _, err = ended(*options, "--positive", "stalls")
    assert "there is no class 'stalls' (--positive). Did you mean 'stalled'?" in err
    positive = [part for name in ("stalled", "flowing", "unclear") for part in ("--positive", name)]
    assert "there are no negative clips" in ended(*options, *positive)[2]
    assert not (tmp_path / "store").exists()
    # Without it each folder is a class.
    assert ended(*options)[0] == 0
    assert Store(tmp_path / "store").classes[2] == "unclear"


def test_a_folder_that_cannot_be_listed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "flowing/a.npy", "stalled/b.npy")
    scan = os.scandir

    def refusing(folder: str) -> object:
        # Root may look into any folder.
        if str(folder).endswith("flowing"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="flowing"):
        folder_table(tmp_path)


def test_a_class_folder_of_any_name(tmp_path: Path) -> None:
    for name in ("none", "NA", "null", "-", "stalled"):
        touch(tmp_path, f"{name}/a.npy")
    manifest = manifest_from_folders(tmp_path, Naming(("stalled",)))
    assert sorted(manifest.table["label"]) == [0, 0, 0, 0, 1]
    manifest = manifest_from_folders(tmp_path, Naming(("none",)))
    assert manifest.classes[1] == "none"


def test_names_for_labels_that_the_pattern_lacks(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.npy")
    with pytest.raises(ConfigError, match=r"has no \{label\}"):
        folder_table(tmp_path, pattern="{group}/*.npy", names={"x": "y"})
