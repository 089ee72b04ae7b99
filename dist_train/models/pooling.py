"""Pooling that is blind to padding."""

import torch
from torch import Tensor

from dist_train.models.frames import ValidFrames


def global_average_pool(x: Tensor, valid: ValidFrames | None = None) -> Tensor:
    """Average [B, C, D, H, W] over the voxels of its real frames.

    Returns:
        [B, C], in float32 also where ``x`` is of lower precision.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if valid is None:
        return x.mean(dim=(2, 3, 4), dtype=dtype)
    real = valid.on_device[:, None]
    of_frames = x.mean(dim=(3, 4), dtype=dtype).masked_fill(~real, 0.0)
    return of_frames.sum(dim=2) / real.sum(dim=2)
