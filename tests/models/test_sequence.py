"""Encoders of frames and what reads their features: what the suite of all models does not say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, environment, losses_of, refused, tiny_config
from safetensors.torch import load_file, save_file
from timm_stand_in import import_timm
from torch import Tensor, nn

from dist_train.errors import ConfigError, ModelError
from dist_train.models.frame_encoder import FrameEncoder, FrameNorm
from dist_train.models.frame_sequence import READERS, FrameSequence
from dist_train.models.norm import norms
from dist_train.models.registry import build_model
from dist_train.models.sequence_heads import HEAD_WIDTH, Lstm, Transformer, _Layer, _positions
from dist_train.training.initial_weights import initial_model
from dist_train.training.train import train

import_timm()
import timm  # noqa: E402

#: timm's own networks for tests, one of each family that the docs name.
ENCODERS = ("test_resnet", "test_efficientnet", "test_convnext", "test_vit")
DEPTHS = [5, 1, 3]


def make(reader: str = "attention", encoder: str = "test_resnet", **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return build_model(f"frames-{reader}", encoder=encoder, hidden=HEAD_WIDTH, **settings)


def clips(fill: float = float("nan")) -> tuple[Tensor, Tensor]:
    """Clips of unequal depth and of odd height and width, padded."""
    x = torch.rand(3, 1, 7, 36, 44, generator=torch.Generator().manual_seed(1))
    for clip, depth in zip(x, DEPTHS, strict=True):
        clip[:, depth:] = fill
    return x, torch.tensor(DEPTHS)


def network(encoder: str, **settings: object) -> nn.Module:
    free = {"dynamic_img_size": True, "dynamic_img_pad": True} if encoder == "test_vit" else {}
    made: nn.Module = timm.create_model(encoder, num_classes=0, **free, **settings)
    return made


# The encoder.


@pytest.mark.parametrize("name", ENCODERS)
def test_features_of_real_frames_are_those_of_timm_s_network(name: str) -> None:
    """In training too: padding is not in the statistics, though timm knows no padding."""
    model = make("mean", name)
    assert isinstance(model, FrameSequence)
    theirs = network(name)
    theirs.load_state_dict(model.encoder.network.state_dict())
    x, frames = clips()
    real = torch.cat([clip[0, :n] for clip, n in zip(x, DEPTHS, strict=True)])
    mean, std = (torch.tensor(theirs.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    expected = theirs((real[:, None].expand(-1, 3, -1, -1) - mean) / std).split(DEPTHS)
    pooled = torch.stack([features.mean(0) for features in expected])
    logits = model(x, frames)
    torch.testing.assert_close(logits, model.head(pooled).squeeze(1), rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    model.head(pooled).sum().backward()
    for parameter, other in zip(
        model.encoder.network.parameters(), theirs.parameters(), strict=True
    ):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4 * scale)
    for own, other in zip(model.encoder.network.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_batch_normalisation_is_ours(name: str) -> None:
    """So that processes share statistics, and populations' can be taken."""
    model = make("mean", name)
    torch_s = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not torch_s
    assert len(list(norms(model))) > 5
    assert all(isinstance(norm, FrameNorm) for norm in norms(model))


@pytest.mark.parametrize(("channels", "seen"), [(1, 3), (2, 2), (3, 3)])
def test_grey_is_seen_as_three_channels_and_others_as_they_are(channels: int, seen: int) -> None:
    encoder = FrameEncoder("test_resnet", channels, {})
    assert encoder.mean.shape == (1, seen, 1, 1)
    assert encoder(torch.rand(2, channels, 32, 32)).shape == (2, encoder.features)


# What reads the features.


@pytest.mark.parametrize("reader", READERS)
def test_clips_in_a_batch_have_the_logits_and_gradients_of_each_alone(reader: str) -> None:
    model = make(reader, "test_convnext", layers=2, outputs=2).double()
    x, frames = clips()
    model(x.double(), frames).square().sum().backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for clip, depth in zip(x.double(), DEPTHS, strict=True):
        model(clip[None, :, :depth]).square().sum().backward()
    for parameter, grad in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize("reader", ["lstm", "cnn1d", "transformer"])
def test_the_order_of_frames_counts(reader: str) -> None:
    model, x = make(reader).eval(), torch.rand(2, 1, 6, 32, 32)
    assert (model(x) - model(x.flip(2))).abs().max() > 1e-5


def test_an_lstm_reads_to_the_last_frame_and_back() -> None:
    """A loop over its cells, by torch's own LSTM of one direction each."""
    torch.manual_seed(0)
    reader = Lstm(4, 3, 1, 0.0)
    ahead, back = nn.LSTM(4, 3, batch_first=True), nn.LSTM(4, 3, batch_first=True)
    state = reader.lstm.state_dict()
    ahead.load_state_dict({k: v for k, v in state.items() if "reverse" not in k})
    back.load_state_dict(
        {k.removesuffix("_reverse"): v for k, v in state.items() if "reverse" in k}
    )
    x = torch.rand(1, 5, 4)
    expected = torch.cat([ahead(x)[1][0][0], back(x.flip(1))[1][0][0]], 1)
    torch.testing.assert_close(reader(x, None), expected)


def test_a_transformer_layer_is_torch_s() -> None:
    torch.manual_seed(0)
    ours, width = _Layer(64, 0.0), 64
    theirs = nn.TransformerEncoderLayer(
        width, width // HEAD_WIDTH, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "mlp.0.",
        "linear2.": "mlp.2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    theirs.load_state_dict(
        {
            there + kind: ours.state_dict()[here + kind]
            for there, here in names.items()
            for kind in ("weight", "bias")
        }
    )
    x, real = torch.rand(2, 6, width), torch.arange(6) < torch.tensor([[6], [4]])
    expected = theirs(x, src_key_padding_mask=~real)
    got = ours(x, real[:, None, None])
    torch.testing.assert_close(got[real], expected[real])


def test_positions_tell_frames_apart() -> None:
    positions = _positions(torch.zeros(1, 200, 64))
    assert torch.cdist(positions, positions).fill_diagonal_(9).min() > 0.1


def test_an_adapter_at_first_changes_nothing() -> None:
    x, frames = clips()
    plain, adapted = make().eval(), make(adapter=4).eval()
    adapted.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(x, frames), adapted(x, frames))


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "resnet19"}, r"timm has no network 'resnet19'.*resnet18"),
        ({"encoder": "hf-hub:timm/resnet18"}, "timm has no network"),
        ({"encoder_args": {"depht": 3}}, "encoder_args: timm cannot make test_resnet so .*depht"),
        ({"encoder_args": {"pretrained": True}}, "pretrained is not to be set"),
        ({"layers": 0}, r"model.args.layers: it is 0"),
        ({"adapter": 0}, r"model.args.adapter: it is 0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make(**settings)  # type: ignore[arg-type]


def test_a_width_that_no_heads_fill_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model.args.hidden.*multiple of 32"):
        Transformer(8, 40, 1, 0.0)


def test_frames_of_a_size_that_the_network_has_not_are_refused() -> None:
    model = make(encoder="swin_tiny_patch4_window7_224")
    with pytest.raises(ModelError, match=r"clip.size.*takes no frames of 32 x 32.*img_size"):
        model(torch.rand(1, 1, 2, 32, 32))


def test_without_timm_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from dist_train.models.registry import build_model\n"
        "build_model('frames-lstm')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert "need timm" in done.stderr
    assert "pip install 'dist_train[timm]'" in done.stderr


# Weights and training.

ARGS = ["model.width=64", "model.stem_pool=true", "model.args.encoder=test_resnet"]

#: One epoch of 6 steps.
SHORT = ["train.epochs=1", "snapshots.at=[1]"]


@pytest.fixture
def weights(tmp_path: Path) -> Callable[..., Path]:
    """A file of a 2D network with its classifier, as timm's hub has."""

    def write(name: str = "test_resnet") -> Path:
        torch.manual_seed(5)
        path = tmp_path / f"{name}.safetensors"
        save_file(timm.create_model(name).state_dict(), path)
        return path

    return write


def test_a_frozen_encoder_keeps_the_weights_of_a_file_while_the_adapter_learns(
    store: Path, tmp_path: Path, weights: Callable[..., Path]
) -> None:
    path = weights()
    config = tiny_config(
        store, tmp_path / "run", *ARGS, "model.name=frames-transformer", "model.args.hidden=32",
        "model.args.adapter=8", f"model.init={path}", "finetune.freeze=[encoder]",
        *SHORT,
    )  # fmt: skip
    model, source = initial_model(config)
    assert source is not None
    assert source.layout == "timm"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in load_file(path).items():
        if not name.startswith("fc."):
            assert torch.equal(before[f"encoder.network.{name}"], tensor), name
    last: dict[str, Tensor] = {}

    def look(trainer: object, step: int) -> None:
        module = trainer.backend.module  # type: ignore[attr-defined]
        assert all(p.grad is None for p in module.encoder.parameters())
        last.update({n: t.clone() for n, t in module.state_dict().items()})

    train(config, before_step=look)
    changed = {n.partition(".")[0] for n in last if not torch.equal(last[n], before[n])}
    assert changed == {"adapter", "reader", "head"}


def test_a_short_training_lowers_the_loss(store: Path, tmp_path: Path) -> None:
    settings = [*ARGS, *SHORT, "model.name=frames-lstm", "model.args.hidden=32", "optim.lr=0.01"]
    train(tiny_config(store, tmp_path / "run", *settings))
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < 0.7 * losses[0]


def test_weights_of_another_network_are_refused(
    store: Path, tmp_path: Path, weights: Callable[..., Path]
) -> None:
    settings = [*ARGS, "model.name=frames-mean"]
    with pytest.raises(ConfigError, match="no layout has tensors"):
        initial_model(
            tiny_config(
                store, tmp_path / "run", *settings, f"model.init={weights('test_convnext')}"
            )
        )
    with pytest.raises(ConfigError, match="encodes no frames"):
        initial_model(
            tiny_config(
                store, tmp_path / "run", f"model.init={weights()}", "model.init_layout=timm"
            )
        )


def test_what_an_lstm_cannot_is_refused(store: Path, tmp_path: Path) -> None:
    message = refused(
        "train", f"store={store}", f"out={tmp_path / 'run'}", "model.name=frames-lstm",
        "model.recompute=block",
    )  # fmt: skip
    assert "model.recompute: frames-lstm has an encoder that runs as one part" in message
