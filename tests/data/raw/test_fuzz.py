"""Damaged files through `prepare`: each is stored or rejected, in bounded time and memory."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import psutil
import pytest
import SimpleITK
import tifffile
from helpers import ROOT, dist_train, environment
from lif_writer import image, write_lif
from make_media import grey_frames, outlined_frames, write_video
from nd2_writer import write_nd2
from PIL import Image
from pylibCZIrw import czi
from scipy.io import savemat
from zarr_writer import write_array

from dist_train.data.raw.outline import Box
from dist_train.data.store.reader import REJECTED, Store
from dist_train.data.store.verify import verify

CLIP_MEMORY = 256
Change = Callable[[bytes, np.random.Generator], bytes]


def sound_files(folder: Path) -> list[Path]:
    """A small file of every kind."""
    folder.mkdir()
    frames = outlined_frames([Box(20, 30, 70, 84)] * 6)
    grey = grey_frames(6, 40, 48)
    files = [
        write_video(folder / "h264.mp4", frames),
        write_video(folder / "faststart.mp4", frames, container_options={"movflags": "faststart"}),
        write_video(folder / "mpeg4.avi", grey, codec="mpeg4"),
        write_video(folder / "h264.mov", grey),
        write_video(folder / "h264.mkv", grey),
        write_video(folder / "vp9.webm", grey, codec="libvpx-vp9"),
        write_video(folder / "a.gif", grey, codec="gif", pix_fmt="rgb8"),
        write_video(folder / "mjpeg.avi", grey, codec="mjpeg", pix_fmt="yuvj420p"),
    ]
    for suffix in ("png", "webp"):
        first, *more = map(Image.fromarray, grey)
        first.save(folder / f"a.{suffix}", save_all=True, append_images=more, duration=40)
        files.append(folder / f"a.{suffix}")
    volume = np.random.default_rng(0).integers(0, 256, (6, 20, 24), np.uint8)
    np.save(folder / "v.npy", volume)
    np.savez_compressed(folder / "v.npz", volume)
    tifffile.imwrite(folder / "v.tif", volume, photometric="minisblack")
    tifffile.imwrite(folder / "z.tif", volume, photometric="minisblack", compression="zlib")
    tifffile.imwrite(folder / "w.tif", volume.astype(np.uint16) * 257, photometric="minisblack")
    write_nd2(folder / "v.nd2", volume[..., None], [("Z", 6)])
    write_nd2(folder / "z.nd2", volume[..., None], [("Z", 6)], compressed=True)
    write_lif(folder / "v.lif", {"a": (image("a", "a", volume, "ZYX"), volume)})
    write_czi(folder / "v.czi", volume)
    write_array(folder / "a", volume, packed=True)
    shutil.make_archive(str(folder / "v.zarr"), "zip", folder / "a")
    shutil.rmtree(folder / "a")
    medical_files(folder, volume)
    return sorted({*files, *folder.iterdir()})


def write_czi(path: Path, volume: np.ndarray) -> None:
    with czi.create_czi(str(path), compression_options="zstd1:") as writer:
        for z, picture in enumerate(volume):
            writer.write(picture[..., None], plane={"Z": z})


def medical_files(folder: Path, volume: np.ndarray) -> None:
    """By ITK, HDF5 and MATLAB's older form."""
    names = ("v.nii", "v.nii.gz", "v.nrrd", "v.mha", "v.dcm")
    for name in names:
        image = SimpleITK.GetImageFromArray(volume)
        SimpleITK.WriteImage(image, str(folder / name), name in ("v.nrrd", "v.mha"))
    with h5py.File(folder / "v.h5", "w") as file:
        file.create_dataset("volume", data=volume, compression=4)
    savemat(folder / "v.mat", {"volume": volume})


def flip_bits(content: bytes, rng: np.random.Generator) -> bytes:
    """In the header, or anywhere."""
    damaged = bytearray(content)
    for place in rng.integers(0, rng.choice([256, len(content)]), rng.integers(1, 9)):
        damaged[place] ^= 1 << rng.integers(8)
    return bytes(damaged)


def truncate(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def overwrite(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    noise = rng.bytes(int(rng.integers(1, 200)))
    return content[:start] + noise + content[start + len(noise) :]


def repeat_a_part(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(int(place) for place in rng.integers(0, len(content), 2))
    return content[:end] + content[start:end] * int(rng.integers(1, 4)) + content[end:]


def huge_numbers(content: bytes, rng: np.random.Generator) -> bytes:
    """Write large numbers into fields of 16 and 32 bits of the header."""
    damaged = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        number = rng.choice([b"\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\1\0"])
        start = int(rng.integers(0, min(len(content), 800) - len(number)))
        damaged[start : start + len(number)] = number
    return bytes(damaged)


CHANGES = (flip_bits, truncate, overwrite, repeat_a_part, huge_numbers)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("files", [300, pytest.param(2_000, marks=pytest.mark.soak)])
def test_mutated_files(tmp_path: Path, files: int) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    rng = np.random.default_rng(11)
    sound = sound_files(tmp_path / "sound")
    names: list[str] = []
    for number in range(files):
        path = sound[number % len(sound)]
        change = CHANGES[number // len(sound) % len(CHANGES)]
        names.append(f"m{number:04d}-{change.__name__}{''.join(path.suffixes)}")
        (raw / names[-1]).write_bytes(change(path.read_bytes(), rng))
    rows = "".join(f"{name},{number % 2}\n" for number, name in enumerate(names))
    (raw / "clips.csv").write_text(f"filename,label\n{rows}")

    store = tmp_path / "store"
    command = dist_train(
        *("prepare", "--manifest", raw / "clips.csv", "--source", raw, "--out", store),
        *("--roi", "none", "--max-rejected", "100%", "--workers", 2),
        *("--clip-memory", CLIP_MEMORY, "--clip-seconds", 20, "--truncated", "keep"),
    )
    peak = peak_of_a_worker(command, tmp_path / "stderr")

    # The process's own memory comes on top of what a clip may take.
    assert peak < (CLIP_MEMORY + 300) << 20
    rejected = pd.read_csv(store / REJECTED, dtype=str, keep_default_na=False)
    stored = Store(store).table.frame()
    assert sorted([*rejected["file"], *stored["filename"]]) == sorted(names)
    assert (rejected["reason"].str.len() > 10).all()
    # Some survive a flipped bit, and most do not survive a lost end.
    assert 0.1 * files < len(rejected) < 0.95 * files
    assert verify(store) == []
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "sound", "store", "stderr"}


def peak_of_a_worker(command: list[str], errors: Path) -> int:
    """Run it to its end; the greatest resident memory of one of its processes, in bytes."""
    peak, deadline = 0, time.monotonic() + 240
    with errors.open("wb") as output:
        process = psutil.Popen(
            command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=output
        )
        while process.poll() is None:
            assert time.monotonic() < deadline, "it hangs"
            for child in process.children(recursive=True):
                try:
                    peak = max(peak, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.01)
    assert process.returncode == 0, errors.read_text(errors="replace")
    return peak
