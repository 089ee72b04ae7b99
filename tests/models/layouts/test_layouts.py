"""Weights of each layout give the logits of the original network.

Originals see zeros around a normalised clip, which are its mean colour. Ours sees the same with
``stem_border``, else black; then the original gets a border of black here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as drawn
from hypothesis import strategies as st
from monai.networks.nets import resnet as of_monai
from original_nets import OriginalResNet
from timm_stand_in import import_timm
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.layouts import hara, hara_2018, imagenet, layouts, torchvision_video
from dist_train.models.layouts import transferred as moved
from dist_train.models.r2plus1d import R2Plus1D
from dist_train.models.resnet3d import ResNet3D
from dist_train.models.transfer import RGB, Given, Normalised, Transfer

import_timm()
import timm  # noqa: E402

GREY = ("grey",)
REPEATS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


@pytest.fixture
def original(randomise_norms: Callable[[nn.Module], None]) -> Callable[..., OriginalResNet]:
    def make(depth: int = 10, black: Normalised | None = None, **more: Any) -> OriginalResNet:
        torch.manual_seed(1)
        net = OriginalResNet(REPEATS[depth], bottleneck=depth >= 50, **more)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        randomise_norms(net)
        if black is not None:
            net.border = [-m / s for m, s in zip(*black, strict=True)]
        return net.double().eval()

    return make


def transferred(
    net: nn.Module, depth: int = 10, channels: tuple[str, ...] = GREY, *, layout: str = "auto",
    is_parallel: bool = False, **settings: Any,
) -> tuple[ResNet3D, Transfer, str]:  # fmt: skip
    torch.manual_seed(2)
    model = ResNet3D(depth, width=4, in_channels=len(channels), **settings).double().eval()
    given = Given(dict(net.state_dict()), is_parallel)
    name, move = moved(given, model, channels, layout)
    model.load_state_dict(move.state)
    return model, move, name


def random_clips(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def normal(clips: Tensor, how: Normalised) -> Tensor:
    """Clips in colour as the original sees them; grey ones have three equal channels."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1, 1) for v in how)
    return (clips - mean) / std


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.view(ours.shape), rtol=1e-9, atol=1e-9)
    assert ours.unique().numel() > ours.numel() / 2, "the test could not tell"


@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize("channels", [GREY, RGB], ids=["grey", "rgb"])
@pytest.mark.parametrize("depth", [10, 50])
@pytest.mark.parametrize(
    ("layout", "how"), [("hara", hara.KINETICS), ("hara_2018", hara_2018.PIXELS)]
)
def test_hara(
    original: Any, layout: str, how: Normalised, depth: int, channels: tuple[str, ...], border: bool
) -> None:
    net = original(depth, None if border else how)
    model, move, found = transferred(
        net, depth, channels, is_parallel=layout == "hara_2018", stem_border=border
    )
    assert found == layout
    assert any("set model.stem_border=true" in note for note in move.notes) != border
    clips = random_clips(2, len(channels), 9, 32, 24)
    assert_same(model(clips), net(normal(clips, how)))


def test_the_pixels_of_2018_were_those_of_files(original: Any) -> None:
    clips = random_clips(1, 3, 2, 4, 4)
    expected = 255 * clips - torch.tensor(hara_2018.MEAN, dtype=torch.float64).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(normal(clips, hara_2018.PIXELS), expected)


def test_without_a_border_the_inside_of_the_stem_is_the_same(original: Any) -> None:
    net = original()
    model, _, _ = transferred(net, channels=RGB)
    clips = random_clips(1, 3, 16, 32, 32)
    ours = model.stem.norm(model.stem.conv(clips))
    theirs = net.bn1(net.stem(normal(clips, hara.KINETICS)))
    far = ours - theirs
    # 3 frames and pixels, of which every second one is computed.
    assert far[:, :, 3:-3, 2:-2, 2:-2].abs().max() < 1e-9
    assert far[:, :, 0].abs().max() > 1e-3


def test_a_border_ends_where_the_clip_does(original: Any) -> None:
    """Padding never changes a logit."""
    model, _, _ = transferred(original(), channels=RGB, stem_border=True)
    clips = random_clips(2, 3, 12, 24, 24)
    padded = model(clips, torch.tensor([12, 7]))
    assert_same(padded[1:], model(clips[1:, :, :7]))


@pytest.mark.parametrize("channels", [GREY, ("dapi", "gfp")])
@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("depth", [18, 50])
def test_monai(randomise_norms: Any, depth: int, shortcut: str, channels: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    net = getattr(of_monai, f"resnet{depth}")(
        spatial_dims=3, n_input_channels=len(channels), num_classes=1, shortcut_type=shortcut,
        widen_factor=4 / 64, conv1_t_stride=(1, 2, 2),
    )  # fmt: skip
    randomise_norms(net)
    net.double().eval()
    model, move, found = transferred(net, depth, channels)
    assert found == "monai"
    assert "model.stem_stride is [1, 2, 2]" in move.notes[0]
    assert "random" not in {row.how for row in move.rows}, "the head is taken, too"
    clips = random_clips(2, len(channels), 9, 32, 24)
    assert_same(model(clips), net(clips))


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_medicalnet_as_monai_builds_it(randomise_norms: Any, shortcut: str) -> None:
    torch.manual_seed(0)
    net = of_monai.resnet18(
        spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type=shortcut,
        bias_downsample=False, widen_factor=4 / 64, conv1_t_stride=2,
    )  # fmt: skip
    randomise_norms(net)
    net.double().eval()
    model, move, found = transferred(net, 18, stem_stride=(2, 2, 2))
    assert found == "medicalnet"
    assert {row.name for row in move.rows if row.how == "random"} == {"head.weight", "head.bias"}
    clips = random_clips(2, 1, 12, 32, 24)
    with torch.no_grad():
        model.head.weight.copy_(torch.ones(1, 32))
        model.head.bias.zero_()
    assert_same(model(clips), net(clips).sum(1))


def test_medicalnet_is_the_same_up_to_its_dilated_layers(original: Any) -> None:
    strides = [(1, 1, 1), (2, 2, 2), (1, 1, 1), (1, 1, 1)]
    net = original(
        18, channels=1, stem_stride=(2, 2, 2), strides=strides, dilations=(1, 1, 2, 4)
    )  # fmt: skip
    del net.fc
    # What it segments by.
    net.conv_seg = nn.Sequential(nn.Conv3d(32, 2, 1))
    model, move, found = transferred(net, 18, stem_stride=(2, 2, 2))
    assert found == "medicalnet"
    assert [row.name for row in move.rows if row.how == "left out"] == [
        "conv_seg.0.weight", "conv_seg.0.bias"
    ]  # fmt: skip
    assert "dilated by 2 and 4" in move.notes[0]
    clips = random_clips(1, 1, 16, 48, 32)
    parts, _ = model.parts()
    x = clips
    for step in [step for part in parts[:3] for step in part]:
        x = step(x)
    assert_same(x, net.features(clips, layers=2))
    _, move, _ = transferred(net, 18)
    assert "set model.stem_stride=[2, 2, 2]" in move.notes[0]


def video_name(name: str) -> str:
    """The name in torchvision's video networks."""
    name = re.sub(r"^conv1\.", "stem.0.", name)
    name = re.sub(r"^bn1\.", "stem.1.", name)
    name = re.sub(r"\.conv(\d)\.", r".conv\1.0.", name)
    return re.sub(r"\.bn(\d)\.", r".conv\1.1.", name)


class OfVideo(nn.Module):
    """The tensors of a network by their names in torchvision's."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {video_name(name): tensor for name, tensor in self.net.state_dict().items()}


@pytest.mark.parametrize("channels", [GREY, RGB], ids=["grey", "rgb"])
def test_r3d_of_torchvision(original: Any, channels: tuple[str, ...]) -> None:
    how = torchvision_video.KINETICS
    net = original(18, stem=(3, 7, 7), pool=False)
    assert "layer2.0.conv1.1.running_mean" in OfVideo(net).state_dict()
    model, move, found = transferred(OfVideo(net), 18, channels, stem_pool=False, stem_border=True)
    assert found == "torchvision_video"
    assert move.notes == []
    clips = random_clips(2, len(channels), 9, 24, 24)
    assert_same(model(clips), net(normal(clips, how)))
    _, move, _ = transferred(OfVideo(net), 18, channels, stem_border=True)
    assert move.notes == [
        "it has no max pooling behind the stem: for the same network set model.stem_pool=false"
    ]


def test_mc3_of_torchvision(original: Any) -> None:
    """It is another network, except for clips of one frame."""
    how = torchvision_video.KINETICS
    flat = [(1, 1, 1), *[(1, 2, 2)] * 3]
    net = original(
        18, stem=(3, 7, 7), pool=False, kernels=[(3, 3, 3), *[(1, 3, 3)] * 3], strides=flat
    )
    model, move, _ = transferred(OfVideo(net), 18, stem_pool=False, stem_border=True)
    assert "it is mc3_18" in move.notes[0]
    assert "1x3x3 among zeros" in {row.reason for row in move.rows}
    clips = random_clips(3, 1, 1, 32, 32)
    assert_same(model(clips), net(normal(clips, how)))


class SplitConv(nn.Sequential):
    """A convolution in space, and one in depth."""

    def __init__(self, inside: int, middle: int, out: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inside, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(middle),
            nn.ReLU(),
            nn.Conv3d(middle, out, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        )


class SplitBlock(nn.Module):
    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        middle = inside * out * 27 // (inside * 9 + 3 * out)
        norm = nn.BatchNorm3d
        first = SplitConv(inside, middle, out, stride)
        self.conv1 = nn.Sequential(first, norm(out), nn.ReLU())
        self.conv2 = nn.Sequential(SplitConv(out, middle, out), norm(out))
        self.downsample = nn.Sequential()
        if inside != out:
            self.downsample = nn.Sequential(
                nn.Conv3d(inside, out, 1, stride, bias=False), norm(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.downsample(x)).relu()


class SplitNet(nn.Module):
    """R(2+1)D-18 of Tran et al. 2018 by torchvision's names."""

    def __init__(self, width: int, border: list[float]) -> None:
        super().__init__()
        self.border, middle, norm = border, 45 * width // 64, nn.BatchNorm3d
        self.stem = nn.Sequential(
            nn.Conv3d(3, middle, (1, 7, 7), (1, 2, 2), bias=False), norm(middle), nn.ReLU(),
            nn.Conv3d(middle, width, (3, 1, 1), 1, (1, 0, 0), bias=False), norm(width), nn.ReLU(),
        )  # fmt: skip
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for k in range(1, 5):
            block = SplitBlock(widths[k - 1], widths[k], 1 if k == 1 else 2)
            self.add_module(f"layer{k}", nn.Sequential(block, SplitBlock(widths[k], widths[k], 1)))
        self.fc = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        colours = zip(x.unbind(1), self.border, strict=True)
        x = torch.stack([F.pad(c, (3, 3, 3, 3), value=v) for c, v in colours], 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(x.mean((2, 3, 4)))


@pytest.mark.parametrize("channels", [GREY, RGB], ids=["grey", "rgb"])
def test_r2plus1d_of_torchvision(randomise_norms: Any, channels: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    how = torchvision_video.KINETICS
    net = SplitNet(8, [-m / s for m, s in zip(*how, strict=True)])
    randomise_norms(net)
    net.double().eval()
    given = Given(dict(net.state_dict()))
    with pytest.raises(ModelError, match=r"Set model.name=r2plus1d-18\."):
        moved(given, ResNet3D(18, width=8), channels)
    model = R2Plus1D(18, width=8, in_channels=len(channels)).double().eval()
    name, move = moved(given, model, channels)
    model.load_state_dict(move.state)
    assert name == "torchvision_r2plus1d"
    clips = random_clips(2, len(channels), 9, 24, 24)
    assert_same(model(clips), net(normal(clips, how)))


@pytest.mark.parametrize("depth", [18, 50])
def test_a_2d_net_sees_a_still_clip_as_its_frame(original: Any, depth: int) -> None:
    """Away from both ends. A window of the deepest features of a ResNet-18 spans 221 frames."""
    net = original(depth, dims=2)
    model, move, found = transferred(net, depth, stem_border=True)
    assert found == "imagenet"
    assert move.notes == []
    assert any(row.reason == "inflated from 2D" for row in move.rows)
    frame = random_clips(1, 1, 1, 32, 24)
    frames = 256 if depth == 18 else 480
    x = frame.expand(-1, -1, frames, -1, -1)
    parts, _ = model.parts()
    with torch.no_grad():
        for step in [step for part in parts for step in part]:
            x = step(x)
        expected = net.features(normal(frame, imagenet.IMAGENET)[:, :, 0])
    middle = x.shape[2] // 2
    torch.testing.assert_close(x[:, :, middle], expected, rtol=1e-9, atol=1e-9)
    assert (x[:, :, 0] - expected).abs().max() > 1e-3
    assert expected.abs().max() > 1e-3


def test_the_weights_of_the_model_itself() -> None:
    theirs = ResNet3D(10, width=4).double().eval()
    model, move, found = transferred(theirs)
    assert found == "plain"
    assert {row.how for row in move.rows} == {"taken"}
    clips = random_clips(2, 1, 4, 16, 16)
    assert_same(model(clips), theirs(clips))
    # Of clips with two channels, and within another module.
    wrapped = nn.ModuleDict({"net": theirs})
    plain, _ = moved(Given(dict(theirs.state_dict())), wrapped, GREY)
    assert plain == "plain"
    # With three outputs in place of one.
    theirs.head = nn.Linear(32, 3)
    _, move, _ = transferred(theirs)
    assert {row.name for row in move.rows if row.how == "left out"} == {"head.weight", "head.bias"}
    theirs = ResNet3D(10, width=4).double().eval()
    two, move, _ = transferred(theirs, channels=("dapi", "gfp"))
    assert_same(two(clips.expand(-1, 2, -1, -1, -1)), theirs(clips))
    bordered = ResNet3D(10, width=4, stem_border=True).double().eval()
    two_bordered, _, _ = transferred(bordered, channels=("dapi", "gfp"), stem_border=True)
    assert_same(two_bordered(clips.expand(-1, 2, -1, -1, -1)), bordered(clips))
    assert [row.name for row in move.rows if row.how == "adapted"] == ["stem.conv.weight"]


def test_a_head_of_other_outputs_is_left_out(original: Any) -> None:
    net = original(outputs=7)
    model, move, _ = transferred(net)
    assert {(row.how, row.name) for row in move.rows if row.how in ("left out", "random")} == {
        ("left out", "fc.weight"), ("left out", "fc.bias"),
        ("random", "head.weight"), ("random", "head.bias"),
    }  # fmt: skip
    torch.manual_seed(2)
    assert torch.equal(model.head.weight, ResNet3D(10, width=4).double().head.weight)


@drawn(there=st.integers(1, 5), here=st.integers(1, 5))
def test_a_kernel_sees_equal_channels_as_before(there: int, here: int) -> None:
    move = Transfer({}, nn.Module(), tuple("abcde"[:here]))
    kernel, clip = random_clips(2, there, 3, 3, 3), random_clips(1, 1, 3, 3, 3)
    folded, _ = move.for_channels(kernel)
    assert folded.shape[1] == here
    expected = (kernel * clip).flatten(1).sum(1)
    torch.testing.assert_close((folded * clip).flatten(1).sum(1), expected)


def test_colours_in_another_order_get_their_own_kernels() -> None:
    kernel = random_clips(2, 3, 3, 3, 3)
    folded, done = Transfer({}, nn.Module(), ("blue", "red", "green")).for_channels(kernel)
    assert torch.equal(folded, kernel[:, [2, 0, 1]])
    assert done


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(name)


def other(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: torch.zeros(shape)})


REFUSED = {
    "a tensor is missing": (without("layer2.0.bn1.bias"), "no tensor layer2.0.bn1.bias"),
    "a tensor has another shape": (
        other("layer2.0.conv1.weight", 8, 4, 5, 3, 3),
        "layer2.0.conv1.weight is [8, 4, 5, 3, 3], and the model's blocks.1.conv1.conv.weight "
        "[8, 4, 3, 3, 3]",
    ),
    "a tensor is unknown": (other("attention.weight", 2), "takes attention.weight"),
    "another width": (other("conv1.weight", 64, 3, 7, 7, 7), "Set model.width=64."),
    "another depth": (other("layer3.1.conv1.weight", 2), "1 + 1 + 2 + 1 blocks"),
    "no ResNet": (without("layer1.0.conv1.weight"), "no layout has tensors such as conv1.weight"),
}


@pytest.mark.parametrize(("change", "part"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_file_is_refused_by_name(original: Any, change: Any, part: str) -> None:
    state = dict(original().state_dict())
    change(state)
    with pytest.raises(ModelError) as caught:
        moved(Given(state), ResNet3D(10, width=4), GREY)
    assert part in str(caught.value)


def test_other_models_and_layouts_are_refused(original: Any) -> None:
    given = Given(dict(original(50).state_dict()))
    with pytest.raises(ModelError, match=r"a ResNet-50, and the model is none.*resnet3d-50"):
        moved(given, ResNet3D(10, width=4), GREY)
    with pytest.raises(ModelError, match="and the model is none"):
        moved(given, nn.Linear(2, 1), GREY)
    with pytest.raises(ModelError, match=r"no layout 'harra'.*There are: auto, hara, "):
        moved(given, ResNet3D(50, width=4), GREY, "harra")
    with pytest.raises(ModelError, match="for 1 channels and not 3"):
        moved(Given(dict(original(channels=1).state_dict())), ResNet3D(10, width=4), GREY, "hara")


def test_files_of_timm_are_2d_resnets() -> None:
    net = timm.create_model("resnet18")
    name, move = moved(Given(net.state_dict()), ResNet3D(18), GREY)
    assert name == "imagenet"
    assert len([row for row in move.rows if row.how == "left out"]) == 2


def test_each_layout_says_what_it_is() -> None:
    assert all(each.TITLE for each in layouts().values())
