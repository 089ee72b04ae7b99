"""Whether a process works on a CUDA device, and the refusal if that is not what was asked."""

from __future__ import annotations

import os

import torch

from dist_train.config import TrainSettings
from dist_train.errors import BackendError


def chosen_cuda(settings: TrainSettings) -> bool:
    """True for the CUDA device of this process, False for the CPU.

    Raises:
        BackendError: ``train.device``, the launcher and the machine contradict each other.
    """
    there, launched = torch.cuda.is_available(), "WORLD_SIZE" in os.environ
    if settings.device == "cpu":
        if there and settings.backend.startswith("zero"):
            fix = "Hide them by CUDA_VISIBLE_DEVICES='', or choose ddp or fsdp2."
            raise _refusal("ZeRO takes the CUDA devices that it sees", fix)
        return False
    if there:
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if launched and processes > gpus:
            raise _refusal(
                f"the launcher started {processes} processes here, and there are {gpus} CUDA "
                "devices",
                f"Start {gpus} on this machine.",
            )
        return True
    if settings.device == "cuda" or launched:
        # Hours on a CPU are a dear way to learn that a driver is missing.
        why = "it asks for one" if settings.device == "cuda" else "a launcher started this process"
        fix = "See 'dist-train doctor', or set train.device=cpu to use CPUs."
        raise _refusal(f"there is no CUDA device here, and {why}", fix)
    return False


def _refusal(what: str, fix: str) -> BackendError:
    return BackendError(what, where="train.device", fix=fix)
