"""What a store holds, and what is found in a video, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from rich.table import Table

from dist_train.data.decode import Video
from dist_train.data.files import write_whole
from dist_train.data.roi import Box, OutlineColour, find_outline
from dist_train.data.store import SHARDS, Store

# Rows of a histogram, and characters of its longest bar.
BINS, BAR = 12, 40


def describe_store(store: Store) -> list[Table]:
    """Counts by split, group and class, the spread of shapes, and depths, as terminal tables."""
    clips = store.table
    classes = clips["label"].map({0: "negative", 1: "positive", -1: "unlabelled"})
    counts = Table(title=str(store.folder), title_justify="left")
    for name in ("split", "group", "clips", "negative", "positive", "unlabelled"):
        counts.add_column(name, justify="left" if name in ("split", "group") else "right")
    for (split, group), part in classes.groupby([clips["split"], clips["group"]]):
        by_class = part.value_counts()
        numbers = [len(part), *(by_class.get(c, 0) for c in ("negative", "positive", "unlabelled"))]
        counts.add_row(str(split), str(group), *(f"{int(n)}" for n in numbers))
    counts.add_row("all", "", *(f"{int(n)}" for n in _totals(classes.value_counts(), len(clips))))

    shapes = Table(title="shape in voxels", title_justify="left")
    shapes.add_column("")
    levels = (0.0, 0.05, 0.5, 0.95, 1.0)
    for name in ("min", "5 %", "median", "95 %", "max"):
        shapes.add_column(name, justify="right")
    for name in ("frames", "height", "width"):
        shapes.add_row(name, *(f"{value:g}" for value in clips[name].quantile(list(levels))))

    depths = _depth_histogram(clips["frames"].to_numpy(), clips["label"].to_numpy())

    size = sum(path.stat().st_size for path in (store.folder / SHARDS).glob("*.tar"))
    rejected = sum(store.info["rejected"].values())
    facts = Table.grid(padding=(0, 2))
    facts.add_row("shards", f"{store.info['shards']}, {size / 2**20:.1f} MiB")
    facts.add_row("rejected", f"{rejected}" + (" (see rejected.csv)" if rejected else ""))
    facts.add_row("fingerprint", store.fingerprint)
    return [counts, shapes, depths, facts]


def _totals(by_class: pd.Series[int], clips: int) -> list[int]:
    return [clips, *(int(by_class.get(c, 0)) for c in ("negative", "positive", "unlabelled"))]


def _depth_histogram(frames: np.ndarray, labels: np.ndarray) -> Table:
    """Clips by depth and class, in at most ``BINS`` bins of equal width."""
    least, most = int(frames.min()), int(frames.max())
    width = -(-(most + 1 - least) // BINS)
    edges = np.arange(least, most + 1 + width, width)
    all_of, positives = (np.histogram(part, edges)[0] for part in (frames, frames[labels == 1]))
    table = Table(title="depth in frames", title_justify="left")
    for name in ("depth", "clips", "positive"):
        table.add_column(name, justify="right")
    table.add_column("")
    for first, clips, positive in zip(edges, all_of, positives, strict=False):
        span = f"{first}" if width == 1 else f"{first}-{first + width - 1}"
        bar = "█" * round(BAR * clips / all_of.max()) or ("▏" if clips else "")
        table.add_row(span, str(clips), str(positive), bar)
    return table


def find_boxes(path: Path, colour: OutlineColour) -> tuple[Video, list[Box | None]]:
    """A video, decoded once, and the outline's box in each of its frames.

    Raises:
        DecodeError: the video cannot be decoded.
    """
    video = Video(path)
    return video, [find_outline(frame, colour) for frame in video]


def describe_outline(video: Video, boxes: Sequence[Box | None]) -> Table:
    """The outline's box in each frame, and the union of all; frames of equal boxes in one row."""
    table = Table(
        title=f"{video.path}: {video.frames_decoded} frames ({video.frames_declared} declared)",
        title_justify="left",
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
    shown = set(np.linspace(0, len(boxes) - 1, min(strip, len(boxes))).astype(int).tolist())
    union = _union(boxes)
    pictures = []
    for number, frame in enumerate(Video(path)):
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
