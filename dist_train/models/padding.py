"""Which frames of a batch padded in depth are real.

Throughout ``models``, a ``ValidFrames | None`` goes along with a batch; None stands for a batch
without padding, which then costs nothing extra.
"""

from functools import cached_property

import torch
from torch import Tensor

from dist_train.errors import ModelError


class ValidFrames:
    """The real frames of a batch [B, C, D, H, W].

    Attributes:
        mask: bool [B, D], true on real frames; on the CPU, or where the depths were given.
        on_device: the same on the batch's device.
    """

    def __init__(self, mask: Tensor, device: torch.device) -> None:
        self.mask = mask
        self.on_device = mask.contiguous().to(device, non_blocking=True)

    @cached_property
    def index(self) -> Tensor:
        """int64 [N] on the batch's device, the places of the N real frames among B * D. Of a mask
        on the CPU; of another one the host waits for the device to know N."""
        found = self.mask.flatten().nonzero().squeeze(1)
        return found.to(self.on_device.device, non_blocking=True)

    def gather(self, x: Tensor) -> Tensor:
        """Take the real frames of [B, C, D, H, W] as a batch of images [N, C, H, W]."""
        # With channels last, B and D are adjacent and this is one copy of N contiguous rows.
        frames = x.permute(0, 2, 3, 4, 1).flatten(0, 1)
        return frames.index_select(0, self.index).permute(0, 3, 1, 2)

    def scatter(self, images: Tensor, like: Tensor) -> Tensor:
        """Put [N, C, H, W] back among zeros, in the shape and memory format of ``like``.

        The result may be a view, on which autograd copies for an operation in place.
        """
        batch, channels, depth, height, width = like.shape
        frames = images.new_zeros(batch * depth, height, width, channels)
        frames[self.index] = images.permute(0, 2, 3, 1)
        x = frames.view(batch, depth, height, width, channels).permute(0, 4, 1, 2, 3)
        return x.contiguous() if like.is_contiguous() else x


def valid_frames(frames: Tensor | None, clips: Tensor) -> ValidFrames | None:
    """Find the padding of a batch.

    Args:
        frames: integer [B], the true depth of each clip, whose real frames come first; None when
            all frames are real. On the CPU they are checked; on a GPU they are taken as they are,
            as reading them would wait for it.
        clips: [B, C, D, H, W].

    Returns:
        None if no clip is padded, as far as the host knows.

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
    if frames.device.type != "cpu":
        return ValidFrames(
            torch.arange(depth, device=frames.device) < frames[:, None], clips.device
        )
    shortest, longest = int(frames.min()), int(frames.max())
    if shortest < 1 or longest > depth:
        raise ModelError(
            f"frames is {frames.tolist()} for clips padded to {depth}",
            fix=f"Pass the depth of each clip without padding, from 1 to {depth}",
        )
    if shortest == depth:
        return None
    return ValidFrames(torch.arange(depth) < frames[:, None], clips.device)


def strided(valid: ValidFrames | None, stride: int) -> ValidFrames | None:
    """The real frames behind a convolution or pooling of kernel 2p + 1 and padding p.

    Output frame j is centred on input frame ``stride * j`` and is real when that frame is. A clip
    of L frames leaves with (L - 1) // stride + 1: as many as it would have alone.
    """
    if valid is None or stride == 1:
        return valid
    return ValidFrames(valid.mask[:, ::stride], valid.on_device.device)


def clear_padding(x: Tensor, valid: ValidFrames | None) -> Tensor:
    """Set the padded frames of [B, C, D, H, W] to zero, whatever they hold."""
    if valid is None:
        return x
    real = valid.on_device[:, None, :, None, None]
    return torch.where(real, x, 0.0)  # masked_fill would lose channels_last_3d
