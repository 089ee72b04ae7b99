"""The real frames of a batch that is padded in depth.

Throughout ``models`` a ``ValidFrames | None`` accompanies a batch. None means no padding, and costs
nothing.
"""

from functools import cached_property

import torch
from torch import Tensor

from dist_train.errors import ModelError


class ValidFrames:
    """The real frames of a batch [B, C, D, H, W].

    ``mask`` is bool [B, D], true on real frames, on the device on which the depths were given.
    ``on_device`` is the same mask on the batch's device.
    """

    def __init__(self, mask: Tensor, device: torch.device) -> None:
        self.mask = mask
        self.on_device = mask.contiguous().to(device, non_blocking=True)

    @cached_property
    def index(self) -> Tensor:
        """Positions of the N real frames among B * D: int64 [N] on the batch's device.

        If the mask is on a GPU, the host waits for it to learn N.
        """
        positions = self.mask.flatten().nonzero().squeeze(1)
        return positions.to(self.on_device.device, non_blocking=True)

    def gather(self, x: Tensor) -> Tensor:
        """Take the real frames of [B, C, D, H, W] as a batch of images [N, C, H, W]."""
        # With channels last, B and D are adjacent and this is one copy of N contiguous rows.
        frames = x.permute(0, 2, 3, 4, 1).flatten(0, 1)
        return frames.index_select(0, self.index).permute(0, 3, 1, 2)

    def scatter(self, images: Tensor, like: Tensor) -> Tensor:
        """Inverse of ``gather``: [N, C, H, W] to the shape and memory format of ``like``, padded
        frames zero."""
        batch, channels, depth, height, width = like.shape
        frames = images.new_zeros(batch * depth, height, width, channels)
        frames[self.index] = images.permute(0, 2, 3, 1)
        x = frames.view(batch, depth, height, width, channels).permute(0, 4, 1, 2, 3)
        return x.contiguous() if like.is_contiguous() else x


def valid_frames(frames: Tensor | None, clips: Tensor) -> ValidFrames | None:
    """The real frames of a batch; None if the host knows that no clip is padded.

    Args:
        frames: integer [B], the number of real frames of each clip, which come first. None: all
            frames are real. A CPU tensor is checked; a GPU tensor is not, as reading it would make
            the host wait, and nor is the input of an export, which has no values yet.
        clips: [B, C, D, H, W].

    Raises:
        ModelError: ``frames`` is not one integer from 1 to D for each clip.
    """
    if frames is None:
        return None
    batch, depth = clips.shape[0], clips.shape[2]
    if frames.shape != (batch,) or frames.dtype not in (torch.int64, torch.int32):
        raise ModelError(
            f"frames is {frames.dtype} {list(frames.shape)} for a batch of {batch} clips",
            fix="Pass one integer for each clip: its depth without padding",
        )
    if frames.device.type == "cpu" and not torch.compiler.is_exporting():
        shortest, longest = int(frames.min()), int(frames.max())
        if shortest < 1 or longest > depth:
            raise ModelError(
                f"frames is {frames.tolist()} for clips padded to {depth}",
                fix=f"Pass the depth of each clip without padding, from 1 to {depth}",
            )
        if shortest == depth:
            return None
    mask = torch.arange(depth, device=frames.device) < frames[:, None]
    return ValidFrames(mask, clips.device)


def strided(valid: ValidFrames | None, stride: int) -> ValidFrames | None:
    """The real output frames of a convolution or pooling with kernel 2p + 1 and padding p.

    Output frame j is centred on input frame ``stride * j``, and is real if that frame is. A clip of
    L frames gets (L - 1) // stride + 1 real output frames, as many as without padding.
    """
    if valid is None or stride == 1:
        return valid
    return ValidFrames(valid.mask[:, ::stride], valid.on_device.device)


def clear_padding(x: Tensor, valid: ValidFrames | None) -> Tensor:
    """Set the padded frames of [B, C, D, H, W] to zero, also if they hold NaN."""
    if valid is None:
        return x
    real = valid.on_device[:, None, :, None, None]
    return torch.where(real, x, 0.0)  # masked_fill would lose channels_last_3d
