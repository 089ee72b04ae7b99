"""Networks that read the features of a clip's frames in order.

Each maps a sequence [B, D, F] in float32, with real frames ``valid``, to [B, ``width``]. Padded
frames have no influence on the result, whatever they hold.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from dist_train.errors import ModelError
from dist_train.models.padding import ValidFrames

#: Channels of an attention head.
HEAD_WIDTH = 32


class Mean(nn.Module):
    """The mean over real frames."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.width = features

    def forward(self, x: Tensor, valid: ValidFrames | None) -> Tensor:
        return _mean(x, valid)


class Attention(nn.Module):
    """Gated attention pooling (Ilse, Tomczak & Welling 2018): a weighted mean over real frames."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.width = features
        self.content, self.gate = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor, valid: ValidFrames | None) -> Tensor:
        scores = self.score(self.content(x).tanh() * self.gate(x).sigmoid())
        if valid is not None:
            scores = scores.masked_fill(~valid.on_device[:, :, None], -torch.inf)
        pooled: Tensor = (scores.softmax(1) * _cleared(x, valid)).sum(1)
        return pooled


class Lstm(nn.Module):
    """A bidirectional LSTM (Hochreiter & Schmidhuber 1997); its last state in both directions."""

    def __init__(self, features: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.width = 2 * hidden
        self.lstm = nn.LSTM(
            features, hidden, layers,
            batch_first=True, bidirectional=True, dropout=dropout if layers > 1 else 0.0,
        )  # fmt: skip

    def forward(self, x: Tensor, valid: ValidFrames | None) -> Tensor:
        sequence: Tensor | PackedSequence = x
        if valid is not None:
            lengths = valid.mask.sum(1).cpu()
            sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, (state, _) = self.lstm(sequence)
        both: Tensor = state[-2:].transpose(0, 1).flatten(1)
        return both


class Cnn1d(nn.Module):
    """Residual convolutions over depth, and the mean over real frames."""

    def __init__(self, features: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.width = hidden
        self.enter = nn.Linear(features, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.convs = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, padding=1) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: ValidFrames | None) -> Tensor:
        x = self.enter(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = _cleared(norm(x), valid).transpose(1, 2)
            x = x + self.dropout(F.gelu(conv(y).transpose(1, 2)))
        return _mean(x, valid)


class Transformer(nn.Module):
    """A pre-norm Transformer encoder (Vaswani et al. 2017; Xiong et al. 2020) with sinusoidal
    positions, and the mean over real frames."""

    def __init__(self, features: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        if hidden % HEAD_WIDTH:
            raise ModelError(
                f"hidden is {hidden}",
                where="model.args.hidden",
                fix=f"Give a multiple of {HEAD_WIDTH}, the width of an attention head.",
            )
        self.width = hidden
        self.enter = nn.Linear(features, hidden)
        self.layers = nn.ModuleList(_Layer(hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, valid: ValidFrames | None) -> Tensor:
        x = self.enter(x)
        x = x + _positions(x)
        mask = None if valid is None else valid.on_device[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return _mean(self.norm(x), valid)


class _Layer(nn.Module):
    # torch's own layer leaves its Python code in eval mode, for a kernel that ONNX lacks.
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map [B, D, W] to the same shape; ``mask`` [B, 1, 1, D] is true where keys are real."""
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        output: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return output


def _positions(x: Tensor) -> Tensor:
    """Sines and cosines of the positions of [B, D, W]: [D, W], of wavelengths from 2 pi to
    10,000 * 2 pi."""
    depth, width = x.shape[1:]
    rates = torch.arange(0, width, 2, device=x.device, dtype=x.dtype)
    rates = torch.exp(rates * (-math.log(10_000.0) / width))
    angles = torch.arange(depth, device=x.device, dtype=x.dtype)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def _cleared(x: Tensor, valid: ValidFrames | None) -> Tensor:
    """[B, D, F] with zeros in padded frames."""
    return x if valid is None else torch.where(valid.on_device[:, :, None], x, 0.0)


def _mean(x: Tensor, valid: ValidFrames | None) -> Tensor:
    if valid is None:
        return x.mean(1)
    return _cleared(x, valid).sum(1) / valid.on_device.sum(1, keepdim=True)
