"""Describe a store, and the outline in a video, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from rich.table import Table

from dist_train.data.raw.formats import suffixes as format_suffixes
from dist_train.data.raw.outline import LEAST, Box, OutlineColour, find_outline
from dist_train.data.raw.video import Video
from dist_train.data.store.index import read_index
from dist_train.data.store.reader import INDEX, SHARDS, Store
from dist_train.data.types import FEW_LEVELS, METADATA, MOST_SATURATED
from dist_train.errors import FileError, RoiError
from dist_train.files import check_replaceable, write_whole

# Rows of a histogram, and characters of its longest bar.
BINS, BAR = 12, 18
# The most rows for groups, as a group may be a single clip.
GROUPS = 40
# The most values of a column of metadata that are shown.
VALUES = 5
# Frames that ``draw_outline`` draws.
STRIP = 6


def describe_store(store: Store) -> list[Table]:
    """Terminal tables: counts by split, group and class, shapes, depths, and metadata."""
    shape = ("frames", "height", "width")
    columns = store.table.metadata
    clips = store.table.frame(columns=["split", "group", "label", *shape, *columns])
    # A cache holds parts of a remote store.
    shards = [] if store.is_remote else (store.folder / SHARDS).glob("*.tar")
    size = sum(path.stat().st_size for path in shards)
    rejected = sum(store.info["rejected"].values())
    metadata = Table.grid(padding=(0, 2))
    metadata.add_row(
        "shards", f"{store.info['shards']}" + (f", {size / 2**20:.1f} MiB" if size else "")
    )
    metadata.add_row("channels", f"{', '.join(store.channels)} ({store.dtype})")
    metadata.add_row("rejected", f"{rejected}" + (" (see rejected.csv)" if rejected else ""))
    metadata.add_row("fingerprint", store.fingerprint)
    tables = [_counts(clips, store), _shapes(clips), _depths(clips, store), metadata]
    return [*tables, _metadata(clips[list(columns)])] if columns else tables


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table with left-aligned and right-aligned columns."""
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _counts(clips: pd.DataFrame, store: Store) -> Table:
    """Clips by split, group and class: the ``GROUPS`` largest groups, the rest, and all."""
    table = _table(store.name, ("split", "group"), ("clips", *store.classes.values()))
    by_class = clips.groupby(["split", "group", "label"]).size().unstack(fill_value=0)
    by_class = by_class.reindex(columns=list(store.classes), fill_value=0)
    by_class.insert(0, "clips", by_class.sum(axis=1))
    shown = by_class["clips"].nlargest(GROUPS).index
    for split, group in sorted(shown):
        table.add_row(split, group, *map(str, by_class.loc[(split, group)]))
    others = by_class.drop(index=shown)
    if len(others):
        table.add_row(f"{len(others)} more", "", *map(str, others.sum()))
    table.add_row("all", "", *map(str, by_class.sum()))
    return table


def _metadata(columns: pd.DataFrame) -> Table:
    """For each column of metadata: how many values it has, and the most frequent ones."""
    table = _table("metadata", ["column"], ("values", "missing"))
    table.add_column("most frequent")
    for name in columns:
        counts = columns[name].value_counts()
        missing = int(counts.pop("")) if "" in counts else 0
        most = ", ".join(f"{value} ({clips})" for value, clips in counts.iloc[:VALUES].items())
        cells = str(name).removeprefix(METADATA), str(len(counts)), str(missing), most
        table.add_row(*cells)
    return table


def _shapes(clips: pd.DataFrame) -> Table:
    levels = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
    table = _table("shape in voxels", [""], list(levels))
    for name in ("frames", "height", "width"):
        values = clips[name].quantile(list(levels.values()))
        table.add_row(name, *(f"{value:g}" for value in values))
    return table


def _depths(clips: pd.DataFrame, store: Store) -> Table:
    """A depth histogram of each class, in at most ``BINS`` bins of equal width.

    Bars are relative to the largest bin of their class, so that a rare class can be compared with a
    frequent one.
    """
    frames = clips["frames"].to_numpy()
    least, most = int(frames.min()), int(frames.max())
    width = -(-(most + 1 - least) // BINS)
    edges = np.arange(least, most + 1 + width, width)
    table = _table("depth in frames", [], ["depth"])
    columns: list[list[str]] = []
    for label, name in store.classes.items():
        depths = frames[clips["label"].to_numpy() == label]
        if len(depths):
            table.add_column(name, justify="right")
            table.add_column("")
            counts = np.histogram(depths, edges)[0]
            columns += [[str(n) for n in counts], [_bar(n / counts.max()) for n in counts]]
    for first, cells in zip(edges.tolist(), zip(*columns, strict=True), strict=False):
        table.add_row(f"{first}" if width == 1 else f"{first}-{first + width - 1}", *cells)
    return table


def _bar(share: float) -> str:
    """A bar, ``share`` of the longest; the smallest share above 0 is visible."""
    return "█" * round(BAR * share) or ("▏" if share else "")


def remarks(store: Path) -> list[str]:
    """Warnings about clips that are in the store, one a line."""
    few_levels, saturated, not_numbers, damaged, variable, hdr = [], 0, 0, 0, 0, 0
    for _, record in read_index(store / INDEX):
        variable += "frame_rate" in record
        hdr += "transfer" in record
        damaged += "frames_damaged" in record
        saturated += "saturated" in record
        not_numbers += "not_numbers" in record
        if "grey_levels" in record:
            few_levels.append(record["grey_levels"])
    lines = []
    if few_levels:
        lines.append(
            f"fewer than {FEW_LEVELS} grey levels: {len(few_levels)} clips (the least: "
            f"{min(few_levels)}); --intensity or --bits says which values are black and white"
        )
    if saturated:
        lines.append(f"more than {MOST_SATURATED:.0%} of the pixels are white: {saturated} clips")
    if not_numbers:
        lines.append(f"values that are no numbers (NaN), stored as black: {not_numbers} clips")
    if damaged:
        lines.append(f"kept with damaged frames: {damaged} clips")
    if variable:
        lines.append(f"variable frame rate: {variable} clips; every frame is stored once")
    if hdr:
        lines.append(f"HDR video (PQ or HLG): {hdr} clips; values are stored as they are coded")
    return lines


def find_boxes(
    path: Path, colour: OutlineColour, least: int = LEAST
) -> tuple[Video, list[Box | None]]:
    """Decode a video once, and find the outline's box in each frame.

    Raises:
        DecodeError: the video cannot be decoded.
        RoiError: the file is a volume.
    """
    if path.name.lower().endswith(format_suffixes()):
        raise RoiError(
            "a volume has no coloured outline", where=path, fix="Prepare it with --roi none."
        )
    video = Video(path, bits=16)
    return video, [find_outline(frame, colour, least) for frame in video]


def describe_outline(video: Video, boxes: Sequence[Box | None]) -> Table:
    """The outline's box in each frame, and their union. Equal boxes in a row share a line."""
    # The title has no path, as the terminal would break it at the table's width.
    title = f"{video.frames_decoded} frames ({video.frames_declared or 'none'} declared)"
    table = _table(title, [], ("frame", "top", "left", "height", "width"))
    first = 0
    for box, equal in groupby(boxes):
        last = first + len(list(equal)) - 1
        table.add_row(f"{first}" if last == first else f"{first}-{last}", *_cells(box))
        first = last + 1
    table.add_row("union", *_cells(_union(boxes)))
    return table


def draw_outline(path: Path, boxes: Sequence[Box | None], png: Path) -> None:
    """Draw evenly spaced frames, each with its box and, thinner, the union of all boxes.

    The video is decoded again, as a long one does not fit into memory.
    """
    check_replaceable(png)
    if png.exists() and png.samefile(path):
        raise FileError("is the video, and would be replaced", where=png, fix="Name another.")
    shown = set(np.linspace(0, len(boxes) - 1, min(STRIP, len(boxes))).astype(int).tolist())
    union = _union(boxes)
    pictures = []
    for number, frame in enumerate(Video(path, bits=16)):
        if number not in shown:
            continue
        picture = cv2.cvtColor(frame.luma, cv2.COLOR_GRAY2BGR)
        for box, colour, width in ((boxes[number], (255, 160, 0), 2), (union, (0, 220, 220), 1)):
            if box is not None:
                corners = (box.left, box.top), (box.right - 1, box.bottom - 1)
                cv2.rectangle(picture, *corners, colour, width)
        pictures.append(picture)
    _, encoded = cv2.imencode(".png", np.concatenate(pictures, axis=1))
    write_whole(png, encoded.tobytes())


def _union(boxes: Sequence[Box | None]) -> Box | None:
    found = [box for box in boxes if box is not None]
    return reduce(Box.union, found) if found else None


def _cells(box: Box | None) -> list[str]:
    if box is None:
        return ["none", "", "", ""]
    return [str(n) for n in (box.top, box.left, box.bottom - box.top, box.right - box.left)]
