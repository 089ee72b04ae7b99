"""The model of a run takes the channels of its store, scaled to 0 to 1."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_train.config import ModelSettings, load_config
from dist_train.errors import ModelError
from dist_train.models.registry import MODELS, Ability, ModelSpec
from dist_train.models.resnet3d import ResNet3D
from dist_train.run.model import (
    as_input,
    as_unit,
    configured_model,
    make_model,
    metadata_differences,
    model_metadata,
    model_of,
)

TWO = ("dapi", "gfp")


class Outside(nn.Module):
    def __init__(self, in_channels: int = 7) -> None:
        super().__init__()
        self.taken = in_channels


class Fixed(nn.Module):
    def forward(self, volumes: Tensor, frames: Tensor | None) -> Tensor:
        return volumes.mean(dim=(1, 2, 3, 4))


@pytest.fixture(autouse=True)
def _models() -> object:
    with mock.patch.dict(MODELS, {"outside": ModelSpec(Outside), "fixed": ModelSpec(Fixed)}):
        yield


def test_a_model_from_outside_is_told_the_channels() -> None:
    for channels, number in ((None, 1), (TWO, 2)):
        model = configured_model(ModelSettings(name="outside", channels=channels))
        assert isinstance(model, Outside)
        assert model.taken == number
    given = ModelSettings(name="outside", channels=TWO, args={"in_channels": 3})
    with pytest.raises(ModelError, match="takes clips of 3 channels, and the store's have 2"):
        configured_model(given)


def test_a_model_that_takes_no_channels_is_of_one() -> None:
    configured_model(ModelSettings(name="fixed"))
    with pytest.raises(ModelError, match="fixed does not say that it takes clips of 2 channels"):
        configured_model(ModelSettings(name="fixed", channels=TWO))


@pytest.mark.parametrize("folded", [False, True])
def test_an_export_makes_the_model_again(folded: bool) -> None:
    settings = ["store=s", "model.name=resnet3d-10", "model.width=4", f"model.stem_folded={folded}"]
    grey = model_metadata(load_config(None, settings))
    assert "channels" not in grey
    metadata = model_metadata(load_config(None, [*settings, "model.channels=[dapi, gfp]"]))
    assert metadata == grey | {"channels": list(TWO)}
    model = model_of(metadata)
    assert isinstance(model, ResNet3D)
    assert model.stem.conv.weight.shape[1] == 2


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_a_folded_stem_of_two_channels_is_the_plain_one(layout: torch.memory_format) -> None:
    plain, folded = (
        configured_model(
            ModelSettings(name="resnet3d-10", width=4, stem_folded=folded, channels=TWO)
        ).eval()
        for folded in (False, True)
    )
    folded.load_state_dict(plain.state_dict())
    clips = torch.rand(2, 2, 9, 20, 20).to(memory_format=layout)
    torch.testing.assert_close(folded(clips), plain(clips), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "white"), [(torch.uint8, 255), (torch.uint16, 65535), (torch.float16, 1)]
)
@pytest.mark.parametrize("last", [True, False])
def test_stored_pixels_are_scaled_to_0_to_1(dtype: torch.dtype, white: int, last: bool) -> None:
    """Interleaved channels are a view, of which channels-last needs no further copy."""
    levels = torch.from_numpy(np.array([0, 1, 2]) * white / 2)
    interleaved = levels.to(dtype).repeat(16).view(2, 2, 2, 2, 3)
    volumes = interleaved.permute(0, 4, 1, 2, 3)
    config = load_config(None, ["store=s", f"train.channels_last={last}"])
    scaled = as_input(volumes, config)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    assert scaled.is_contiguous(memory_format=layout)
    assert scaled.dtype == torch.float32
    expected = [0, int(white / 2) / white if white > 1 else 0.5, 1]
    torch.testing.assert_close(scaled[0, :, 0, 0, 0], torch.tensor(expected))
    torch.testing.assert_close(as_unit(volumes), scaled)


@pytest.mark.parametrize(
    ("ability", "setting"),
    [
        ("recompute", "model.recompute=block"),
        ("recompute", "model.activation_memory=1GiB"),
        ("cuda_graphs", "train.graphs=true"),
        ("sharded", "train.backend=zero3"),
        ("sharded", "train.backend=fsdp2"),
        ("channels_last", "train.channels_last=true"),
    ],
)
def test_what_a_model_cannot_is_refused_by_its_reason(ability: Ability, setting: str) -> None:
    spec = ModelSpec(Fixed, cannot={ability: "is too simple"})
    config = load_config(None, ["store=s", "model.name=simple", setting])
    with mock.patch.dict(MODELS, {"simple": spec}):
        named = setting.partition("=")[0]
        with pytest.raises(ModelError, match=f"{named}: simple is too simple. Set it otherwise"):
            make_model(config)


def test_a_run_with_several_outputs_says_so_in_its_metadata() -> None:
    one = load_config(None, ["store=s", "model.name=resnet3d-10", "model.width=4"])
    three = load_config(
        None, ["store=s", "model.name=resnet3d-10", "model.width=4", "model.outputs=3"]
    )
    assert "outputs" not in model_metadata(one)
    assert model_metadata(three) == model_metadata(one) | {"outputs": 3}
    assert metadata_differences(model_metadata(one), model_metadata(three)) == [("outputs", 1, 3)]
    assert model_of(model_metadata(three))(torch.zeros(2, 1, 4, 32, 32)).shape == (2, 3)
    with pytest.raises(ModelError, match="fixed does not say that it takes 3 outputs"):
        configured_model(ModelSettings(name="fixed", outputs=3))
