import re

import pytest
import torch
from helpers import ROOT

from dist_train.errors import ModelError
from dist_train.models.registry import MODELS, build_model
from dist_train.models.resnet3d import ResNet3D

RESNETS = [f"resnet3d-{n}" for n in (10, 18, 34, 50, 101, 152, 200)]


def test_docs_have_a_row_for_each_model():
    table = (ROOT / "docs" / "models.md").read_text()
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == list(MODELS)


@pytest.mark.parametrize("name", RESNETS)
def test_each_model_has_as_many_layers_as_its_name_says(name):
    with torch.device("meta"):
        model = build_model(name, width=1)
    assert isinstance(model, ResNet3D)
    convolutions = [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Conv3d) and "shortcut" not in n
    ]
    assert len(convolutions) + 1 == int(name.removeprefix("resnet3d-"))


def test_settings_reach_the_model():
    model = build_model("resnet3d-10", width=4, in_channels=2, dropout=0.5, recompute="block")
    assert model(torch.zeros(2, 2, 4, 32, 32)).shape == (2,)
    assert model.dropout.p == 0.5
    assert model.recompute == ("block",) * 5


def test_an_unknown_name_gets_the_nearest_and_all_others():
    with pytest.raises(ModelError, match="Did you mean 'resnet3d-101'") as caught:
        build_model("resnet-101")
    assert all(name in str(caught.value) for name in MODELS)


@pytest.mark.parametrize("setting", ["widht", "depth", "x"])
def test_an_unknown_setting_is_refused_with_the_known_ones(setting):
    with pytest.raises(ModelError, match=f"no setting '{setting}'.*stem_stride"):
        build_model("resnet3d-10", **{setting: 8})
