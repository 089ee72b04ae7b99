"""What all networks share whose layers are one chain of parts: running, recomputing, the head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import ClassVar, cast, get_args

import torch
from torch import Tensor, nn

from dist_train.errors import ModelError
from dist_train.models.layers import global_average_pool
from dist_train.models.padding import ValidFrames, clear_padding, strided, valid_frames
from dist_train.models.recompute import Recompute, Step, run_part
from dist_train.models.running import batched_updates

#: One mode for each part of a network.
RecomputePlan = tuple[Recompute, ...]
NOTHING: Recompute = "none"
#: The steps of each part, in order, and the real frames of the last output.
Parts = tuple[list[list[Step]], ValidFrames | None]


class Trunk(nn.Module):
    """Base of networks for clips of unequal depth: parts in a chain, an average over real voxels,
    dropout, and a linear layer.

    A network calls ``_add_head`` last in its constructor, and lists its steps by ``parts``. Padding
    in depth must not change results. In eval mode a clip's logits are the same alone, in any batch
    and at any padding. In training mode loss and gradients depend on real frames only.

    Attributes:
        part_names: names of the parts.
        blocks: modules that are sharded one by one (FSDP).
        in_channels: channels of a clip.
    """

    part_names: ClassVar[tuple[str, ...]]
    blocks: nn.ModuleList

    def __init__(self, in_channels: int, recompute: Recompute | RecomputePlan = "none") -> None:
        super().__init__()
        self.in_channels, self.recompute = in_channels, recompute

    def _add_head(self, features: int, outputs: int, dropout: float) -> None:
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(features, outputs)
        nn.init.zeros_(self.head.bias)

    @abstractmethod
    def parts(self, valid: ValidFrames | None = None) -> Parts:
        """The steps of each part, for clips with the real frames ``valid``."""

    @property
    @abstractmethod
    def frame_stride(self) -> int:
        """Frames of a clip for each frame of the last part's output, or more."""

    def _block_parts(self, valid: ValidFrames | None, repeats: Sequence[int]) -> Parts:
        """A part for each number of blocks, of ``blocks`` in order. A block has a ``stride`` in
        depth, and maps ``(x, before, after)``, the real frames of its input and output."""
        parts: list[list[Step]] = []
        blocks = iter(self.blocks)
        for repeat in repeats:
            steps: list[Step] = []
            for block in islice(blocks, repeat):
                before, valid = valid, strided(valid, cast(int, block.stride))
                steps.append(partial(block, before=before, after=valid))
            parts.append(steps)
        return parts, valid

    def forward(self, x: Tensor, frames: Tensor | None = None) -> Tensor:
        """Logits of clips [B, C, D, H, W]: [B] of a network with one output, else [B, outputs].

        The logits have the dtype of the parameters, also under autocast: in bfloat16, of 8
        significant bits, clips would tie.

        Args:
            x: floating point. The content of padded frames is ignored.
            frames: see ``valid_frames``. None (faster): all frames are real.

        Raises:
            ModelError: the clips or ``frames`` have another shape or range.
        """
        check_clips(x, self.in_channels)
        valid = valid_frames(frames, x)
        x = clear_padding(x, valid)
        parts, valid = self.parts(valid)
        modes = self.recompute if self.training else tuple(NOTHING for _ in parts)
        # Exporters trace eval mode, in which running statistics do not change.
        with batched_updates() if self.training else nullcontext():
            for mode, steps in zip(modes, parts, strict=True):
                x = run_part(mode, steps, x)
        features = global_average_pool(x, valid)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.classify(features.to(self.head.weight.dtype))
        # ONNX, unlike torch, refuses to squeeze an axis that is longer.
        return logits.squeeze(1) if logits.shape[1] == 1 else logits

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, outputs] of pooled features [B, C]."""
        logits: Tensor = self.head(self.dropout(features))
        return logits

    @property
    def recompute(self) -> RecomputePlan:
        """A mode of ``recompute.py`` for each of ``part_names``. Assign one mode to set all."""
        return self._recompute

    @recompute.setter
    def recompute(self, modes: Recompute | Sequence[Recompute]) -> None:
        known, names = get_args(Recompute), self.part_names
        plan = (modes,) * len(names) if isinstance(modes, str) else tuple(modes)
        if len(plan) != len(names) or not set(known).issuperset(plan):
            raise ModelError(
                f"recompute is {modes!r}",
                fix=f"Give one of {', '.join(known)}, or one for each of {', '.join(names)}",
            )
        self._recompute = plan


def check_clips(x: Tensor, channels: int) -> None:
    """Raise ``ModelError`` unless clips are floating point [B, channels, D, H, W]."""
    if x.ndim != 5 or x.shape[1] != channels or not x.is_floating_point():
        raise ModelError(
            f"clips are {x.dtype} {list(x.shape)}",
            fix=f"Pass floating point [B, {channels}, D, H, W]",
        )
