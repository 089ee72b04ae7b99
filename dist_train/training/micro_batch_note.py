"""The note in a run's folder of the micro-batches that fitted the device's memory."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from dist_train.config import Config
from dist_train.distributed.hardware import cudnn_version
from dist_train.errors import DistTrainError
from dist_train.files import MIB, parse_object, read_plain, reason_of, write_whole
from dist_train.run.folder import MICRO_BATCH

log = logging.getLogger(__name__)

#: Settings that memory depends on.
SETTINGS: dict[str, Any] = {
    "model": True,
    "clip": True,
    "plan": {"max_voxels"},
    "train": {"precision", "backend", "offload", "channels_last", "graphs"},
    "norm": {"shared", "fused"},
    "augment": {"device"},
}
NOT_OF_MEMORY: dict[str, Any] = {"model": {"init", "init_layout"}}


def conditions(config: Config, device: torch.device) -> dict[str, Any]:
    """Return all that a micro-batch's memory and the device's depend on: JSON types."""
    return {
        "settings": config.model_dump(
            mode="json", include=SETTINGS, exclude={"model": {"init", "init_layout"}}
        ),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        # They choose the algorithms of convolutions, and so their workspace.
        "torch": torch.__version__,
        "cudnn": cudnn_version(),
    }


def noted_clips(run: Path, of: dict[str, Any] | None = None) -> int | None:
    """Return the most clips that a micro-batch may have, or None without a usable note.

    Args:
        of: the ``conditions`` that the note must hold for; None accepts any.
    """
    path = run / MICRO_BATCH
    if not os.path.lexists(path):
        return None
    try:
        content = parse_object(read_plain(path, most_bytes=MIB))
        if of is not None and content["of"] != of:
            return None
        clips = content["clips"]
        if type(clips) is not int or clips < 1:
            raise ValueError(f"its number of clips is {clips}")
    except (DistTrainError, ValueError, KeyError) as error:
        log.warning("%s is ignored: %s", path, reason_of(error))
        return None
    return clips


def write_note(run: Path, clips: int, of: dict[str, Any]) -> None:
    """Note for later sessions that micro-batches of ``clips`` clips fit under ``of``."""
    write_whole(run / MICRO_BATCH, json.dumps({"clips": clips, "of": of}, indent=2))
