"""HDF5 files (.h5, .hdf5), by h5py: one array, or the one that ``file.h5::dataset`` names.

The axes are those of ilastik's ``axistags`` or the labels of HDF5's dimensions; without these,
those of a plain array (``axes_of_plain``), with which labels of some axes must agree.
``element_size_um`` (ilastik, Fiji) is the spacing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from dist_train.data.raw.axes import axes_of_plain, axis_of, stack_from_axes, while_open
from dist_train.data.raw.damage import check_held
from dist_train.data.raw.stack import Choices, Stack
from dist_train.errors import DecodeError

SUFFIXES = (".h5", ".hdf5", ".hdf")
PACKAGES = ("h5py",)
HAS_DATASETS = True


def read(path: Path, where: object, choices: Choices) -> Stack:
    return while_open(where, _opened(path, choices))


@contextmanager
def _opened(path: Path, choices: Choices) -> Iterator[Stack]:
    with opened_array(path, choices.dataset) as array:
        axes, channels = _axes(array, choices)
        sizes = array.attrs.get("element_size_um", ())
        yield stack_from_axes(
            array,
            axes,
            choices,
            array.dtype,
            channels=channels,
            spacing=dict(zip("ZYX", map(float, sizes), strict=True)) if len(sizes) == 3 else None,
            block=block_of(array, axes),
        )


@contextmanager
def opened_array(path: Path, name: str | None) -> Iterator[Any]:
    """Open a file's array (h5py.Dataset) by its name, None if it is the only one."""
    import h5py

    # Packages of filters, which add themselves to HDF5.
    with suppress(ImportError):
        import_module("hdf5plugin")
    with h5py.File(path, "r", locking=False) as file:
        array = _named(file, name) if name else chosen_array(_arrays(file))
        if array.is_virtual or array.external:
            raise DecodeError(
                f"has the values of {array.name} in other files", fix="Copy them into this one."
            )
        _check_filters(array)
        if array.chunks is None:
            check_held(array.nbytes, array.id.get_storage_size())
        else:
            pairs = zip(array.shape, array.chunks, strict=True)
            needed = math.prod(-(-size // length) for size, length in pairs)
            # HDF5 gives zeros for the others.
            if (there := array.id.get_num_chunks()) < needed:
                raise DecodeError(
                    f"{there} of {needed} chunks of {array.name} were written",
                    fix="Write all of it.",
                )
        yield array


def chosen_array(arrays: Mapping[str, Any]) -> Any:
    """Return the only array of a file.

    Args:
        arrays: with a ``shape``, by name.

    Raises:
        DecodeError: there are none, or several.
    """
    if len(arrays) != 1:
        shown = ", ".join(f"{name} {list(array.shape)}" for name, array in list(arrays.items())[:8])
        raise DecodeError(
            f"holds {len(arrays)} arrays ({shown}{', ...' if len(arrays) > 8 else ''})"
            if arrays
            else "holds no array of numbers with two axes or more",
            fix="Name one in the clip table, as FILE::NAME." if arrays else None,
        )
    return next(iter(arrays.values()))


def is_picture(shape: tuple[int, ...], kind: str) -> bool:
    """Whether an array may be pictures: numbers with two axes that are longer than 1."""
    return kind in "biuf" and sum(size > 1 for size in shape) >= 2


def _arrays(file: Any) -> dict[str, Any]:
    """The arrays of a file. Links to other places are not followed."""
    import h5py

    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and is_picture(item.shape or (), item.dtype.kind):
            found[name] = item

    file.visititems(visit)
    return found


def _named(file: Any, name: str) -> Any:
    import h5py

    item = file
    for part in filter(None, name.split("/")):
        link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
        # Other links may lead to other files.
        if isinstance(link, h5py.ExternalLink | h5py.SoftLink):
            raise DecodeError(f"has a link at {name}", fix="Name the place that it leads to.")
        if link is None:
            known = ", ".join(list(_arrays(file))[:8])
            raise DecodeError(f"has no array {name}", fix=f"It has: {known}." if known else None)
        item = item[part]
    if not isinstance(item, h5py.Dataset) or not is_picture(item.shape or (), item.dtype.kind):
        raise DecodeError(f"has no array of numbers with two axes or more at {name}")
    return item


def _check_filters(array: Any) -> None:
    import h5py

    settings = array.id.get_create_plist()
    for number in range(settings.get_nfilters()):
        code, _, _, name = settings.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise DecodeError(
                f"{array.name} is packed by a filter that is not installed "
                f"({name.decode(errors='replace') or code})",
                fix="Install hdf5plugin, or save it with gzip.",
            )


def _axes(array: Any, choices: Choices) -> tuple[str, tuple[str, ...] | None]:
    """The axes by the file's own labels, else those of a plain array; and the channels' names."""
    tags = array.attrs.get("axistags")
    if tags is not None:
        labels = [str(axis["key"]) for axis in json.loads(tags)["axes"]]
    else:
        labels = [dimension.label for dimension in array.dims]
        named = {axis_of(label) for label in labels if label}
        if not named or ("" in labels and named <= set("TZCYX")):
            plain, channels = axes_of_plain(array.shape, choices)
            return _with_labels(plain, labels), channels
    axes = [axis_of(label) for label in labels]
    is_known = all(len(axis) == 1 if tags is not None else axis in "TZCYX" for axis in axes)
    is_whole = len(axes) == array.ndim == len(set(axes)) and {"X", "Y"} <= set(axes)
    if not (is_known and is_whole):
        raise DecodeError(
            f"has the axes {', '.join(labels)}, which are no stack of pictures",
            fix="Name them t, z, c, y and x.",
        )
    return "".join(axes), None


def _with_labels(plain: str, labels: Sequence[str]) -> str:
    """The axes of a plain array, some of which have labels.

    Raises:
        DecodeError: the labels say otherwise, and do not tell the other axes.
    """
    known = [axis_of(label) if label else axis for label, axis in zip(labels, plain, strict=True)]
    # Frames may be those of a film.
    if "".join(known) not in (plain, plain.replace("Z", "T")):
        raise DecodeError(
            f"has labels for some of its axes alone ({', '.join(each or '-' for each in labels)}), "
            f"and without labels they would be {', '.join(plain.lower())}",
            fix="Name all of them t, z, c, y and x.",
        )
    return "".join(known)


def block_of(array: Any, axes: str) -> int:
    """Number of frames in a chunk, which is unpacked as one."""
    lengths = dict(zip(axes, array.chunks or (), strict=False))
    long = [axis for axis in "TZ" if axis in axes and array.shape[axes.index(axis)] > 1]
    return max((lengths.get(axis, 1) for axis in long), default=1)
