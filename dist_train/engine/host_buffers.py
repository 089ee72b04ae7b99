"""Copies of tensors in host memory that is kept for the next time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class HostBuffers:
    """Memory that the system hands out anew costs more than the copy into it: each page of it is
    cleared and mapped when it is first touched. So the buffers stay, as large as what they hold."""

    _held: dict[str, tuple[object, Tensor]] = field(default_factory=dict)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors of any device, each in its own memory format.

        Returns:
            Host tensors by the same names, good until the next call. From CUDA they are in pinned
            memory, and all there: it waits for the device once, after the last of them.
        """
        before, self._held = self._held, {}
        devices = set()
        for name, tensor in tensors.items():
            form = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_cuda)
            held_form, buffer = before.pop(name, (None, tensor))
            if held_form != form:
                buffer = torch.empty_like(
                    tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False
                )
            self._held[name] = form, buffer
            buffer.copy_(tensor.detach(), non_blocking=True)
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return {name: buffer for name, (_, buffer) in self._held.items()}
