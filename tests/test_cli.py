"""The command line itself: exit codes, errors in one line, and options that only it parses."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import dist_train, ended, fails, overrides, run, said

from dist_train.data.store.reader import Store


def video(path: Path) -> Path:
    """Twelve frames of 64x64: grey, with the orange outline of a square."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(12):
            frame = np.full((64, 64, 3), 60 + 5 * number, np.uint8)
            frame[12:52, 12:52] = (255, 80, 0)
            frame[16:48, 16:48] = 60 + 5 * number
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def prepare(folder: Path, *rows: str) -> list[object]:
    """A command that prepares the clips of ``rows`` in a folder."""
    (folder / "clips.csv").write_text("\n".join(["filename,label", *rows, ""]))
    return [
        "prepare", "--manifest", folder / "clips.csv", "--source", folder,
        "--out", folder / "store", "--workers", 1,
    ]  # fmt: skip


def test_help_names_every_command_with_its_meaning() -> None:
    done = run(dist_train("--help"))
    assert done.returncode == 0
    for command in ("prepare", "train", "predict", "evaluate", "report"):
        assert command in done.stdout
    for command in ("prepare", "train", "predict"):
        code, out, _ = ended(command, "--help")
        assert code == 0
        assert "--allow" in out


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train", "--resume", "always"], ["prepare"], ["predict", "run", "--prior", "2"]],
)
def test_a_usage_error_exits_with_2(arguments: list[str]) -> None:
    code, _, err = ended(*arguments)
    assert code == 2
    assert "Usage: " in err


def test_a_users_error_is_one_line_on_stderr(store: Path, tmp_path: Path) -> None:
    """In a process of its own: libraries print nothing else."""
    done = run(dist_train("train", *overrides(store, tmp_path / "run", "plan.bach=8")))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: command line: unknown setting 'plan.bach'. Did you mean 'plan.batch'?\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_missing_store_is_one_line_on_stderr(tmp_path: Path) -> None:
    """As above, after the import of torch and Accelerate."""
    done = run(dist_train("train", *overrides(tmp_path / "none", tmp_path / "run")))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'none'}: there is no store here. ")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = fails("train", *overrides(store, tmp_path / "file" / "run"))
    assert message == f"{tmp_path / 'file' / 'run'}: Not a directory"


def test_a_run_without_snapshots(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "snapshots")
    message = fails("predict", tmp_path / "run")
    assert message.startswith(f"{tmp_path / 'run'}: the run has no snapshot yet. ")
    assert not (tmp_path / "run" / "predictions.csv").exists()


def test_names_that_look_like_markup_are_printed(store: Path, tmp_path: Path) -> None:
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


# prepare and inspect


def test_a_bad_manifest_leaves_no_store(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    message = fails(*prepare(tmp_path, "a.mp4,0", "./a.mp4,1"))
    assert message.startswith(f"{tmp_path / 'clips.csv'}: 'a.mp4' is listed twice")
    assert not (tmp_path / "store").exists()


def test_a_store_of_other_settings_is_kept(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    command = prepare(tmp_path, "a.mp4,0")
    assert f"1 clips in {tmp_path / 'store'}" in said(*command)
    message = fails(*command, "--roi", "none")
    assert "the store was made with other settings (settings.roi changed)" in message
    assert len(Store(tmp_path / "store").table) == 1


@pytest.mark.parametrize("share", ["101%", "-1", "all", "nan", "1%%"])
def test_a_wrong_share_of_rejects_is_refused(tmp_path: Path, share: str) -> None:
    message = fails(*prepare(tmp_path, "a.mp4,0"), f"--max-rejected={share}")
    assert message.startswith(f"--max-rejected: '{share}' is not a share")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("share", ["50%", "0.5"])
def test_half_may_be_rejected(tmp_path: Path, share: str) -> None:
    video(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text("this is not a video")
    told = said(*prepare(tmp_path, "a.mp4,0", "b.mp4,1"), "--max-rejected", share)
    assert "rejected: 1 (1 positive), see" in told


def test_colour_of_the_outline(tmp_path: Path) -> None:
    clip = video(tmp_path / "a.mp4")
    wrong = ("--colour", "red_over_blue=255")
    assert "no outline found" in fails(*prepare(tmp_path, "a.mp4,0"), *wrong)
    assert "no outline found in any frame" in said("inspect", clip, *wrong)
    assert "of 90 pixels" in said("inspect", clip, "--least-outline", 90)
    told = said("inspect", clip, "--png", tmp_path / "a.png")
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
