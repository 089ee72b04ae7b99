"""Training on from a file of another library: its table, frozen parts, and exact resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import metrics_of, overrides, refused, said, tiny_config
from original_nets import OriginalResNet
from safetensors.torch import load_file
from short_runs import assert_same_run, train_until

from dist_train.errors import CheckpointError, ConfigError
from dist_train.run.record import read_record
from dist_train.training.initial_weights import initial_model
from dist_train.training.train import train

SETTINGS = (
    "model.stem_pool=true",
    "optim.ema=0.9",
    "finetune.freeze=[stem, layer1]",
    "finetune.layer_decay=0.7",
    "finetune.head_lr=0.02",
)
FROZEN = ("stem.", "blocks.0.")


@pytest.fixture(scope="module")
def kinetics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as Hara et al. saved theirs, of a narrow ResNet-10 with 400 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("kinetics") / "resnet-10-kinetics.pth"
    state = OriginalResNet((1, 1, 1, 1), outputs=400).state_dict()
    content = {"arch": "resnet-10", "state_dict": {f"module.{n}": t for n, t in state.items()}}
    torch.save(content, path)
    return path


def test_a_resumed_run_is_the_straight_one_and_frozen_weights_are_the_given(
    store: Path, kinetics: Path, tmp_path: Path
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    given = f"model.init={kinetics}"
    config = tiny_config(store, straight, *SETTINGS, given)
    train(config)
    # In the middle of an epoch, of a checkpoint in the middle of another.
    train_until(tiny_config(store, resumed, *SETTINGS, given), 9)
    train(tiny_config(store, resumed, *SETTINGS, given), resume="auto")
    assert_same_run(resumed, straight)
    first, _ = initial_model(config)
    for path in (straight / "snapshots").iterdir():
        for name, tensor in load_file(path).items():
            if name.startswith(FROZEN):
                torch.testing.assert_close(tensor, first.state_dict()[name], rtol=1e-6, atol=1e-7)
            elif name.endswith("weight"):
                assert not torch.equal(tensor, first.state_dict()[name]), name


def test_the_table_is_printed_and_recorded(store: Path, kinetics: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = [*SETTINGS, "train.epochs=1", "snapshots.at=[1]", f"model.init={kinetics}"]
    told = said("train", *overrides(store, out, *more))
    assert "weights of resnet-10-kinetics.pth, layout hara_2018" in told
    assert "it has 400 outputs" in told
    noted = read_record(out)["init"]
    assert noted["layout"] == "hara_2018"
    assert noted["step"] is None
    groups = {(group["how"], group["reason"]): group for group in noted["tensors"]}
    assert groups["left out", "it has 400 outputs, and the model 1"]["names"] == [
        "fc.weight", "fc.bias"
    ]  # fmt: skip
    assert groups["random", "drawn from the seed"]["values"] == 33
    assert groups["adapted", "for pixels of 0 to 1; sum over 3 channels"]["names"] == [
        "stem.conv.weight"
    ]
    # The gap of frozen layers is none, and the others have one.
    assert metrics_of(out)[-1]["norm/gap"] != 0


def test_all_statistics_frozen(store: Path, trained: Path, tmp_path: Path) -> None:
    more = ("finetune.freeze_norm=all", f"model.init={trained}", "train.epochs=1")
    train(tiny_config(store, tmp_path / "run", *more, "snapshots.at=[1]"))
    given = load_file(trained / "snapshots" / "step-6.safetensors")
    for name, tensor in load_file(tmp_path / "run/snapshots/step-6.safetensors").items():
        is_statistic = "running" in name or "batches" in name
        assert torch.equal(tensor, given[name]) == is_statistic, name
    assert metrics_of(tmp_path / "run")[-1]["norm/gap"] == 0


def test_another_head_of_an_own_run_is_taken_by_name(
    store: Path, trained: Path, tmp_path: Path
) -> None:
    """The same settings but for the channels of clips."""
    channels = "model.channels=[dapi, gfp]"
    config = tiny_config(store, tmp_path / "run", f"model.init={trained}", channels)
    with pytest.raises(
        ConfigError, match=r"channels is .*init_layout=plain takes those of another head"
    ):
        initial_model(config)
    plain = tiny_config(
        store, tmp_path / "run", f"model.init={trained}", channels, "model.init_layout=plain"
    )
    model, source = initial_model(plain)
    given = load_file(trained / "snapshots" / "step-6.safetensors")
    assert source is not None
    assert source.layout == "plain"
    assert torch.equal(model.state_dict()["head.weight"], given["head.weight"])
    stem = model.state_dict()["stem.conv.weight"]
    torch.testing.assert_close(stem.sum(1, keepdim=True), given["stem.conv.weight"])


def test_what_does_not_fit_is_refused_before_the_first_step(
    store: Path, kinetics: Path, trained: Path, tmp_path: Path
) -> None:
    def told(*settings: str) -> str:
        return refused("train", *overrides(store, tmp_path / "run", *settings))

    given = f"model.init={kinetics}"
    assert "Set model.name=resnet3d-10" in told(given, "model.name=resnet3d-18")
    assert "Set model.width=4" in told(given, "model.width=8")
    assert "no layout 'harra'" in told(given, "model.init_layout=harra")
    assert "it is of dist-train, and no file of hara" in told(
        f"model.init={trained}", "model.init_layout=hara"
    )
    assert "give init too" in told("model.init_layout=hara")
    assert "give model.init, or leave them out" in told("finetune.freeze=[stem]")
    assert "'layer9' is no part" in told(given, "finetune.freeze=[layer9]")
    assert "no parameter is left to train" in told(given, "finetune.freeze=['*']")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_resumed_run_cannot_train_what_was_frozen(
    store: Path, kinetics: Path, tmp_path: Path
) -> None:
    given = f"model.init={kinetics}"
    train_until(tiny_config(store, tmp_path / "run", *SETTINGS, given), 5)
    with pytest.raises(CheckpointError, match=r"has no exp_avg/stem.conv.weight, as that was not"):
        train(tiny_config(store, tmp_path / "run", *SETTINGS[:2], given), resume="auto")
