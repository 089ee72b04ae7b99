"""Convolution in 3D that is right where the CPU library's is not."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """``torch.nn.Conv3d``, with more depth padding on the CPU for clips shallower than the kernel.

    For those, oneDNN's gradient of the weights holds memory that was never written: values up to
    1e36, other ones in each run, in every memory layout. Seen in oneDNN 3.12 (torch 2.13,
    AVX512-BF16): in bfloat16 with fewer frames than the kernel is deep, which befalls layer 4 of a
    ResNet for clips of up to 32 frames; in float32 with a 7x7x7 kernel of stride 2 and at most 7
    frames. More frames of zeros behind the clip are what the convolution pads it with anyway, so
    the outputs that are kept, and all gradients, are the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, D, H, W] to [B, C', D', H', W']."""
        depth, stride = input.shape[2], self.stride[0]
        enough = self._right_from(input)
        if depth >= enough:
            return super().forward(input)
        deeper = super().forward(F.pad(input, (0, 0, 0, 0, 0, enough - depth)))
        return deeper[:, :, : (depth - 1) // stride + 1]

    def _right_from(self, input: Tensor) -> int:
        """The depth from which the library's gradient is right."""
        kernel = self.kernel_size[0]
        if input.device.type != "cpu" or kernel == 1:
            return 1
        if kernel > 3 and self.stride[0] > 1:
            return kernel + 1
        in_bfloat16 = input.dtype is torch.bfloat16 or torch.is_autocast_enabled("cpu")
        return kernel if in_bfloat16 else 1
