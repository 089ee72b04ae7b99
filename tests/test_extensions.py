"""Code from outside: used by every command, recorded, and imported only if it is allowed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import overrides, refused, said

from dist_train.config import LossSettings
from dist_train.data.raw.clip import PrepareSettings, read_clip
from dist_train.data.raw.outside_reader import OutsideReader
from dist_train.data.raw.stack import Choices
from dist_train.data.store.reader import Store, read_marker
from dist_train.errors import ConfigError, DecodeError, DistTrainError
from dist_train.evaluation.exported import load_exported
from dist_train.extensions import ALLOW
from dist_train.models.registry import OF_ADAPTED, UNKNOWN, find_model
from dist_train.run import record
from dist_train.run.model import metadata_differences
from dist_train.run.record import read_record
from dist_train.training.losses import make_loss

SOURCE = """
import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

class Net(nn.Module):
    def __init__(self, channels=4, plain_norm=False):
        super().__init__()
        self.conv = nn.Conv3d(1, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm3d(channels) if plain_norm else nn.GroupNorm(2, channels)
        self.head = nn.Linear(channels, 1)

    def forward(self, volumes, frames):
        features = torch.relu(self.norm(self.conv(volumes))).mean(dim=(2, 3, 4))
        return self.head(features).squeeze(1)

class Column(Net):
    def forward(self, volumes, frames):
        return super().forward(volumes, frames)[:, None]

class Masked(Net):
    def forward(self, volumes, mask=None):
        return super().forward(volumes, mask)

class Needy(Net):
    def forward(self, volumes, mask):
        return super().forward(volumes, mask)

class Late(Net):
    def forward(self, volumes, mask=None, frames=None):
        return super().forward(volumes, frames)

class Focal(nn.Module):
    def __init__(self, gamma=2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits, labels):
        loss = bce(logits, labels, reduction="none")
        return ((1 - torch.exp(-loss)) ** self.gamma * loss).mean()

def each(logits, labels):
    return bce(logits, labels, reduction="none")

def read_raw(path):
    return np.fromfile(path, "<u2").reshape(-1, 16, 16)

read_raw.suffixes = (".RAW",)

def no_model():
    raise AssertionError("it must not be called")
"""
#: Of the tiny run, without those of resnet3d.
PLAIN = ("model.width=64", "model.stem_pool=true", "train.epochs=1", "snapshots.at=[1]")


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a package that can be imported, and that nobody has allowed."""
    file = tmp_path / "lab" / "mylab" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(file.parents[1])
    monkeypatch.setenv(ALLOW, "")
    yield file
    sys.modules.pop("mylab", None)


def train(store: Path, run: Path, *more: str) -> list[str]:
    """The words of a command line that trains a tiny run."""
    options = [word for word in more if "=" not in word]
    settings = [word for word in more if "=" in word]
    return ["train", *overrides(store, run, *PLAIN, *settings), *options]


OUTSIDE = ("model.name=mylab:Net", "model.args.channels=6", "loss.name=mylab:Focal")


@pytest.mark.slow
def test_a_model_and_a_loss_go_through_every_command(
    store: Path, tmp_path: Path, lab: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run, file = tmp_path / "run", tmp_path / "model.safetensors"
    said(*train(store, run, *OUTSIDE, "--allow", "mylab"))
    (code, of_loss) = read_record(run)["sessions"][-1]["code_from_outside"]
    assert (code["path"], of_loss["path"]) == ("mylab:Net", "mylab:Focal")
    assert len(code["sha256"]) == 64

    monkeypatch.setenv(ALLOW, "")
    del sys.modules["mylab"]
    for command in (("predict", run), ("export", run, "--out", file)):
        assert "add --allow mylab" in refused(*command)
    assert "mylab" not in sys.modules
    said("predict", run, "--allow", "mylab")
    said("evaluate", run)
    said("export", run, "--out", file, "--allow", "mylab")
    assert "source" not in caplog.text
    probability = pd.read_csv(run / "predictions.csv")["probability"]
    assert probability.between(0, 1).all()
    exported = load_exported(file)
    assert exported.facts["code_from_outside"][0] == code
    assert exported.probability(torch.zeros(2, 1, 8, 16, 16, dtype=torch.uint8)).shape == (2,)
    monkeypatch.setenv(ALLOW, "")
    with pytest.raises(DistTrainError, match="add --allow mylab"):
        load_exported(file)

    lab.write_text(SOURCE + "\n# changed\n")
    said("predict", run, "--allow", "mylab")
    assert "the source of mylab:Net has changed since the training" in caplog.text


def test_the_machine_may_allow_it_and_an_own_loss_is_what_is_minimised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ALLOW, "other, mylab")
    logits, labels = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.0])
    focal = make_loss(LossSettings(name="mylab:Focal", args={"gamma": 3.0}))(logits, labels)
    p = torch.sigmoid(torch.where(labels == 1, logits, -logits)).double().numpy()
    assert float(focal) == pytest.approx(np.mean((1 - p) ** 3 * -np.log(p)), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("model.name=mylab:Missing",), "model.name: mylab:Missing cannot be imported"),
        (("model.name=mylab:no_model",), "mylab:no_model is no model"),
        (("model.name=mylab:torch",), "comes from the module None, which is not allowed"),
        (("loss.name=mylab:bce",), "from the module torch.nn.functional, which is not"),
        (("model.name=mylab.sub:Net.x",), "is not an import path"),
        (("model.name=mylab:Net", "model.args.chanels=2"), "Did you mean 'channels'"),
        (("model.name=mylab:Net", "model.width=4"), "model.width: mylab:Net has no such setting"),
        (("model.name=mylab:Needy",), "mylab:Needy is no model of clips: its forward(self, vol"),
        (("model.name=mylab:Late",), "as the second, frames: the true depths"),
        (("model.name=mylab:Column",), "gives [8, 1] for 8 clips. Give one logit a clip"),
        (("model.name=mylab:Net", "model.activation_memory=1GiB"), "has no parts"),
        (("model.args.a=1",), "resnet3d-10 takes no model.args"),
        (("loss.name=mylab:Net",), "has weights of its own"),
        (("loss.name=mylab:each",), "of 4 clips it gives [4]"),
        (("loss.name=mylab:Focal", "loss.args.g=1"), "unexpected keyword argument 'g'"),
        (("loss.name=lovasz",), "there is no loss 'lovasz'. There are: auto, bce, ce,"),
        (("loss.name=mylab:Focal", "loss.class_weights=balanced"), "gives the mean over the clips"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    store: Path, tmp_path: Path, settings: tuple[str, ...], told: str
) -> None:
    assert told in refused(*train(store, tmp_path / "run", *settings, "--allow", "mylab"))


def test_frames_go_to_an_argument_of_that_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW, "mylab")
    assert find_model("mylab:Net").cannot == UNKNOWN
    # A network of clips alone, whose other arguments stay at their defaults.
    assert find_model("mylab:Masked").cannot == OF_ADAPTED


def test_plain_normalisation_is_warned_of(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("model.name=mylab:Net", "model.args.plain_norm=true")
    said(*train(store, tmp_path / "run", *settings, "--allow", "mylab"))
    assert "mylab:Net has 1 layers of torch's BatchNorm3d" in caplog.text


def test_a_word_allows_a_module_and_what_is_below_it_alone(store: Path, tmp_path: Path) -> None:
    for word in ("mylab.sub", "my", "mylabs"):
        told = refused(*train(store, tmp_path / "run", *OUTSIDE, "--allow", word))
        assert "add --allow mylab" in told
    assert "mylab" not in sys.modules
    told = refused(*train(store, tmp_path / "run", *OUTSIDE, "--allow", "my lab"))
    assert "'my lab' is not the name of a module" in told


def test_a_setting_that_was_added_since_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"name": "resnet3d-10", "width": 4, "stem_stride": [1, 2, 2], "dropout": 0.0}
    before = {"name": "resnet3d-10", "width": 4, "stem_stride": [1, 2, 2]}
    assert metadata_differences(before, now) == []
    assert metadata_differences(before, now | {"dropout": 0.5}) == [("dropout", 0.0, 0.5)]
    assert metadata_differences(before | {"gone": 1}, now) == [("gone", 1, None)]
    monkeypatch.setenv(ALLOW, "mylab")
    bare = {"name": "mylab:Net", "args": {}}
    assert metadata_differences(bare, bare | {"args": {"channels": 4}}) == []
    assert metadata_differences(bare, bare | {"args": {"channels": 5}}) == [("args.channels", 4, 5)]


def test_a_reader_is_given_the_choices_or_they_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(path: Path) -> np.ndarray:
        return np.zeros((2, 4, 4, 2), np.uint8)

    def choosing(path: Path, choices: Choices) -> np.ndarray:
        return np.full((2, 4, 4), [choices.plane, int(choices.dataset or 0)][choices.series], "u1")

    module = ModuleType("readers")
    module.__dict__.update(plain=plain, choosing=choosing)
    monkeypatch.setitem(sys.modules, "readers", module)
    path = tmp_path / "a.raw"

    def read(function: str, name: str = "a.raw", **choices: Any) -> np.ndarray:
        reader = OutsideReader(f"readers:{function}", (".raw",), None, "")
        settings = PrepareSettings(
            roi="none",
            reader=reader,
            choices=Choices(**choices),
            channel_names=("0", "1") if function == "plain" else ("grey",),
        )
        return read_clip(path, name, "a.raw", settings)[0]

    assert read("plain", channels="all").shape == (2, 4, 4, 2)
    with pytest.raises(DecodeError, match=r"readers:plain takes no '::x'.*parameter 'choices'"):
        read("plain", "a.raw::x")
    for name, option in (("plane", "--plane"), ("series", "--series"), ("depth_axis", "--depth")):
        with pytest.raises(ConfigError, match=f"readers:plain takes no {option}"):
            read("plain", **{name: 1})
    assert read("choosing", plane=3, series=0).max() == 3
    assert read("choosing", "a.raw::7", series=1).max() == 7


@pytest.mark.slow
def test_a_reader_makes_a_store_that_is_mended_by_it(
    tmp_path: Path, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "store"
    values = np.random.default_rng(0).integers(0, 1 << 12, (4, 3, 16, 16), dtype="<u2")
    values[0, 0, 0, 0] = (1 << 12) - 1
    for number, clip in enumerate(values):
        (raw / str(number % 2)).mkdir(parents=True, exist_ok=True)
        clip.tofile(raw / str(number % 2) / f"{number}.raw")
    words = ["prepare", "--from-folders", raw, "--positive", "1", "--out", out, "--roi", "none",
             "--workers", 1, "--reader"]  # fmt: skip
    assert "add --allow mylab" in refused(*words, "mylab:read_raw")
    told = refused(*words, "mylab:no_model", "--allow", "mylab")
    assert "mylab:no_model is no reader: it has no suffixes" in told
    said(*words, "mylab:read_raw", "--allow", "mylab")
    # Twelve bits are what the values of all files need.
    np.testing.assert_array_equal(Store(out).read(3), values[3] >> 4)
    reader = read_marker(out)["settings"]["reader"]
    assert (reader["path"], reader["suffixes"]) == ("mylab:read_raw", [".raw"])

    (shard,) = (out / "shards").glob("*.tar")
    whole = shard.read_bytes()
    shard.unlink()
    mend = ["verify", out, "--repair", raw, "--workers", 1]
    monkeypatch.setenv(ALLOW, "")
    assert "add --allow mylab" in refused(*mend)
    lab.write_text(SOURCE + "\n# changed\n")
    like = ("--like", out, "--out", tmp_path / "new", "--allow", "mylab")
    for command in ([*mend, "--allow", "mylab"], [*words, "mylab:read_raw", *like]):
        assert "code of the reader mylab:read_raw has changed" in refused(*command)
    lab.write_text(SOURCE)
    said(*mend, "--allow", "mylab")
    assert shard.read_bytes() == whole


def test_a_run_notes_the_library_whose_network_it_is(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, other = tmp_path / "run", "model.name=monai.DenseNet"
    args = "model.args={init_features: 4, growth_rate: 2, block_config: [2, 2], bn_size: 2}"
    said(*train(store, run, other, args))
    (library,) = read_record(run)["sessions"][-1]["code_from_outside"]
    assert library == {"path": "monai", "version": version("monai"), "sha256": None}
    said("predict", run)
    assert "has changed" not in caplog.text
    monkeypatch.setattr(record, "version", lambda package: "0.1")
    said("predict", run)
    assert "the source of monai has changed since the training (version " in caplog.text
