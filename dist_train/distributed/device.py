"""Whether a process trains on a CUDA device, and the refusal where that is not what was asked."""

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
            raise BackendError(
                "ZeRO takes the CUDA devices that it sees",
                where="train.device",
                fix="Hide them by CUDA_VISIBLE_DEVICES='', or choose ddp or fsdp2.",
            )
        return False
    if there:
        processes, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if launched and processes > cards:
            raise BackendError(
                f"the launcher started {processes} processes here, and there are {cards} CUDA "
                "devices",
                where="train.device",
                fix=f"Start {cards} on this machine.",
            )
        return True
    if settings.device == "cuda" or launched:
        # Hours on a CPU are a dear way to learn that a driver is missing.
        who = "it asks for one" if settings.device == "cuda" else "a launcher started this process"
        raise BackendError(
            f"there is no CUDA device here, and {who}",
            where="train.device",
            fix="See 'dist-train doctor', or set train.device=cpu to train on CPUs.",
        )
    return False
