"""What every model of the registry must do, by name.

The models that are small or stand for a family run in every test run, the others in `make soak`.
Widths are reduced where the constructor allows it, but for the numbers of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from layouts import LAYOUT, Layouts
from live_bytes import peak_of_step
from safetensors.torch import load_file, save_file
from timm_stand_in import import_timm
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.evaluation.onnx_model import onnx_bytes
from dist_train.models.activation_budget import MODES, measure_parts, weigh
from dist_train.models.norm import norms
from dist_train.models.recompute import Recompute
from dist_train.models.registry import MODELS, Ability, build_model, find_model, require
from dist_train.models.trunk import Trunk

import_timm()

#: One of each family, and two that read frames: by convolutions and by attention.
FAST = (
    *("resnet3d-10", "r2plus1d-18", "x3d-s", "mobilenet3d", "convnext3d-tiny"),
    *("frames-cnn1d", "frames-transformer"),
)
#: One with each kind of block or reader, for what a new one may break.
BLOCKS = (*FAST, "resnet3d-50", "frames-lstm", "frames-attention", "frames-mean")
#: Arguments that make a model small, by the beginning of its name.
SMALL: dict[str, dict[str, Any]] = {
    "resnet3d": {"width": 4},
    "r2plus1d": {"width": 4},
    "x3d": {"width": 8},
    "mobilenet3d": {"width": 0.25},
    "convnext3d": {"width": 8},
    "densenet3d": {},
    "frames": {"encoder": "test_resnet", "hidden": 32},
}


def of(names: Iterable[str], fast: tuple[str, ...] = FAST) -> list[Any]:
    return [n if n in fast else pytest.param(n, marks=pytest.mark.soak) for n in names]


def able(ability: Ability, names: Iterable[str] = MODELS) -> list[str]:
    return [name for name in names if ability not in MODELS[name].cannot]


every_model = pytest.mark.parametrize("name", of(MODELS))
every_block = pytest.mark.parametrize("name", of(MODELS, BLOCKS))
#: For what takes long: a network of another depth has the same blocks.
OF_3D = (*(name for name in BLOCKS if not name.startswith("frames")), "densenet3d-121")
FAMILIES = (*OF_3D, "frames-cnn1d", "frames-transformer")


def size_of(name: str) -> int:
    """Height and width of clips: ConvNeXt and DenseNet divide them by 32 without a border, and
    deep networks amplify the rounding of few voxels."""
    return 16 if name in BLOCKS and name != "convnext3d-tiny" else 32


def depths_of(name: str) -> list[int]:
    return [3, 7, 5] if name in BLOCKS else [3, 11, 8]


def small(name: str, **settings: Any) -> nn.Module:
    """The same small model at each call, with norms and scales as after training."""
    torch.manual_seed(0)
    model = build_model(name, **SMALL[name.partition("-")[0]], **settings)
    for norm in norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".scale"):
            nn.init.uniform_(parameter, 0.2, 0.5)
    return model


@cache
def evaluated(name: str, in_channels: int = 1, outputs: int = 1) -> nn.Module:
    """A small model in eval mode and float64, which no test changes."""
    return small(name, in_channels=in_channels, outputs=outputs).eval().double()


@contextmanager
def fresh_pass(model: nn.Module) -> Iterator[None]:
    """Begins without gradients, and gives the buffers back what they had."""
    before = [buffer.clone() for buffer in model.buffers()]
    model.zero_grad()
    yield
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)


def clips_of(
    name: str,
    depths: list[int],
    dtype: torch.dtype = torch.float32,
    channels: int = 1,
    size: int | None = None,
) -> list[Tensor]:
    draw, size = torch.Generator().manual_seed(1), size or size_of(name)
    return [torch.rand(channels, n, size, size, dtype=dtype, generator=draw) for n in depths]


def padded(clips: list[Tensor], depth: int, fill: float) -> tuple[Tensor, Tensor]:
    channels, _, height, width = clips[0].shape
    batch = clips[0].new_full((len(clips), channels, depth, height, width), fill)
    for row, clip in zip(batch, clips, strict=True):
        row[:, : clip.shape[1]] = clip
    return batch, torch.tensor([clip.shape[1] for clip in clips])


# Its size.

#: Parameters for clips of 3 channels and for 400 classes, and where the figure is from.
PARAMETERS = {
    # MONAI's resnet10 to resnet200 without the biases of shortcuts (test_resnet3d_monai.py), and so
    # Hara et al.'s released networks.
    "resnet3d-10": 14_604_624,
    "resnet3d-18": 33_409_104,
    "resnet3d-34": 63_718_736,
    "resnet3d-50": 47_018_576,
    "resnet3d-101": 86_064_720,
    "resnet3d-152": 118_223_440,
    "resnet3d-200": 127_423_056,
    # torchvision's R2Plus1D_18_Weights.KINETICS400_V1: num_params.
    "r2plus1d-18": 31_505_325,
    # Tran et al. 2018, and the authors' VMZ: 63.7 M. Of 50 layers they give none: by the rule of M
    # there are as many as in the ResNet, as the next test shows.
    "r2plus1d-34": 63_697_175,
    "r2plus1d-50": 46_985_057,
    # pytorchvideo's create_x3d, which is by the author; 3.8 M and 6.1 M in the paper (table 4).
    "x3d-xs": 3_794_274,
    "x3d-s": 3_794_274,
    "x3d-m": 3_794_274,
    "x3d-l": 6_153_384,
    # Köpüklü et al. 2019, table 2: 3.12 M with 600 classes, so 256,200 fewer.
    "mobilenet3d": 2_866_448,
    # Liu et al. 2022: 28,589,128 with 1000 classes. Without 600 x 769 of these; with a stem of 3
    # frames and depthwise kernels of 3: 2 x 3 x 16 x 96 and 2 x 49 x 6,624 more.
    "convnext3d-tiny": 28_589_128 - 600 * 769 + 2 * 3 * 16 * 96 + 2 * 49 * 6_624,
    # monai.networks.nets.DenseNet121(spatial_dims=3, in_channels=3, out_channels=400).
    "densenet3d-121": 11_696_528,
} | {
    # torchvision's resnet18 without its classifier, 11,689,512 - 513,000, and a head of 400
    # classes; with torch's own layers of the same sizes between them.
    f"frames-{reader}": 11_689_512 - 513_000 + between + 400 * (width + 1)
    for reader, between, width in (
        ("mean", 0, 512),
        ("attention", 2 * 256 * 513 + 256, 512),
        ("lstm", 2 * 4 * 256 * (512 + 256 + 2), 512),
        ("cnn1d", 256 * 513 + 2 * 256 + 256 * (3 * 256 + 1), 256),
        # nn.TransformerEncoderLayer(256, 8, 1024), and a last normalisation.
        ("transformer", 256 * 513 + 789_760 + 2 * 256, 256),
    )
}


@pytest.mark.parametrize("name", of(PARAMETERS, (*BLOCKS, "resnet3d-101", "r2plus1d-50")))
def test_it_has_the_parameters_of_its_paper(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, in_channels=3, outputs=400)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_splitting_convolutions_keeps_their_weights() -> None:
    split, whole = PARAMETERS["r2plus1d-50"], PARAMETERS["resnet3d-50"]
    assert split == pytest.approx(whole, rel=1e-3)


@every_model
@torch.no_grad()
def test_logits_are_one_number_a_clip_or_a_row(name: str) -> None:
    clips = torch.rand(2, 2, 5, size_of(name), size_of(name), dtype=torch.float64)
    assert evaluated(name)(clips[:, :1]).shape == (2,)
    assert evaluated(name, 2, 3)(clips, None).shape == (2, 3)


# Padding.


@every_block
@torch.no_grad()
def test_padding_never_changes_a_prediction(name: str) -> None:
    model = evaluated(name)
    clips = clips_of(name, depths_of(name), torch.float64)
    alone = torch.cat([model(clip[None]) for clip in clips])
    # Else nothing would be compared.
    assert alone.std() > 1e-6
    deepest = max(depths_of(name))
    for depth, fill in ((deepest, 0.0), (deepest + 3, float("nan"))):
        torch.testing.assert_close(model(*padded(clips, depth, fill)), alone, rtol=1e-9, atol=1e-9)


@every_block
def test_training_on_padded_clips_is_training_on_the_clips(name: str) -> None:
    """And a gradient reaches every parameter. In float64, as few voxels amplify rounding."""
    results: list[list[Tensor]] = []
    model, clips = small(name).double(), clips_of(name, depths_of(name), torch.float64)
    deepest = max(depths_of(name))
    for depth, fill in ((deepest, 0.0), (deepest + 5, 3.0)):
        torch.manual_seed(2)
        with fresh_pass(model):
            loss = model(*padded(clips, depth, fill)).square().sum()
            loss.backward()
            buffers = [buffer.clone() for buffer in model.buffers()]
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.any(), parameter_name
        grads = [parameter.grad for parameter in model.parameters()]
        results.append([loss.detach(), *grads, *buffers])  # type: ignore[list-item]
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6 * float(results[0][0]))


# Precision and layout.


@pytest.mark.parametrize("name", of(FAMILIES))
def test_bfloat16_is_finite_and_near_float32(name: str) -> None:
    """Clips are large enough for oneDNN, see test_recompute.py. Gradients of fewer bits point the
    same way, in networks that are not so deep that random weights amplify the rounding of each
    layer."""
    model = small(name).eval()
    deepest = 2 * getattr(model, "frame_stride", 16) + 3
    clips, frames = padded(clips_of(name, [deepest // 2, deepest], size=32), deepest, 0.0)
    results = []
    for is_half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            logits = model(clips, frames)
        logits.sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((logits.detach(), grads))
    (whole, grads), (half, half_grads) = results
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0.1 * float(whole.abs().max()))
    assert torch.cosine_similarity(grads, half_grads, dim=0) > 0.9


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
# Not DenseNet: torch copies gradients of the slices that its layers were joined from.
@pytest.mark.parametrize("name", able("channels_last", OF_3D[:-1]))
def test_every_operation_is_channels_last(name: str) -> None:
    model = small(name).to(memory_format=LAYOUT)  # type: ignore[call-overload]
    clips = torch.rand(2, 1, 32, 64, 64).to(memory_format=LAYOUT)
    with Layouts() as layouts:
        model(clips, torch.tensor([32, 25])).sum().backward()
    assert layouts.seen > 50
    # The gradient of the average over voxels is one number a channel, expanded: a layout of none.
    assert len(layouts.wrong) <= 1, layouts.wrong


# Recomputing.


def trained(model: Trunk, name: str, mode: Recompute) -> list[Tensor]:
    """Loss, gradients, buffers and the random state after a training pass."""
    model.recompute = mode  # type: ignore[assignment]
    torch.manual_seed(2)
    with fresh_pass(model):
        loss = model(*padded(clips_of(name, [4, 7]), 7, 0.0)).square().mean()
        loss.backward()
        buffers = [buffer.clone() for buffer in model.buffers()]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *grads, *buffers, torch.get_rng_state()]


@pytest.mark.parametrize("name", of(able("recompute")))
def test_recomputing_changes_no_bit(name: str) -> None:
    model = small(name)
    assert isinstance(model, Trunk)
    plain = trained(model, name, "none")
    for mode in MODES[1:]:
        for value, expected in zip(trained(model, name, mode), plain, strict=True):
            assert torch.equal(value, expected), mode


@pytest.mark.slow
@pytest.mark.parametrize("name", able("recompute", FAMILIES))
def test_the_budget_is_what_a_step_takes(name: str) -> None:
    """Bytes that live during a real step, against those that ``activation_memory`` counts."""
    make: Callable[[], nn.Module] = partial(small, name)
    shape = (2, 1, 16, 64, 64)
    costs = measure_parts(make, shape)
    for mode in ("none", "cheap", "stage"):
        model = make()
        assert isinstance(model, Trunk)
        model.recompute = mode
        counted = weigh((mode,) * len(model.part_names), costs).bytes
        assert 0.95 < counted / peak_of_step(model, torch.rand(shape)) < 1.2, mode


# Files.


@every_model
@torch.no_grad()
def test_its_weights_come_back_from_a_file(name: str, tmp_path: Path) -> None:
    model = evaluated(name, 2, 3)
    save_file(model.state_dict(), tmp_path / "weights")
    torch.manual_seed(7)
    settings = SMALL[name.partition("-")[0]]
    again = build_model(name, in_channels=2, outputs=3, **settings).eval().double()
    again.load_state_dict(load_file(tmp_path / "weights"))
    batch = padded(clips_of(name, [5, 6], torch.float64, channels=2), 6, 0.0)
    assert torch.equal(again(*batch), model(*batch))


@pytest.mark.slow
# An export of frames-transformer or of a deep network takes half a minute.
@pytest.mark.parametrize("name", of(able("onnx", FAMILIES), ("r2plus1d-18", "mobilenet3d")))
@torch.no_grad()
def test_onnx_gives_the_same_logits(name: str) -> None:
    model = small(name).eval()
    size = size_of(name)
    session = onnxruntime.InferenceSession(onnx_bytes([model], (1, size, size), {}))
    for depths in ([7], [3, 19, 12]):
        clips, frames = padded(clips_of(name, depths), max(depths), 0.0)
        inputs = {"volumes": clips.numpy(), "frames": frames.numpy()}
        (logits,) = session.run(["logits"], inputs)
        np.testing.assert_allclose(logits[:, 0], model(clips, frames), rtol=1e-4, atol=1e-4)


# What it cannot.


def test_every_reason_is_a_sentence_about_the_model() -> None:
    for name, spec in MODELS.items():
        for ability, reason in spec.cannot.items():
            with pytest.raises(ModelError, match=f"{name} (is|has|cannot) "):
                require(name, ability, "train.x")
            assert not reason.endswith("."), name
        assert {"in_channels", "outputs"} <= find_model(name).arguments.keys()
