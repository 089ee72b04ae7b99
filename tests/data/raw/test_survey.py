"""Bits in use, black and white, and channels are the same for all files of a set."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import nibabel
import numpy as np
import pytest
import tifffile
from helpers import contents, said
from make_media import write_manifest, write_video

from dist_train.data.raw.axes import plain_stack
from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.raw.grey import depth_of
from dist_train.data.raw.intensity import Intensity
from dist_train.data.raw.outside_reader import OutsideReader
from dist_train.data.raw.source import LocalFolder
from dist_train.data.raw.stack import RGB, Choices, Stack
from dist_train.data.raw.survey import survey, survey_arrays
from dist_train.data.store.build import finalize, prepare, prepare_part
from dist_train.data.store.build_spec import Part
from dist_train.data.store.reader import Store
from dist_train.errors import StoreError
from dist_train.system.supervised_pool import UNWATCHED

WHOLE = PrepareSettings(roi="none", shard_clips=2)
RAMP = (np.arange(8 * 64 * 64) % 4096).astype("u2").reshape(8, 64, 64)


def gray16(path: Path, values: np.ndarray) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=20)
        stream.height, stream.width, stream.pix_fmt = *values.shape[1:], "gray16le"
        for picture in values:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray16le")))
        output.mux(stream.encode())


def save(path: Path, values: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez_compressed(path, values)
    elif path.suffix == ".mkv":
        gray16(path, values)
    else:
        tifffile.imwrite(path, values, photometric="minisblack")


def surveyed(folder: Path, names: list[str], settings: PrepareSettings = WHOLE) -> PrepareSettings:
    def run(function: Any, items: Any, without: Any) -> Any:
        return (function(item, UNWATCHED) for item in items)

    return survey(LocalFolder(folder), names, settings, run)


def stored(store: Path) -> dict[str, np.ndarray]:
    opened = Store(store)
    return {name: opened.read(i) for i, name in enumerate(opened.table["filename"])}


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tif", ".mkv"])
def test_twelve_bits_span_the_whole_range(tmp_path: Path, suffix: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, values in {"a": RAMP, "b": RAMP // 2}.items():
        save(raw / f"{name}{suffix}", values)
    manifest = write_manifest(tmp_path / "t.csv", [f"a{suffix}", f"b{suffix}"])
    prepare(manifest, raw, out := tmp_path / "s", WHOLE)
    assert json.loads((out / "job.json").read_text())["settings"]["bits"] == 12
    clips = stored(out)
    assert (clips[f"a{suffix}"].min(), clips[f"a{suffix}"].max()) == (0, 255)
    # Equal values give equal grey in all files.
    np.testing.assert_array_equal(clips[f"b{suffix}"], RAMP // 2 >> 4)


@pytest.mark.parametrize(
    ("largest", "bits"), [(0, 8), (255, 8), (256, 10), (1024, 12), (4096, 14), (65535, 16)]
)
def test_rounded_up_to_what_cameras_have(largest: int, bits: int) -> None:
    assert depth_of(largest) == bits


@pytest.mark.parametrize(("declared", "bits"), [(12, 12), (16, 10)])
def test_depth_by_metadata(tmp_path: Path, declared: int, bits: int) -> None:
    """Writers that do not know it declare 16."""
    metadata = {"axes": "ZYX", "SignificantBits": declared}
    tifffile.imwrite(tmp_path / "a.ome.tif", RAMP // 4, ome=True, metadata=metadata)
    assert surveyed(tmp_path, ["a.ome.tif"]).bits == bits


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    raw = tmp_path / "raw"
    raw.mkdir()
    for number, top in enumerate([9, 600, 4000, 70, 90]):
        np.save(raw / f"{number}.npy", (RAMP[:2] % (top + 1)).astype("u2"))
    np.save(raw / "5.npy", np.full((2, 5, 6), 200, np.uint8))
    return raw


def test_workers_and_parts_agree(tmp_path: Path, mixed: Path) -> None:
    manifest = write_manifest(tmp_path / "t.csv", [f"{i}.npy" for i in range(6)])
    prepare(manifest, mixed, tmp_path / "one", WHOLE, workers=1)
    prepare(manifest, mixed, tmp_path / "two", WHOLE, workers=2)
    for number in (1, 2):
        prepare_part(manifest, mixed, tmp_path / "parts", WHOLE, Part(number, 2))
    finalize(tmp_path / "parts")
    one, two, parts = (
        {name: data for name, data in contents(tmp_path / store).items() if ".lock" not in name}
        for store in ("one", "two", "parts")
    )
    assert one == two == parts


def test_few_levels_are_reported_and_more_bits_refused(tmp_path: Path, mixed: Path) -> None:
    manifest = tmp_path / "t.csv"
    write_manifest(manifest, [f"{i}.npy" for i in range(6)])
    common = ("prepare", "--manifest", manifest, "--source", mixed, "--roi", "none")
    printed = said(*common, "--out", tmp_path / "s")
    # 0 to 9, 0 to 70 and 0 to 90 of 4096. The uint8 file loses nothing.
    assert "fewer than 16 grey levels: 4 clips (the least: 1)" in printed
    printed = said(*common, "--out", tmp_path / "ten", "--bits", 10, "--max-rejected", "50%")
    assert "rejected: 1" in printed
    reasons = (tmp_path / "ten" / "rejected.csv").read_text().splitlines()
    assert reasons[1].startswith('2.npy,"holds the value 4000, and 10 bits end at 1023.')
    assert "--bits 12" in reasons[1]
    np.testing.assert_array_equal(stored(tmp_path / "ten")["1.npy"], RAMP[:2] % 601 >> 2)


def test_depth_of_files_that_are_not_all_here(tmp_path: Path, mixed: Path) -> None:
    manifest = write_manifest(tmp_path / "t.csv", [f"{i}.npy" for i in range(6)])
    (mixed / "2.npy").unlink()
    with pytest.raises(StoreError, match=r"1 of them are not here\. Say them with --bits"):
        prepare_part(manifest, mixed, tmp_path / "s", WHOLE, Part(1, 2))


def test_a_later_file_beyond_the_depth_is_rejected(tmp_path: Path, mixed: Path) -> None:
    manifest = write_manifest(tmp_path / "t.csv", [f"{i}.npy" for i in range(6)])
    (mixed / "5.npy").write_bytes(b"damaged")
    prepare(manifest, mixed, tmp_path / "s", WHOLE, max_rejected=0.5)
    np.save(mixed / "5.npy", np.full((2, 5, 6), 5000, np.uint16))
    prepare(manifest, mixed, tmp_path / "s", WHOLE, max_rejected=0.5)
    assert '5.npy,"holds the value 5000' in (tmp_path / "s" / "rejected.csv").read_text()


def test_sixteen_bits_in_mp4_need_to_be_told(tmp_path: Path) -> None:
    gray16(tmp_path / "a.mp4", RAMP[:2])
    manifest = write_manifest(tmp_path / "t.csv", ["a.mp4"])
    with pytest.raises(StoreError, match=r"is not known\. Prepare with --bits, such as"):
        prepare(manifest, tmp_path, tmp_path / "s", WHOLE)


def test_volumes_in_memory() -> None:
    others = [np.full((1, 2, 2), 30000, kind) for kind in ("i2", "f4")]
    assert survey_arrays(others, WHOLE) == WHOLE
    assert survey_arrays([*others, RAMP], WHOLE).bits == 12


@dataclass(frozen=True)
class ScaledReader(OutsideReader):
    """Reads .npy files of floats as 12-bit values, without an import."""

    def read(self, path: Path, choices: Choices) -> Stack:
        return plain_stack((np.load(path) * 4095).astype("u2"))


def test_a_reader_decides_on_its_own_suffixes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.linspace(0, 1, 64, dtype=np.float32).reshape(4, 4, 4))
    reader = ScaledReader("mylab:read", (".npy",), None, "")

    assert surveyed(tmp_path, ["a.npy"]).bits is None
    assert surveyed(tmp_path, ["a.npy"], replace(WHOLE, reader=reader)).bits == 12


def test_channels_and_percentiles_of_video(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(50, 99, (4, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "a.avi", frames, codec="rawvideo", pix_fmt="bgr24")
    settings = replace(
        WHOLE, choices=Choices(channels="rgb"), intensity=Intensity("percentile", 0.0, 100.0)
    )
    found = surveyed(tmp_path, ["a.avi"], settings)
    assert found.channel_names == RGB
    assert (found.black, found.white) == ((50.0,) * 3, (98.0,) * 3)


def test_a_volume_among_outlined_videos_ends_no_survey(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RAMP)
    assert surveyed(tmp_path, ["a.npy"], PrepareSettings()) == PrepareSettings()


def test_the_window_counts_if_every_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of files whose values are not sampled."""
    monkeypatch.setattr("dist_train.data.raw.survey.FILES", 1)
    for number, window in enumerate([(-100.0, 300.0), (-100.0, 300.0), (0.0, 99.0)]):
        image = nibabel.Nifti1Image((RAMP - 999).astype("i2"), np.eye(4))
        image.header["cal_min"], image.header["cal_max"] = window
        nibabel.save(image, tmp_path / f"{number}.nii")
    same = surveyed(tmp_path, ["0.nii", "1.nii"])
    assert (same.black, same.white) == ((-100.0,), (300.0,))
    other = surveyed(tmp_path, ["0.nii", "1.nii", "2.nii"])
    assert other.white != (300.0,)


def test_percentiles_of_16_bit_video(tmp_path: Path) -> None:
    gray16(tmp_path / "a.mkv", RAMP[:2] // 4 + 512)
    gray16(tmp_path / "b.mkv", RAMP[:2])
    settings = replace(WHOLE, intensity=Intensity("percentile", 0.0, 100.0))
    found = surveyed(tmp_path, ["a.mkv", "b.mkv"], settings)
    assert found.bits == 12
    assert (found.black, found.white) == ((0.0,), (255.0,))
    one = surveyed(tmp_path, ["a.mkv"], replace(settings, store_dtype="uint16"))
    assert one.bits == 12
    over = replace(WHOLE, intensity=Intensity(over="clip"))
    assert surveyed(tmp_path, ["a.mkv", "b.mkv"], over).bits == 12


def test_only_sampled_files_are_read_for_percentiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.data.raw.survey.FILES", 2)
    names = [f"{number}.npy" for number in range(5)]
    for number, name in enumerate(names):
        np.save(tmp_path / name, RAMP[:1] * 0 + number)
    read = []
    fetched = LocalFolder.fetched
    monkeypatch.setattr(
        LocalFolder, "fetched", lambda self, name: read.append(name) or fetched(self, name)
    )
    settings = replace(WHOLE, intensity=Intensity("percentile", 0.0, 100.0))
    found = surveyed(tmp_path, names, settings)
    assert read == ["0.npy", "4.npy"]
    assert (found.black, found.white) == ((0.0,), (4.0,))


def test_channels_that_no_file_tells(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"damaged")
    settings = replace(WHOLE, choices=Choices(channels="all"))
    with pytest.raises(StoreError, match="no file of the first 64 could be read"):
        surveyed(tmp_path, ["a.npy"], settings)
