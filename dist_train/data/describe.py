"""What a store holds, and what is found in a video, for people to look at."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from rich.table import Table

from dist_train.data.decode import Video
from dist_train.data.files import write_whole
from dist_train.data.roi import Box, OutlineColour, find_outline
from dist_train.data.store import SHARDS, Store


def describe_store(store: Store) -> list[Table]:
    """Counts by split, group and class, and the spread of shapes, as tables for the terminal."""
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

    size = sum(path.stat().st_size for path in (store.folder / SHARDS).glob("*.tar"))
    rejected = sum(store.info["rejected"].values())
    facts = Table.grid(padding=(0, 2))
    facts.add_row("shards", f"{store.info['shards']}, {size / 2**20:.1f} MiB")
    facts.add_row("rejected", f"{rejected}" + (" (see rejected.csv)" if rejected else ""))
    facts.add_row("fingerprint", store.fingerprint)
    return [counts, shapes, facts]


def _totals(by_class: pd.Series[int], clips: int) -> list[int]:
    return [clips, *(int(by_class.get(c, 0)) for c in ("negative", "positive", "unlabelled"))]


def describe_outline(path: Path, colour: OutlineColour | None = None) -> Table:
    """The outline's box in each frame, and the union of all.

    Raises:
        DecodeError: the video cannot be decoded.
    """
    video = Video(path)
    boxes = [find_outline(frame, colour or OutlineColour()) for frame in video]
    table = Table(
        title=f"{path}: {video.frames_decoded} frames ({video.frames_declared} declared)",
        title_justify="left",
    )
    for name in ("frame", "top", "left", "height", "width"):
        table.add_column(name, justify="right")
    for number, box in enumerate(boxes):
        table.add_row(str(number), *_numbers(box))
    table.add_row("union", *_numbers(_union(boxes)))
    return table


def draw_outline(path: Path, png: Path, *, strip: int = 6) -> None:
    """Draw ``strip`` evenly spaced frames with each one's box and, thinner, the union of all."""
    frames = [(frame.luma, find_outline(frame, OutlineColour())) for frame in Video(path)]
    union = _union([box for _, box in frames])
    pictures = []
    for number in np.linspace(0, len(frames) - 1, min(strip, len(frames))).astype(int):
        luma, box = frames[number]
        picture = cv2.cvtColor(luma, cv2.COLOR_GRAY2BGR)
        for found, colour, width in ((box, (255, 160, 0), 2), (union, (0, 220, 220), 1)):
            if found is not None:
                corners = (found.left, found.top), (found.right - 1, found.bottom - 1)
                cv2.rectangle(picture, *corners, colour, width)
        pictures.append(picture)
    _, encoded = cv2.imencode(".png", np.concatenate(pictures, axis=1))
    write_whole(png, encoded.tobytes())


def _union(boxes: list[Box | None]) -> Box | None:
    union: Box | None = None
    for box in boxes:
        if box is not None:
            union = box if union is None else union.union(box)
    return union


def _numbers(box: Box | None) -> list[str]:
    if box is None:
        return ["none", "", "", ""]
    return [str(n) for n in (box.top, box.left, box.bottom - box.top, box.right - box.left)]
