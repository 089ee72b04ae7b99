"""The wheel alone is enough: what it holds, and what its commands write and do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from functools import partial
from pathlib import Path

import pytest
from helpers import LAUNCH, ROOT, contents, environment, fails, image_files, said


def launch_files() -> dict[str, bytes]:
    return {name: text for name, text in contents(LAUNCH).items() if "__pycache__" not in name}


def test_a_config_is_written_to_the_working_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said("config", "--write", "clog_loss_ddp") == "settings in clog_loss_ddp.yaml\n"
    shipped = (ROOT / "configs" / "clog_loss_ddp.yaml").read_bytes()
    assert contents(tmp_path) == {"clog_loss_ddp.yaml": shipped}
    (tmp_path / "clog_loss_ddp.yaml").write_text("mine: 1\n")
    assert "exists already" in fails("config", "--write", "clog_loss_ddp")
    assert (tmp_path / "clog_loss_ddp.yaml").read_text() == "mine: 1\n"


@pytest.mark.parametrize("name", ["clog_los_ddp", "../pyproject", "clog_loss_ddp.yaml"])
def test_an_unknown_config_is_refused_with_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = fails("config", "--write", name)
    assert f"no config '{name}'" in message
    assert "clog_loss_ddp, " in message
    assert not contents(tmp_path)


def test_the_launch_files_are_written_once(tmp_path: Path) -> None:
    jobs = tmp_path / "new" / "jobs"
    said("launch-files", jobs)
    assert contents(jobs / "launch") == launch_files()
    assert [path.name for path in jobs.iterdir()] == ["launch"]
    for script in jobs.rglob("*.sh"):
        assert os.access(script, os.X_OK), script
    assert "exists already" in fails("launch-files", jobs)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``dist-train`` command of the built wheel, in an environment of its own, which shares all
    other packages with this one. Needs no network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    # The image is made of the same files, so they must be enough.
    for name in image_files():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    pip = (sys.executable, "-m", "pip", "--quiet")
    calm = environment(PYTHONPATH="")
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, source],
        env=calm,
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    # Of a path file, paths count and not the path files in them: an editable dist_train stays out.
    (own,) = (folder / "venv" / "lib").glob("*/site-packages")
    (own / "shared.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], env=calm, check=True)
    return python.with_name("dist-train")


@pytest.mark.slow
def test_the_wheel_alone_makes_prepares_and_trains(installed: Path, tmp_path: Path) -> None:
    def output(*words: object) -> str:
        done = subprocess.run(
            list(map(str, words)),
            env=environment(PYTHONPATH=""),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = partial(output, installed)
    where = "import dist_train; print(dist_train.__file__)"
    imported = output(installed.with_name("python"), "-c", where)
    assert Path(imported.strip()).is_relative_to(installed.parents[1])
    command("launch-files", ".")
    assert contents(tmp_path / "launch") == launch_files()
    assert os.access(tmp_path / "launch" / "torchrun.sh", os.X_OK)
    command("config", "--write", "demo_cpu")
    assert "plan.batch=32" in command("config")
    command("synth", "raw", "--clips", 40, "--workers", 1)
    command(
        "prepare", "--manifest", "raw/train_metadata.csv", "--labels", "raw/train_labels.csv",
        "--source", "raw/videos", "--out", "store", "--workers", 1,
    )  # fmt: skip
    command(
        "train", "--config", "demo_cpu.yaml", "store=store", "out=run", "train.epochs=1",
        "snapshots.at=[1]", "plan.batch=8", "loader.workers=0", "clip.size=[32,32]",
        "clip.growth=[]", "model.width=4",
    )  # fmt: skip
    assert list((tmp_path / "run" / "snapshots").glob("*.safetensors"))
