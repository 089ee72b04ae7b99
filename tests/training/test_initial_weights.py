"""model.init: a new run begins with the weights of another, and only a new one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    InterruptedSessionError,
    contents,
    interrupt_at,
    metrics_of,
    said,
    tiny_config,
)
from safetensors.torch import load_file, save_file

from dist_train import cli
from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import ConfigError, PlanError
from dist_train.run.snapshots import load_snapshot, save_snapshot
from dist_train.training.initial_weights import initial_model
from dist_train.training.train import train
from dist_train.training.trainer import Trainer


@pytest.fixture(scope="module")
def before(store: Path) -> Path:
    """A finished run of one epoch."""
    out = store.parent / "before"
    train(tiny_config(store, out, "train.epochs=1", "snapshots.at=[1]", "seed=4"))
    return out


SNAPSHOT = "snapshots/step-6.safetensors"


@pytest.mark.parametrize("given", ["", SNAPSHOT, "checkpoints/step-6", "export"])
def test_a_run_begins_with_the_weights_of_a_run_a_snapshot_a_checkpoint_or_an_export(
    store: Path, before: Path, tmp_path: Path, given: str
) -> None:
    if given == "export":
        said("export", before, "--out", tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors" if given == "export" else before / given
    expected = load_file(before / SNAPSHOT)
    seen: dict[str, torch.Tensor] = {}

    def look(trainer: Trainer, step: int) -> None:
        if step == 0:
            state = trainer.backend.state(lambda name: True) | trainer.ema.state(lambda name: True)
            seen.update({name: tensor.clone() for name, tensor in state.items()})

    config = tiny_config(store, tmp_path / "run", f"model.init={path}", "optim.ema=0.9")
    with pytest.raises(InterruptedSessionError):
        train(config, before_step=look, progress=interrupt_at(1))
    for name, weights in expected.items():
        assert torch.equal(seen[f"model/{name}"], weights)
        if weights.is_floating_point():
            assert torch.equal(seen[f"ema/{name}"], weights)
    moments = [seen[name] for name in seen if name.startswith(("exp_avg/", "exp_avg_sq/"))]
    assert moments
    assert not any(moment.any() for moment in moments)
    noted = json.loads((tmp_path / "run" / "run.json").read_text())["init"]
    assert noted["step"] == 6
    assert Path(noted["path"]).is_absolute()


def test_a_resumed_run_is_the_straight_one_and_does_not_read_them_again(
    store: Path, before: Path, tmp_path: Path
) -> None:
    given = shutil.copy(before / SNAPSHOT, tmp_path / "given.safetensors")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(tiny_config(store, straight, f"model.init={given}"))
    with pytest.raises(InterruptedSessionError):
        train(tiny_config(store, resumed, f"model.init={given}"), progress=interrupt_at(5))
    Path(given).unlink()
    train(tiny_config(store, resumed, f"model.init={given}"), resume="auto")
    assert contents(resumed / "snapshots") == contents(straight / "snapshots")
    sources = [json.loads((run / "run.json").read_text())["init"] for run in (straight, resumed)]
    assert sources[0] == sources[1]


def changed(before: Path, to: Path, how: str) -> Path:
    weights, facts = load_snapshot(before / SNAPSHOT)
    name = next(name for name in weights if name.endswith("conv.weight"))
    match how:
        case "missing":
            del weights[name]
        case "extra":
            weights["other"] = torch.zeros(2)
        case "shape":
            weights[name] = torch.zeros(3)
        case "nan":
            weights[name].view(-1)[0] = np.nan
        case "facts":
            facts["model"]["width"] = 8
        case "no facts":
            save_file(weights, to)
            return to
    save_snapshot(to, weights, facts)
    return to


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("missing", "the weights lack "),
        ("extra", "the weights have, unlike the model, other. Use other weights."),
        ("shape", "the weights have in another shape or type "),
        ("nan", "is not finite"),
        ("facts", "of another model (model.width is 8 there and 4 here)"),
        ("no facts", "it is no snapshot or export of dist-train, or is damaged"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    store: Path, before: Path, tmp_path: Path, how: str, part: str
) -> None:
    path = changed(before, tmp_path / "given.safetensors", how)
    config = tiny_config(store, tmp_path / "run", f"model.init={path}")
    with pytest.raises(ConfigError) as caught:
        initial_model(config)
    assert str(caught.value).startswith(f"model.init: {path}: ")
    assert part in str(caught.value)


def test_a_path_without_weights_is_refused_before_anything_is_written(
    store: Path, tmp_path: Path
) -> None:
    config = tiny_config(store, tmp_path / "run", f"model.init={tmp_path / 'none'}")
    with pytest.raises(ConfigError, match="there are no weights here"):
        train(config)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_on_all_clips_holds_none_out(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a store without a split; one that holds clips out is refused."""
    with pytest.raises(PlanError, match="would train on 20 clips that the manifest's split column"):
        train(tiny_config(store, tmp_path / "run", "split.train_on_all=true"))
    clips = tmp_path / "clips"
    clips.mkdir()
    random = np.random.default_rng(0)
    lines = ["filename,label"]
    for number in range(32):
        np.save(clips / f"{number}.npy", random.integers(0, 255, (8, 16, 16), np.uint8))
        lines.append(f"{number}.npy,{int(number < 8)}")
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    manifest = read_manifest(tmp_path / "clips.csv")
    prepare(manifest, clips, tmp_path / "store", PrepareSettings(roi="none"), workers=1)
    out = tmp_path / "all"
    settings = ["split.train_on_all=true", "train.epochs=1", "snapshots.at=[1]"]
    train(tiny_config(tmp_path / "store", out, *settings))
    lines_of_run = metrics_of(out)
    # 8 positives, 2 in each batch.
    assert len(lines_of_run) == 4
    assert not any(name.startswith("val/") for line in lines_of_run for name in line)
    monkeypatch.setattr(sys, "argv", ["dist-train", "predict", str(out)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "was trained on all clips (split.train_on_all)" in capsys.readouterr().err
