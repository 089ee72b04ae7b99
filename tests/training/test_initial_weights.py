"""model.init: a new run begins with the weights of another, and only a new one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    metrics_of,
    refused,
    said,
    tiny_config,
)
from npy_store import npy_store
from safetensors.torch import load_file
from short_runs import assert_same_run, train_until

from dist_train.errors import ConfigError, PlanError
from dist_train.run.record import read_record
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
    train_until(config, 1, before_step=look)
    for name, weights in expected.items():
        assert torch.equal(seen[f"model/{name}"], weights)
        if weights.is_floating_point():
            assert torch.equal(seen[f"ema/{name}"], weights)
    moments = [seen[name] for name in seen if name.startswith(("exp_avg/", "exp_avg_sq/"))]
    assert moments
    assert not any(moment.any() for moment in moments)
    noted = read_record(tmp_path / "run")["init"]
    assert noted["step"] == 6
    assert Path(noted["path"]).is_absolute()


def test_a_resumed_run_is_the_straight_one_and_does_not_read_them_again(
    store: Path, before: Path, tmp_path: Path
) -> None:
    given = shutil.copy(before / SNAPSHOT, tmp_path / "given.safetensors")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(tiny_config(store, straight, f"model.init={given}"))
    train_until(tiny_config(store, resumed, f"model.init={given}"), 5)
    Path(given).unlink()
    train(tiny_config(store, resumed, f"model.init={given}"), resume="auto")
    assert_same_run(resumed, straight)
    assert read_record(straight)["init"] == read_record(resumed)["init"]


def changed(before: Path, to: Path, how: str) -> Path:
    weights, metadata = load_snapshot(before / SNAPSHOT)
    name = next(name for name in weights if name.endswith("conv.weight"))
    match how:
        case "missing":
            del weights[name]
        case "extra":
            weights["other"] = torch.zeros(2)
        case "shape":
            weights[name] = torch.zeros(3)
        case "type":
            weights[name] = weights[name].half()
        case "nan":
            weights[name].view(-1)[0] = np.nan
        case "metadata":
            metadata["model"]["width"] = 8
    save_snapshot(to, weights, metadata)
    if how == "cut":
        to.write_bytes(to.read_bytes()[:-9])
    return to


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("missing", "the weights lack "),
        ("extra", "the weights have, unlike the model, other. Use other weights."),
        ("shape", "the weights have in another shape or type "),
        ("type", "the weights have in another shape or type "),
        ("nan", "is not finite"),
        ("metadata", "of another model (model.width is 8 there and 4 here)"),
        ("cut", "it is no snapshot or export of dist-train, or is damaged"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    store: Path, before: Path, tmp_path: Path, how: str, part: str
) -> None:
    path = changed(before, tmp_path / "given.safetensors", how)
    with pytest.raises(ConfigError) as caught:
        initial_model(tiny_config(store, tmp_path / "run", f"model.init={path}"))
    assert str(caught.value).startswith(f"model.init: {path}: ")
    assert part in str(caught.value)


def test_a_path_without_weights_is_refused_before_anything_is_written(
    store: Path, tmp_path: Path
) -> None:
    config = tiny_config(store, tmp_path / "run", f"model.init={tmp_path / 'none'}")
    with pytest.raises(ConfigError, match="there are no weights here"):
        train(config)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_on_all_clips_holds_none_out(store: Path, tmp_path: Path) -> None:
    """A store without a split is needed; one that holds clips out is refused."""
    with pytest.raises(PlanError, match="would train on 20 clips that the manifest's split column"):
        train(tiny_config(store, tmp_path / "run", "split.train_on_all=true"))
    random = np.random.default_rng(0)
    clips = [
        (random.integers(0, 255, (8, 16, 16), np.uint8), {"label": int(number < 8)})
        for number in range(32)
    ]
    out = tmp_path / "all"
    settings = ["split.train_on_all=true", "train.epochs=1", "snapshots.at=[1]"]
    train(tiny_config(npy_store(tmp_path, clips), out, *settings))
    lines = metrics_of(out)
    # 8 positives, 2 in each batch.
    assert len(lines) == 4
    assert not any(name.startswith("val/") for line in lines for name in line)
    assert "was trained on all clips (split.train_on_all)" in refused("predict", out)
