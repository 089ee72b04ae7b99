"""Damaged forms of a sound file, read as ``prepare`` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_media import read_volume

from dist_train.errors import DecodeError


def read_cut_anywhere(path: Path, clip: np.ndarray, parts: int = 60, **choices: Any) -> int:
    """Cut a file at many places, empty it, and exchange its magic.

    Returns:
        how often ``clip`` was read in spite of that. Every other time a reason is given.
    """
    content = path.read_bytes()
    np.testing.assert_array_equal(read_volume(path, **choices), clip)
    damaged = [content[: len(content) * part // parts] for part in range(parts)]
    damaged += [content[:-1], bytes(8) + content[8:], b"", content[:4]]
    read = 0
    for number, bytes_ in enumerate(damaged):
        path.write_bytes(bytes_)
        try:
            values = read_volume(path, **choices)
        except DecodeError:
            continue
        np.testing.assert_array_equal(values, clip, err_msg=f"damage {number}")
        read += 1
    path.write_bytes(content)
    return read


def damage_is_named(path: Path, kind: str) -> None:
    """Assert that an empty file and one of another kind are refused in words, not by an error."""
    content = path.read_bytes()
    for bytes_, said in ((b"", "is empty"), (b"%PDF-1.7" + content[8:], f"is no {kind} file")):
        path.write_bytes(bytes_)
        with pytest.raises(DecodeError, match=said):
            read_volume(path)
    path.write_bytes(content)
