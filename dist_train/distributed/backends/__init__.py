"""Backends: how one step runs on many devices. No other room imports accelerate or deepspeed."""

from __future__ import annotations

from dist_train.config import TrainSettings
from dist_train.distributed.backends.base import Backend, forget_settings
from dist_train.distributed.backends.ddp import DdpBackend
from dist_train.errors import BackendError


def make_backend(settings: TrainSettings, *, clip_norm: float | None) -> Backend:
    """The backend that ``settings.backend`` names.

    Raises:
        BackendError: the machine or the launcher does not allow it.
    """
    try:
        return _class_of(settings)(settings, clip_norm=clip_norm)
    except BackendError:
        forget_settings()
        raise


def _class_of(settings: TrainSettings) -> type[Backend]:
    if settings.backend == "ddp":
        return DdpBackend
    if settings.backend == "fsdp2":
        from dist_train.distributed.backends.fsdp import FsdpBackend

        return FsdpBackend
    from dist_train.distributed.backends.zero import ZeroBackend

    return ZeroBackend
