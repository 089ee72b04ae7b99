"""A writer of Zarr arrays and groups, versions 2 and 3, after their specifications."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"b": "bool", "u": "uint", "i": "int", "f": "float"}


def write_group(folder: Path, version: int, attrs: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps(attrs or {}))
    else:
        said = {"zarr_format": 3, "node_type": "group", "attributes": attrs or {}}
        (folder / "zarr.json").write_text(json.dumps(said))
    return folder


def write_array(
    folder: Path,
    values: np.ndarray,
    chunks: Sequence[int] | None = None,
    version: int = 3,
    *,
    names: Sequence[str] | None = None,
    packed: bool = False,
    shape: Sequence[int] | None = None,
) -> Path:
    """Write an array in chunks. ``shape`` is declared instead of the array's own."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = chunks or values.shape
    bits = 8 * values.dtype.itemsize if values.dtype.kind != "b" else ""
    shared = {"zarr_format": version, "shape": list(shape or values.shape), "fill_value": 0}
    if version == 2:
        kind = values.dtype.newbyteorder("<").str
        said = {**shared, "chunks": list(chunks), "dtype": kind, "order": "C", "filters": None}
        said["compressor"] = {"id": "gzip", "level": 5} if packed else None
        (folder / ".zarray").write_text(json.dumps(said))
        attrs = {"_ARRAY_DIMENSIONS": list(names)} if names else {}
        (folder / ".zattrs").write_text(json.dumps(attrs))
    else:
        codecs: list[Any] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        codecs += [{"name": "gzip", "configuration": {"level": 5}}] if packed else []
        grid = {"name": "regular", "configuration": {"chunk_shape": list(chunks)}}
        keys = {"name": "default", "configuration": {"separator": "/"}}
        said = {**shared, "node_type": "array", "data_type": f"{TYPES[values.dtype.kind]}{bits}"}
        said |= {"chunk_grid": grid, "chunk_key_encoding": keys, "codecs": codecs}
        said |= {"dimension_names": list(names)} if names else {}
        (folder / "zarr.json").write_text(json.dumps(said))
    parts = [-(-size // chunk) for size, chunk in zip(values.shape, chunks, strict=True)]
    for at in np.ndindex(*parts):
        block = values[tuple(slice(n * c, (n + 1) * c) for n, c in zip(at, chunks, strict=True))]
        whole = np.zeros(chunks, values.dtype.newbyteorder("<"))
        whole[tuple(map(slice, block.shape))] = block
        key = ".".join(map(str, at)) if version == 2 else "/".join(("c", *map(str, at)))
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(whole.tobytes()) if packed else whole.tobytes())
    return folder
