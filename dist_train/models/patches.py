"""A convolution of few channels as one in depth alone, over patches of its kernel's size.

cuDNN's kernels for 3D take the channels of one tap at a time, 32 or 64 of them, and waste what the
input does not have: of a stem's one channel, or four by space to depth, that is nearly all. Here
the taps of a frame become channels first (im2col, Chellapilla et al. 2006, in the plane only), 8 x
8 of them for a kernel of 7 x 7: as large as the output, where all three axes would be seven times
that. The weights are the same numbers, rearranged, beside zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.models.conv import Conv3d
from dist_train.models.remake import remade
from dist_train.models.space_to_depth import Axis, axis_of, pads


class PatchConv3d(Conv3d):
    """``Conv3d`` of a float input over patches. Its parameters have ``Conv3d``'s shapes.

    Results differ from those of ``Conv3d`` by rounding alone: sums run in another order.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, D, H, W] to [B, C', D', H', W'], channels last."""
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Patches are many times what they are made of.
            input = input.to(torch.get_autocast_dtype(device))
        _, *plane = (axis_of(self, axis, length) for axis, length in enumerate(input.shape[2:]))
        kernel = F.pad(self.weight, pads([(0, 0), *((of_axis.zeros, 0) for of_axis in plane)]))
        weight = kernel.permute(0, 1, 3, 4, 2).flatten(1, 3)[..., None, None]
        layout = torch.channels_last_3d
        return F.conv3d(
            remade(self._patches, input),
            weight.contiguous(memory_format=layout),
            stride=(self.stride[0], 1, 1),
        )

    def _patches(self, x: Tensor) -> Tensor:
        """[B, C, D, H, W] to [B, C * k_h * k_w, D + padding, H', W'], channels last."""
        _, *plane = (axis_of(self, axis, length) for axis, length in enumerate(x.shape[2:]))
        # All padding is in the input, so it is never shallower than the kernel: see conv.py.
        depth = self.padding[0]
        assert isinstance(depth, int)
        x = F.pad(
            x, pads([(depth, depth), *((of_axis.before, of_axis.after) for of_axis in plane)])
        )
        lines, columns = plane
        # Two columns of two bytes each are copied as one value, in half the time.
        pairs = 2 if _has_pairs(x, columns) else 1
        values = x if pairs == 1 else x[:, 0].view(torch.int32)[:, None]
        values = values.unfold(3, lines.stride * lines.blocks, lines.stride)
        stride = columns.stride // pairs
        values = values.unfold(4, stride * columns.blocks, stride)
        values = values.permute(0, 2, 3, 4, 1, 5, 6).flatten(4)
        if pairs == 2:
            values = values.view(x.dtype)
        return values.permute(0, 4, 1, 2, 3)


def _has_pairs(x: Tensor, columns: Axis) -> bool:
    """Whether windows of one channel begin at even columns. Autograd knows no other dtype."""
    even = columns.stride % 2 == 0
    return even and x.shape[1] == 1 and x.element_size() == 2 and not x.requires_grad
