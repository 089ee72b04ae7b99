"""Bad input through the command line: one line that says what, where and what to do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import dist_train, fails, overrides, run, said, tiny_npz

from dist_train import cli
from dist_train.data.store.reader import Store
from dist_train.errors import StoreError


def video(path: Path, *, outlined: bool = True) -> Path:
    """Twelve frames of 64x64: grey, with the outline of a square, orange as the challenge's."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(12):
            frame = np.full((64, 64, 3), 60 + 5 * number, np.uint8)
            if outlined:
                frame[12:52, 12:52] = (255, 80, 0)
                frame[16:48, 16:48] = 60 + 5 * number
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def prepare(folder: Path, csv: str, *more: object) -> list[object]:
    (folder / "clips.csv").write_text(csv)
    return [
        "prepare", "--manifest", folder / "clips.csv", "--source", folder,
        "--out", folder / "store", "--workers", 1, *more,
    ]  # fmt: skip


# The process itself.


def test_help_answers() -> None:
    done = run(dist_train("--help"))
    assert done.returncode == 0
    for command in ("prepare", "train", "predict", "evaluate", "report"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train", "--resume", "always"],
        ["prepare"],
        ["predict", "run", "--prior", "2"],
        ["info"],
        ["train", "--confg", "x"],
    ],
)
def test_a_usage_error_exits_with_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dist-train", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "Usage: " in capsys.readouterr().err


def test_a_users_error_is_one_line_on_stderr(store: Path, tmp_path: Path) -> None:
    """The whole process: nothing that libraries print comes with it."""
    done = run(dist_train("train", *overrides(store, tmp_path / "run", "plan.bach=8")))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: command line: unknown setting 'plan.bach'. Did you mean 'plan.batch'?\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_missing_store_is_one_line_on_stderr(tmp_path: Path) -> None:
    """As above, after torch and Accelerate are up."""
    done = run(dist_train("train", *overrides(tmp_path / "none", tmp_path / "run")))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'none'}: there is no store here. ")
    assert not (tmp_path / "run").exists()


# train


def test_a_missing_config_file(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert fails("train", "--config", path) == f"{path}: cannot be read (No such file or directory)"


def test_an_unfinished_store(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    (tmp_path / "store" / "store.json").unlink()
    message = fails("train", *overrides(tmp_path / "store", tmp_path / "run"))
    assert message.startswith(f"{tmp_path / 'store'}: the store is not finished. Run 'dist-train")


def test_a_damaged_store(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    (shard,) = (tmp_path / "store" / "shards").glob("*.tar")
    content = np.fromfile(shard, np.uint8)
    content[1000:] ^= 1
    content.tofile(shard)
    message = fails("train", *overrides(tmp_path / "store", tmp_path / "run"))
    assert message.startswith(f"{shard}: clip '")
    assert "the bytes are not those that were stored" in message


def test_a_selection_without_positives(tmp_path: Path) -> None:
    path = tiny_npz(tmp_path / "a.npz")
    with np.load(path) as arrays:
        blank = {k: v * 0 if k.endswith("labels") else v for k, v in arrays.items()}
    np.savez(path, **blank)
    cli.prepare_npz(path, tmp_path / "store")
    message = fails("train", *overrides(tmp_path / "store", tmp_path / "run"))
    assert message.startswith("the selection holds no positives (60 clips of 60 selected)")


@pytest.mark.parametrize("setting", ["plan.batch=12", "train.accumulate=3"])
def test_a_batch_that_cannot_be_cut(store: Path, tmp_path: Path, setting: str) -> None:
    more = [setting, "train.accumulate=2"] if "batch" in setting else [setting]
    message = fails("train", *overrides(store, tmp_path / "run", *more))
    assert message.startswith("plan.batch ")
    assert "cannot be cut into 1 processes" in message
    assert not (tmp_path / "run").exists()


def test_an_unknown_model(store: Path, tmp_path: Path) -> None:
    message = fails("train", *overrides(store, tmp_path / "run", "model.name=resnet3d-11"))
    assert message.startswith("there is no model 'resnet3d-11'. Did you mean 'resnet3d-101'?")


def test_an_existing_run_without_resume(store: Path, trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    message = fails("train", *overrides(store, trained, "train.epochs=1", "snapshots.at=[1]"))
    assert message.startswith(f"{trained}: the folder holds a run already (config.yaml, ")
    assert "--resume auto" in message
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_run_folder_that_cannot_be_made(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = fails("train", *overrides(store, tmp_path / "file" / "run"))
    assert message == f"{tmp_path / 'file' / 'run'}: Not a directory"


# predict, evaluate, report, info


def test_a_missing_run(tmp_path: Path) -> None:
    for command in ("predict", "report"):
        assert fails(command, tmp_path).startswith(f"{tmp_path}: there is no run here. ")
    message = fails("evaluate", tmp_path)
    assert message.startswith(f"{tmp_path / 'predictions.csv'}: there are no predictions. ")
    assert not list(tmp_path.iterdir())


def test_a_run_without_snapshots(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "snapshots")
    message = fails("predict", tmp_path / "run")
    assert message.startswith(f"{tmp_path / 'run'}: the run has no snapshot yet. ")
    assert not (tmp_path / "run" / "predictions.csv").exists()


def test_a_run_without_its_record(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    message = fails("predict", tmp_path / "run")
    assert message.startswith(f"{tmp_path / 'run' / 'run.json'}: the record of the run cannot be")
    assert not (tmp_path / "run" / "predictions.csv").exists()


def test_an_export_that_cannot_be(trained: Path, tmp_path: Path) -> None:
    message = fails("export", trained, "--out", tmp_path / "x", "--step", 999)
    assert message.startswith(f"{trained}: the run has no weights of step 999. There are those of ")
    message = fails("export", tmp_path, "--out", tmp_path / "x")
    assert message.startswith(f"{tmp_path}: there is no run here. ")
    (tmp_path / "file").write_text("mine")
    message = fails("export", trained, "--out", tmp_path / "file" / "x")
    assert message == f"{tmp_path / 'file'}: File exists"
    assert not (tmp_path / "x").exists()


def test_info_of_no_store(tmp_path: Path) -> None:
    assert fails("info", tmp_path).startswith(f"{tmp_path}: there is no store here. ")


def test_info_of_names_that_look_like_markup(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "[" / "red]:smile:"
    shutil.copytree(store, folder)
    # A long title is wrapped.
    assert str(folder) in said("info", folder).replace("\n", "")


FULL_DISK = """
import resource, signal, sys
from dist_train.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for command in ("predict", "report"):
    sys.argv[1:] = [command, sys.argv[-1]]
    try:
        main()
    except SystemExit as error:
        print("exit", error.code)
"""


def test_a_full_disk(trained: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: writes fail in the same way, naming no file."""
    shutil.copytree(trained, tmp_path / "run")
    before = {path: path.stat().st_size for path in (tmp_path / "run").iterdir()}
    done = run([sys.executable, "-c", FULL_DISK, str(tmp_path / "run")])
    assert done.stdout.count("exit 1\n") == 2, done.stderr
    lines = done.stderr.splitlines()
    for line, written in zip(lines, ("predictions.csv", "report.html"), strict=True):
        assert line.startswith(
            f"error: {tmp_path / 'run' / written}: File too large. "
            "Make room and run the command again"
        )
    assert {path: path.stat().st_size for path in (tmp_path / "run").iterdir()} == before


# prepare


@pytest.mark.parametrize(
    ("csv", "part"),
    [
        ("filename,label\na.mp4,0\na.mp4,1\n", "'a.mp4' is listed twice (lines 2 and 3)"),
        ("filename,label\na.mp4,0\n./a.mp4,1\n", "'a.mp4' is listed twice (lines 2 and 3)"),
        ("filename,label\na.mp4,2\n", "label of 'a.mp4' is '2', not 0 or 1"),
        ("filename,label\na.mp4,-1\n", "label of 'a.mp4' is '-1', not 0 or 1"),
        ("filename,label,wieght\na.mp4,0,x\n", "unknown column 'wieght'. Did you mean"),
        ("filename\na.mp4\n", "has no 'label' or 'stalled' column"),
        ("filename,label\n", "has no rows"),
        ("", "is empty"),
    ],
    ids=[
        "duplicate",
        "same file",
        "label 2",
        "label -1",
        "unknown column",
        "no labels",
        "no rows",
        "empty",
    ],
)
def test_a_bad_manifest(tmp_path: Path, csv: str, part: str) -> None:
    video(tmp_path / "a.mp4")
    message = fails(*prepare(tmp_path, csv))
    assert message.startswith(f"{tmp_path / 'clips.csv'}: ")
    assert part in message
    assert not (tmp_path / "store").exists()


def test_a_missing_manifest(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    message = fails("prepare", "--manifest", path, "--source", tmp_path, "--out", tmp_path / "s")
    assert message == f"{path}: cannot be read (No such file or directory)"


def test_a_missing_video(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    message = fails(*prepare(tmp_path, "filename,label\na.mp4,0\nb.mp4,1\n"))
    assert message.startswith(f"{tmp_path / 'b.mp4'}: the file is missing")
    assert not (tmp_path / "store").exists()


def no_outline(path: Path) -> None:
    video(path, outlined=False)


def truncated(path: Path) -> None:
    content = video(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def no_video(path: Path) -> None:
    path.write_text("this is not a video")


@pytest.mark.parametrize("make", [no_outline, truncated, no_video], ids=lambda make: make.__name__)
def test_a_video_that_is_rejected(tmp_path: Path, make: Callable[[Path], None]) -> None:
    video(tmp_path / "a.mp4")
    make(tmp_path / "b.mp4")
    message = fails(*prepare(tmp_path, "filename,label\na.mp4,0\nb.mp4,1\n"))
    assert message.startswith(f"{tmp_path / 'store' / 'rejected.csv'}: 1 of 2 clips were rejected")
    assert "; the first: b.mp4: " in message
    with pytest.raises(StoreError, match="not finished"):
        Store(tmp_path / "store")


def test_a_store_of_other_settings(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    csv = "filename,label\na.mp4,0\n"
    assert f"1 clips in {tmp_path / 'store'}" in said(*prepare(tmp_path, csv))
    message = fails(*prepare(tmp_path, csv, "--roi", "none"))
    assert "the store was made with other settings (settings.roi changed)" in message
    assert len(Store(tmp_path / "store").table) == 1


def test_a_file_that_is_no_medmnist_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    message = fails("prepare-npz", tmp_path / "a.npz", "--out", tmp_path / "store")
    assert message.startswith(f"{tmp_path / 'a.npz'}: is not a MedMNIST file")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("share", ["101%", "-1", "all", "nan", "1%%"])
def test_a_share_of_rejects_that_is_none(tmp_path: Path, share: str) -> None:
    video(tmp_path / "a.mp4")
    command = (*prepare(tmp_path, "filename,label\na.mp4,0\n"), f"--max-rejected={share}")
    assert fails(*command).startswith(f"--max-rejected: '{share}' is not a share")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("share", ["50%", "0.5"])
def test_half_may_be_rejected(tmp_path: Path, share: str) -> None:
    video(tmp_path / "a.mp4")
    no_video(tmp_path / "b.mp4")
    csv = "filename,label\na.mp4,0\nb.mp4,1\n"
    told = said(*prepare(tmp_path, csv), "--max-rejected", share)
    assert "rejected: 1 (1 positive), see" in told


def test_colour_of_the_outline(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    command = prepare(tmp_path, "filename,label\na.mp4,0\n")
    assert "no outline found" in fails(*command, "--colour", "red_over_blue=255")
    told = said("inspect", tmp_path / "a.mp4", "--colour", "red_over_blue=255")
    assert "no outline found in any frame" in told
    assert "of 90 pixels" in said("inspect", tmp_path / "a.mp4", "--least-outline", 90)
    told = said("inspect", tmp_path / "a.mp4", "--png", tmp_path / "a.png")
    assert "no outline found" not in told
    assert f"drawn in {tmp_path / 'a.png'}" in told
    assert (tmp_path / "a.png").stat().st_size > 0


def test_inspect_of_a_video_that_ends_too_soon(tmp_path: Path) -> None:
    content = video(tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(content[: content.index(b"idx1") - 200])
    assert "the video ends before it should" in said("inspect", tmp_path / "a.avi")


def test_inspect_of_a_fifo_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    assert "a.mp4: is a FIFO, not a plain file" in fails("inspect", tmp_path / "a.mp4")


def test_inspect_of_a_volume(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 8, 8), np.uint8))
    message = fails("inspect", tmp_path / "a.npy")
    assert message.startswith(f"{tmp_path / 'a.npy'}: a volume has no coloured outline")
