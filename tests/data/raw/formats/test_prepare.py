"""Files of these formats, arrays in them and folders, through ``prepare``."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import SimpleITK
from make_media import write_manifest

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.store.reader import Store


def test_clips_of_all_kinds_in_one_store(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "scan").mkdir(parents=True)
    clips = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 7), np.uint8)
    with h5py.File(raw / "a.h5", "w") as file:
        file["t0/raw"], file["t1/raw"] = clips[:2]
    for name, clip in zip(("b.nii.gz", "c.mha"), clips[2:], strict=False):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(clip), str(raw / name))
    for number, picture in enumerate(clips[4]):
        image = SimpleITK.GetImageFromArray(picture)
        image.SetMetaData("0020|000e", "1.2.3")
        image.SetMetaData("0020|0013", str(number))
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(raw / "scan" / f"{9 - number}.dcm"))
        writer.Execute(image)
    names = ["a.h5::t0/raw", "a.h5::t1/raw", "b.nii.gz", "c.mha", "scan"]
    manifest = write_manifest(tmp_path / "clips.csv", names)
    prepare(manifest, raw, tmp_path / "store", PrepareSettings(roi="none"), workers=1)
    store = Store(tmp_path / "store")
    assert sorted(store.table["filename"]) == sorted(names)
    for number, name in enumerate(store.table["filename"]):
        np.testing.assert_array_equal(store.read(number), clips[names.index(name)])
