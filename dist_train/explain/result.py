"""``explanations.json``: what was explained, and the names of its pictures."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dist_train.errors import FileError, RunError
from dist_train.explain.choose import Why
from dist_train.files import MIB, read_plain

EXPLANATIONS = "explanations.json"
MOST_BYTES = 64 * MIB


class Explanation(BaseModel):
    """A clip's explanation. Files are named relative to the folder of ``explanations.json``."""

    model_config = ConfigDict(frozen=True)

    key: str
    filename: str
    split: str
    """Its split in the run; empty if it takes no part."""
    label: str
    """Name of its class, its labels separated by commas, or the true value; empty if unknown."""
    explained: str
    """The class, label or value that the map speaks for."""
    probability: float
    """Of what is explained, the mean over snapshots; of regression the value."""
    method: str
    why: Why
    strip: str
    """A PNG: frames with and without the map, and curves over depth."""
    animation: str
    """A GIF of all frames."""
    video: str | None = None
    """The same as mp4, if this machine can write one."""
    mass: list[float]
    """Share of the map in each frame."""
    fall: list[float]
    """By how much ``probability`` falls when the frame is hidden."""
    gap: float | None = None
    """Of integrated gradients: part of the score's change that the map lacks, the worst
    snapshot's."""


LIST = TypeAdapter(list[Explanation])


def earlier_files(folder: Path) -> list[Path]:
    """The files of an earlier call in a folder, ``explanations.json`` first.

    Raises:
        RunError: a file of that name is something else.
    """
    path = folder / EXPLANATIONS
    if not os.path.lexists(path):
        return []
    try:
        found = LIST.validate_json(read_plain(path, most_bytes=MOST_BYTES))
    except (FileError, ValidationError):
        raise RunError(
            "this is no list of explanations",
            where=path,
            fix="Move it away, or choose another folder by --out.",
        ) from None
    names = [name for one in found for name in (one.strip, one.animation, one.video)]
    return [path, *(folder / name for name in names if name and Path(name).name == name)]
