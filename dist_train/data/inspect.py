"""What a store holds, and what is found in a video, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from rich.table import Table

from dist_train.data.duplicates import CLASSES
from dist_train.data.raw.clip import FEW_LEVELS
from dist_train.data.raw.outline import LEAST, Box, OutlineColour, find_outline
from dist_train.data.raw.video import Video
from dist_train.data.raw.volume_file import VOLUME_SUFFIXES
from dist_train.data.store.index import read_index
from dist_train.data.store.reader import INDEX, SHARDS, Store
from dist_train.errors import FileError, RoiError
from dist_train.files import check_replaceable, write_whole

# Rows of a histogram, and characters of its longest bar.
BINS, BAR = 12, 18
# A group may be as small as one clip: more rows than these are told as one.
GROUPS = 40


def describe_store(store: Store) -> list[Table]:
    """Counts by split, group and class, the spread of shapes, and depths, as terminal tables."""
    clips = store.table
    size = sum(path.stat().st_size for path in (store.folder / SHARDS).glob("*.tar"))
    rejected = sum(store.info["rejected"].values())
    facts = Table.grid(padding=(0, 2))
    facts.add_row("shards", f"{store.info['shards']}, {size / 2**20:.1f} MiB")
    facts.add_row("rejected", f"{rejected}" + (" (see rejected.csv)" if rejected else ""))
    facts.add_row("fingerprint", store.fingerprint)
    return [_counts(clips, str(store.folder)), _shapes(clips), _depths(clips), facts]


def _counts(clips: pd.DataFrame, title: str) -> Table:
    """Clips by split, group and class: the largest ``GROUPS`` of them, the others, and all."""
    table = Table(title=title, title_justify="left")
    for name in ("split", "group", "clips", *CLASSES.values()):
        table.add_column(name, justify="left" if name in ("split", "group") else "right")
    keys = [clips["split"].rename("split"), clips["group"].rename("group")]
    by_class = clips.groupby([*keys, "label"]).size().unstack(fill_value=0)
    by_class = by_class.reindex(columns=list(CLASSES), fill_value=0)
    shown = by_class.sum(axis=1).nlargest(GROUPS).index
    for split, group in sorted(shown):
        table.add_row(str(split), str(group), *_numbers_of(by_class.loc[(split, group)]))
    others = by_class.drop(index=shown)
    if len(others):
        table.add_row(f"{len(others)} more", "", *_numbers_of(others.sum()))
    table.add_row("all", "", *_numbers_of(by_class.sum()))
    return table


def _numbers_of(by_class: pd.Series[int]) -> list[str]:
    return [f"{int(number)}" for number in (by_class.sum(), *by_class)]


def _shapes(clips: pd.DataFrame) -> Table:
    table = Table(title="shape in voxels", title_justify="left")
    table.add_column("")
    levels = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
    for name in levels:
        table.add_column(name, justify="right")
    for name in ("frames", "height", "width"):
        values = clips[name].quantile(list(levels.values()))
        table.add_row(name, *(f"{value:g}" for value in values))
    return table


def _depths(clips: pd.DataFrame) -> Table:
    """Depth histograms of the classes, in at most ``BINS`` bins of equal width.

    Each class has bars to its own scale, so that a rare one can be compared with a frequent one.
    """
    frames = clips["frames"].to_numpy()
    least, most = int(frames.min()), int(frames.max())
    width = -(-(most + 1 - least) // BINS)
    edges = np.arange(least, most + 1 + width, width)
    table = Table(title="depth in frames", title_justify="left")
    table.add_column("depth", justify="right")
    columns = []
    for label, name in CLASSES.items():
        depths = frames[clips["label"].to_numpy() == label]
        if len(depths):
            table.add_column(name, justify="right")
            table.add_column("")
            columns.append(np.histogram(depths, edges)[0])
    for first, *numbers in zip(edges.tolist(), *columns, strict=False):
        bars = [
            cell
            for number, of_class in zip(numbers, columns, strict=True)
            for cell in (str(number), _bar(number / of_class.max()))
        ]
        table.add_row(f"{first}" if width == 1 else f"{first}-{first + width - 1}", *bars)
    return table


def _bar(share: float) -> str:
    """A bar of ``share`` of the longest; what is there at all can be seen."""
    return "█" * round(BAR * share) or ("▏" if share else "")


def remarks(store: Path) -> list[str]:
    """What is to be known of clips that were not rejected, in lines."""
    flat, damaged = [], 0
    for _, record in read_index(store / INDEX):
        damaged += "frames_damaged" in record
        if "grey_levels" in record:
            flat.append(record["grey_levels"])
    lines = []
    if flat:
        lines.append(
            f"fewer than {FEW_LEVELS} grey levels: {len(flat)} clips of more than 8 bits (the "
            f"least: {min(flat)}); --bits says how many bits their values have"
        )
    if damaged:
        lines.append(f"kept with damaged frames: {damaged} clips")
    return lines


def find_boxes(
    path: Path, colour: OutlineColour, least: int = LEAST
) -> tuple[Video, list[Box | None]]:
    """A video, decoded once, and the outline's box in each of its frames.

    Raises:
        DecodeError: the video cannot be decoded.
        RoiError: the file is a volume.
    """
    if path.suffix.lower() in VOLUME_SUFFIXES:
        raise RoiError(
            "a volume has no coloured outline", where=path, fix="Prepare it with --roi none."
        )
    video = Video(path, bits=16)
    return video, [find_outline(frame, colour, least) for frame in video]


def describe_outline(video: Video, boxes: Sequence[Box | None]) -> Table:
    """The outline's box in each frame, and the union of all; frames of equal boxes in one row."""
    # The path is no part of the title, which is broken at the table's width.
    declared = video.frames_declared or "none"
    table = Table(
        title=f"{video.frames_decoded} frames ({declared} declared)", title_justify="left"
    )
    for name in ("frame", "top", "left", "height", "width"):
        table.add_column(name, justify="right")
    first = 0
    for box, equal in groupby(boxes):
        last = first + len(list(equal)) - 1
        table.add_row(f"{first}" if last == first else f"{first}-{last}", *_numbers(box))
        first = last + 1
    table.add_row("union", *_numbers(_union(boxes)))
    return table


def draw_outline(path: Path, boxes: Sequence[Box | None], png: Path, *, strip: int = 6) -> None:
    """Draw ``strip`` evenly spaced frames with each one's box and, thinner, the union of all.

    The video is decoded a second time: a long one is not held in memory.
    """
    check_replaceable(png)
    if png.exists() and png.samefile(path):
        raise FileError("is the video, and would be replaced", where=png, fix="Name another.")
    shown = set(np.linspace(0, len(boxes) - 1, min(strip, len(boxes))).astype(int).tolist())
    union = _union(boxes)
    pictures = []
    for number, frame in enumerate(Video(path, bits=16)):
        if number not in shown:
            continue
        picture = cv2.cvtColor(frame.luma, cv2.COLOR_GRAY2BGR)
        for found, colour, width in ((boxes[number], (255, 160, 0), 2), (union, (0, 220, 220), 1)):
            if found is not None:
                corners = (found.left, found.top), (found.right - 1, found.bottom - 1)
                cv2.rectangle(picture, *corners, colour, width)
        pictures.append(picture)
    _, encoded = cv2.imencode(".png", np.concatenate(pictures, axis=1))
    write_whole(png, encoded.tobytes())


def _union(boxes: Sequence[Box | None]) -> Box | None:
    union: Box | None = None
    for box in boxes:
        if box is not None:
            union = box if union is None else union.union(box)
    return union


def _numbers(box: Box | None) -> list[str]:
    if box is None:
        return ["none", "", "", ""]
    return [str(n) for n in (box.top, box.left, box.bottom - box.top, box.right - box.left)]
