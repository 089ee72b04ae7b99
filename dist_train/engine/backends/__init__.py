"""How one step runs on many devices. Only here are accelerate and deepspeed imported."""

from __future__ import annotations

from dist_train.config import TrainSettings
from dist_train.engine.backends.base import Backend
from dist_train.engine.backends.ddp import DdpBackend


def make_backend(settings: TrainSettings, *, clip_norm: float | None) -> Backend:
    """The backend that ``settings.backend`` names.

    Raises:
        BackendError: the machine or the launcher does not allow it.
    """
    if settings.backend == "ddp":
        return DdpBackend(settings, clip_norm=clip_norm)
    if settings.backend == "fsdp2":
        from dist_train.engine.backends.fsdp import FsdpBackend

        return FsdpBackend(settings, clip_norm=clip_norm)
    from dist_train.engine.backends.zero import ZeroBackend

    return ZeroBackend(settings, clip_norm=clip_norm)
