"""A 2D encoder of single frames, and a network that reads their features in order."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.frame_encoder import FrameEncoder
from dist_train.models.padding import ValidFrames
from dist_train.models.sequence_heads import Attention, Cnn1d, Lstm, Mean, Transformer
from dist_train.models.trunk import Parts, Trunk

Reader = Literal["lstm", "cnn1d", "transformer", "attention", "mean"]
READERS: tuple[Reader, ...] = get_args(Reader)


def cannot_of(reader: Reader) -> dict[Any, str]:
    """What the model cannot do, by the registry's names, in its words."""
    reasons = {
        "cuda_graphs": "cannot be captured: it encodes as many frames as are real",
        "recompute": "has an encoder that runs as one part, so recomputing it would take as much "
        "memory: raise train.accumulate",
    }
    if reader == "lstm":
        reasons["onnx"] = (
            "has an LSTM over packed sequences, which have no ONNX form: take frames-transformer"
        )
    return reasons


class FrameSequence(Trunk):
    """Logits of clips from the features of their frames.

    Only real frames go through the encoder: padding costs nothing, and its batch normalisation
    counts none. What follows computes in float32, also under autocast.

    Args:
        reader: what reads the features.
        encoder: a network of timm, such as resnet18, efficientnet_b0, resnest50d, convnext_tiny or
            vit_small_patch16_224.
        encoder_args: arguments of timm's network.
        adapter: width of a bottleneck behind the encoder (``Adapter``), for one that is frozen.
        hidden: width of the reader; a mean has none.
        layers: of an LSTM, a 1D CNN or a Transformer.
        dropout: probability of dropping a value within the reader, and a feature before the head.
    """

    part_names = ("encoder", "reader")

    def __init__(
        self,
        reader: Reader,
        *,
        encoder: str = "resnet18",
        encoder_args: Mapping[str, Any] | None = None,
        adapter: int | None = None,
        hidden: int = 256,
        layers: int = 1,
        in_channels: int = 1,
        outputs: int = 1,
        dropout: float = 0.0,
    ) -> None:
        for name, number in {"hidden": hidden, "layers": layers, "adapter": adapter}.items():
            if number is not None and number < 1:
                raise ModelError(
                    f"it is {number}", where=f"model.args.{name}", fix="Give 1 or more."
                )
        super().__init__(in_channels)
        self.encoder = FrameEncoder(encoder, in_channels, encoder_args or {})
        features = self.encoder.features
        self.adapter = nn.Identity() if adapter is None else Adapter(features, adapter)
        self.reader = _reader(reader, features, hidden, layers, dropout)
        self._add_head(cast(int, self.reader.width), outputs, dropout)

    @property
    def frame_stride(self) -> int:
        return 1

    @property
    def spatial(self) -> nn.Module:
        """The part whose layers keep height and width."""
        return self.encoder

    def parts(self, valid: ValidFrames | None = None) -> Parts:
        return [[partial(self._encode, valid=valid)], [partial(self._read, valid=valid)]], None

    def _encode(self, x: Tensor, valid: ValidFrames | None) -> Tensor:
        """Features [B, F, D, 1, 1] of [B, C, D, H, W], zero in padded frames."""
        batch, _, depth = x.shape[:3]
        # An exported graph has no number of real frames yet: it encodes padded ones too.
        if valid is None or torch.compiler.is_exporting():
            images = x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)
            features = self.encoder(images)
        else:
            real = self.encoder(valid.gather(x))
            padded = real.new_zeros(batch * depth, real.shape[1])
            features = padded.index_copy(0, valid.index, real)
        rows: Tensor = features.unflatten(0, (batch, depth))
        return rows.transpose(1, 2)[..., None, None]

    def _read(self, x: Tensor, valid: ValidFrames | None) -> Tensor:
        """One vector a clip, [B, W, 1, 1, 1], of features [B, F, D, 1, 1]."""
        with torch.autocast(x.device.type, enabled=False):
            sequence = x.flatten(2).transpose(1, 2).to(self.head.weight.dtype)
            vector: Tensor = self.reader(self.adapter(sequence), valid)
        return vector[..., None, None, None]


class Adapter(nn.Module):
    """A residual bottleneck (Houlsby et al. 2019), which at first changes nothing."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., F] to the same shape."""
        adapted: Tensor = x + self.up(nn.functional.gelu(self.down(x)))
        return adapted


def _reader(reader: Reader, features: int, hidden: int, layers: int, dropout: float) -> nn.Module:
    if reader == "mean":
        return Mean(features)
    if reader == "attention":
        return Attention(features, hidden)
    readers = {"lstm": Lstm, "cnn1d": Cnn1d, "transformer": Transformer}
    return readers[reader](features, hidden, layers, dropout)
