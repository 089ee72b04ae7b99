"""Descriptions of a store and of an outline agree with their contents."""

from __future__ import annotations

import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from make_media import drifting, outlined_frames, store_of, volumes, write_video, write_volumes
from rich.console import Console
from rich.table import Table

from dist_train.data.inspect import (
    BAR,
    GROUPS,
    describe_outline,
    describe_store,
    draw_outline,
    find_boxes,
)
from dist_train.data.raw.outline import Box, OutlineColour, crop_to_outline
from dist_train.data.raw.video import Video
from dist_train.data.store.build import PrepareSettings, prepare
from dist_train.data.store.reader import Store
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import ConfigError, RoiError


def text(*tables: Table) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


def row(printed: str, first: str) -> list[str]:
    """The cells after the one that reads ``first``."""
    (line,) = [line for line in printed.splitlines() if re.match(rf"[│┃ ]*{first}\b", line)]
    return [cell.strip() for cell in re.split(r"[│┃]|  +", line) if cell.strip()][1:]


def test_store(tmp_path: Path) -> None:
    names = write_volumes(tmp_path / "raw", 10)
    (tmp_path / "raw" / names[3]).write_bytes(b"x")
    lines = [f"{n},{int(i < 4)},{'p' if i < 6 else 'q'},train" for i, n in enumerate(names)]
    (tmp_path / "clips.csv").write_text("filename,label,group,split\n" + "\n".join(lines) + "\n")
    manifest = read_manifest(tmp_path / "clips.csv")
    settings = PrepareSettings(roi="none")
    out = tmp_path / "store"
    prepare(manifest, tmp_path / "raw", out, settings, workers=1, max_rejected=0.1)
    store = Store(out)
    printed = text(*describe_store(store))
    # Of clips, negative, positive, unlabelled.
    assert row(printed, "all") == ["9", "6", "3", "0"]
    assert [row(line, "train") for line in printed.splitlines() if "train" in line] == [
        ["p", "5", "2", "3", "0"],
        ["q", "4", "4", "0", "0"],
    ]
    assert row(printed, "frames")[0] == "4"
    assert row(printed, "frames")[-1] == "8"
    assert row(printed, "width") == ["12"] * 5
    assert "1 (see rejected.csv)" in printed
    assert store.fingerprint in printed


@pytest.fixture
def video(tmp_path: Path) -> Path:
    boxes = [None, *drifting(Box(20, 30, 70, 84), 4)]
    return write_video(tmp_path / "a.mp4", outlined_frames(boxes))


def found(path: Path) -> tuple[Video, list[Box | None]]:
    return find_boxes(path, OutlineColour())


def test_outline(video: Path) -> None:
    printed = text(describe_outline(*found(video)))
    assert "5 frames (5 declared)" in printed
    assert row(printed, "0") == ["none"]
    _, union = crop_to_outline(Video(video), OutlineColour())
    expected = [union.top, union.left, union.bottom - union.top, union.right - union.left]
    assert [int(cell) for cell in row(printed, "union")] == expected


def test_drawing(video: Path, tmp_path: Path) -> None:
    draw_outline(video, found(video)[1], tmp_path / "a.png")
    picture = cv2.imread(str(tmp_path / "a.png"))
    assert picture.shape == (96, 5 * 128, 3)
    # The first frame has no box of its own; all show the union.
    blue = (picture == (255, 160, 0)).all(axis=2)
    yellow = (picture == (0, 220, 220)).all(axis=2)
    assert [bool(part.any()) for part in np.split(blue, 5, axis=1)] == [False] + 4 * [True]
    assert all(part.any() for part in np.split(yellow, 5, axis=1))


def test_volume() -> None:
    with pytest.raises(RoiError, match=r"a.npy: a volume has no coloured outline. .*--roi none"):
        found(Path("a.npy"))


def test_video_that_ends_too_soon(tmp_path: Path) -> None:
    boxes = drifting(Box(20, 30, 70, 84), 40)
    options = {"movflags": "faststart"}
    path = write_video(tmp_path / "a.mp4", outlined_frames(boxes), container_options=options)
    content = path.read_bytes()
    path.write_bytes(content[: 2 * len(content) // 3])
    video, boxes_found = found(path)
    assert 0 < len(boxes_found) < 40
    assert f"{len(boxes_found)} frames (40 declared)" in text(describe_outline(video, boxes_found))
    draw_outline(path, boxes_found, tmp_path / "a.png")
    assert cv2.imread(str(tmp_path / "a.png")).shape == (96, 6 * 128, 3)


def test_frames_with_one_box_share_a_row(tmp_path: Path) -> None:
    still = Box(20, 30, 70, 84)
    printed = text(describe_outline(Video(tmp_path), [None, still, still, still, None]))
    assert row(printed, "1-3") == ["20", "30", "50", "54"]
    assert row(printed, "4") == ["none"]
    assert row(printed, "union") == ["20", "30", "50", "54"]
    assert row(text(describe_outline(Video(tmp_path), [None])), "union") == ["none"]


def test_another_colour(tmp_path: Path) -> None:
    frames = outlined_frames([Box(20, 30, 70, 84)] * 2)[..., ::-1]
    path = write_video(tmp_path / "blue.mp4", frames)
    assert found(path)[1] == [None, None]
    # Blue, and as much of it above red as the default asks of red above blue.
    anything = OutlineColour.parse("red=0:255,green=0:255,blue=0:255,red_over_blue=0")
    assert find_boxes(path, anything)[1][0] is not None


def test_depth_histogram(tmp_path: Path) -> None:
    deep = np.zeros((100, 10, 12), np.uint8)
    printed = text(*describe_store(store_of(tmp_path, [*volumes(9), deep])))
    # Depths 4 to 8 fall into the first bin; odd numbers are positive. Each class has its own scale.
    assert row(printed, "4-12") == ["5", BAR * "█", "4", BAR * "█"]
    assert row(printed, "13-21") == ["0", "0"]
    assert row(printed, "94-102") == ["0", "1", round(BAR / 4) * "█"]
    assert "unlabelled" not in printed[printed.index("depth in frames") :]


def test_store_of_many_groups(tmp_path: Path) -> None:
    """The largest have a row each, the others one."""
    count = GROUPS + 5
    groups = [f"g{min(i, count - 2)}" for i in range(count)]
    printed = text(*describe_store(store_of(tmp_path, volumes(count), group=groups)))
    assert row(printed, f"g{count - 2}") == ["2", "1", "1", "0"]
    assert row(printed, "4 more")[0] == "4"
    assert row(printed, "all")[0] == str(count)


@pytest.mark.parametrize(
    ("text", "colour"),
    [
        ("blue=0:90", OutlineColour(blue=(0, 90))),
        ("red_over_blue=30, red=90:200", OutlineColour(red=(90, 200), red_over_blue=30)),
        ("green=7:7", OutlineColour(green=(7, 7))),
        ("red_over_blue=-255", OutlineColour(red_over_blue=-255)),
    ],
)
def test_colour_from_text(text: str, colour: OutlineColour) -> None:
    assert OutlineColour.parse(text) == colour


@pytest.mark.parametrize(
    "text",
    ["", "red", "red=9:5", "red=0:256", "rot=0:5", "red=0:5,red=0:6", "red_over_blue=1:2",
     "red_over_blue=-256", "red=٣:9", "red=0:5,", "red=0:5:9"],
)  # fmt: skip
def test_text_that_is_no_colour(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--colour: .* is no part of a colour.*red=100:255"):
        OutlineColour.parse(text)
