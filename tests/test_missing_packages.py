"""Without an optional package the other commands work, and those that need it say what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, dist_train, environment, metrics_of, overrides, run

# Read by Python before anything else: neither the modules nor their versions can be found.
HIDE = """
import os, sys
from importlib.machinery import PathFinder
from importlib.metadata import MetadataPathFinder

HIDDEN = set(os.environ["NOT_INSTALLED"].split(","))


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        found = MetadataPathFinder.find_distributions(*args, **kwargs)
        return (each for each in found if each.metadata["Name"].lower() not in HIDDEN)


sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""
# All that a training may have to do without.
OPTIONAL = "deepspeed,transformers,tensorboard,av,tifffile,imagecodecs,webdataset,fsspec,ray,onnx"
OPTIONAL += ",mlflow,wandb"


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which ``OPTIONAL`` are not installed."""
    folder = tmp_path / "hide"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {"PYTHONPATH": path, "NOT_INSTALLED": OPTIONAL}


def test_a_run_needs_none_of_them(store: Path, tmp_path: Path, without: dict[str, str]) -> None:
    out = tmp_path / "run"
    calls = [
        ["train", *overrides(store, out, "train.epochs=1", "snapshots.at=[1]")],
        ["predict", str(out)],
        ["evaluate", str(out)],
        ["export", str(out), "--out", str(tmp_path / "model.safetensors")],
    ]
    code = (
        f"from dist_train.cli import app\nfor call in {calls!r}: app(call, standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**without),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "tensorboard is not installed, so metrics go to" in done.stderr
    assert len(metrics_of(out)) == 6
    assert (out / "predictions.csv").is_file()
    versions = json.loads((out / "run.json").read_text())["versions"]
    assert versions["deepspeed"] is None
    assert versions["av"] is None
    assert isinstance(versions["torch"], str)


def test_zero_says_what_to_install(store: Path, tmp_path: Path, without: dict[str, str]) -> None:
    out = tmp_path / "run"
    done = run(dist_train("train", *overrides(store, out, "train.backend=zero2")), **without)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: train.backend: zero2 needs deepspeed and transformers, not installed here. "
        "Run 'pip install deepspeed transformers', or choose ddp or fsdp2."
    )
    assert not out.exists()
