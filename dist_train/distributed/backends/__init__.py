"""Backends: how one step runs on many devices. No other room imports accelerate or deepspeed."""

from __future__ import annotations

from importlib import import_module

from dist_train.config import TrainSettings
from dist_train.distributed.backends.base import Backend, forget_settings
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
    """``FsdpBackend`` in ``fsdp.py`` for "fsdp2"; the number at the end is a variant."""
    name = settings.backend.rstrip("0123456789")
    module = import_module(f"{__name__}.{name}")
    found: type[Backend] = getattr(module, f"{name.capitalize()}Backend")
    return found
