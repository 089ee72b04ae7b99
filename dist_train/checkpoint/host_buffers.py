"""Host copies of tensors, in memory that is reused from one checkpoint to the next."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostBuffers:
    """Buffers of the size of the last copy.

    New memory would cost more than the copy: the system clears and maps each page when it is first
    touched.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors of any device, each in its own memory format.

        Returns:
            Host tensors by the same names, valid until the next call. Copies from CUDA are in
            pinned memory, and complete: the device is waited for once, after the last copy.
        """
        before, self._buffers = self._buffers, {}
        for name, tensor in tensors.items():
            buffer = before.pop(name, None)
            if buffer is None or _form(buffer) != _form(tensor):
                buffer = torch.empty_like(
                    tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False
                )
            self._buffers[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._buffers)


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype
