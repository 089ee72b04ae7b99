"""Errors that mean that the device's memory does not suffice, and freeing of what torch holds."""

from __future__ import annotations

import torch

#: torch's words after no plan of cuDNN ran. It drops the reasons, of which nearly all are a lack of
#: memory for the workspace; rarely cuDNN has no kernel at all.
NO_ENGINE = "unable to find an engine to execute this computation"
#: Parts of other errors than ``torch.OutOfMemoryError``. CUDNN_STATUS_NOT_SUPPORTED is not among
#: them: it refuses a layout or a shape, which fewer clips do not change.
SIGNS = (
    NO_ENGINE,
    "Unable to find a valid cuDNN algorithm to run convolution",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    # Of the host, in training on its CPUs.
    "DefaultCPUAllocator: can't allocate memory",
    # Of compiled kernels.
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer clips at once may help.

    True also if cuDNN has no kernel for a convolution, which torch reports in the same words
    (``NO_ENGINE``). So a caller that cannot use fewer clips must end with the error.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def free_cache(device: torch.device) -> None:
    """Give memory that torch's allocator holds for reuse back to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
