"""Synthetic capillary videos in the form of the Clog Loss challenge: the embedded default data.

Every clip shows a dark, noisy two-photon background, a few other vessels, and a target vessel
inside a closed orange outline. Only motion tells the classes apart: the cell shadows of a flowing
vessel travel along it, those of a stalled vessel stay where they are.

Neither a single frame nor the mean frame tells them apart, for these reasons:

- As in a real stack, where depth is time, a cell is in focus for about ten frames and gives
  way to others. The law of the shadows (when, where along the vessel, how dark) is the same in both
  classes; in a flowing vessel all of them are displaced together, around the circle that the
  vessel's length is closed to. The first position is uniform on that circle, so a displacement
  does not change the law of a single frame: it is the same in both classes, exactly.
- Successive cells stand a golden section apart, so that their positions fill the vessel evenly
  whether or not they travel. The mean over the frames is then nearly flat in both classes, and what
  remains is small beside the shadows of matter that adheres to the wall: as dark as a cell,
  present in every frame of both classes, and different in number from clip to clip.
- Every frame is compressed by itself, so that nothing of its neighbours is in it.

No random draw of a clip (noise, brightness drift, drift of the outline, jitter of the tissue,
speed) depends on the label, on other clips or on who renders it: its pixels are a function of
(seed, index, label). Which clips are stalled depends on the number of clips too, since that share
is exact.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import av
import cv2
import numpy as np

from dist_train.data.raw.outline import Box
from dist_train.data.synthetic.challenge_stats import (
    BOX_HEIGHT,
    BOX_WIDTH,
    CLIPS_BY_DEPTH,
    FRAME_SIZES,
    OUTLINE_COLOUR,
    OUTLINE_WIDTH,
    TIER1_SHARE,
)
from dist_train.errors import ConfigError, FileError, StoreError
from dist_train.files import is_plain, read_json, write_whole, written_whole
from dist_train.progress import Progress
from dist_train.system.supervised_pool import each_done

# Written into synth.json: a folder made by another version of the drawing is refused.
FORMAT: Final = 1
# Clips of the held-out set are numbered from here on, so that they too depend on their index alone.
HELD_OUT: Final = 500_000
HELD_OUT_SHARE: Final = 0.1

FRAME_RATE: Final = 20
# Intra frames of a constant quantiser. The look of a frame that is predicted from the one before
# depends on how much moved, which would give the label away to whoever sees that frame alone.
ENCODER: Final = {"preset": "ultrafast", "g": "1", "qp": "27"}

# One independent stream of random numbers for each purpose.
_SHAPE, _PICTURE, _METADATA, _LABEL = range(4)

_DEPTHS: Final = np.array(list(CLIPS_BY_DEPTH))
_DEPTH_SHARES: Final = np.array(list(CLIPS_BY_DEPTH.values())) / sum(CLIPS_BY_DEPTH.values())
_NARROW_SHARE: Final = 0.1
# The logarithms of a box's height and width are normal: a common size, plus and minus an aspect.
_SIZE_SIGMA: Final = 0.35
_ASPECT_SIGMA: Final = 0.27
# The outline drifts, and is never cut by the edge of the frame.
_EDGE: Final = 8

# The challenge's projects hold 0.1 % to 25 % of its clips; the shares between are invented.
_PROJECT_SHARES: Final = (25, 19, 15, 12, 9, 7, 5, 4, 2, 1.2, 0.7, 0.1)
_CROWD: Final = 10
_MICRO_SHARE: Final = 0.4

_NOISE: Final = 4.5
# The noise tile is larger than a frame by this, in both directions.
_TILE_MARGIN: Final = 256
_GOLDEN_SECTION: Final = (5**0.5 - 1) / 2
# Number of points along a vessel's length at which its shadows are computed.
_STATIONS: Final = 256


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """The outward form of one clip: sizes in pixels, ``depth`` in frames."""

    seed: int
    index: int
    depth: int
    frame_height: int
    frame_width: int
    box: Box


@dataclass(frozen=True, slots=True)
class Clip:
    """A rendered clip before compression.

    ``frames``: RGB uint8 [D, H, W, 3]. ``boxes``: the true box of the outline in every frame.
    """

    frames: np.ndarray
    boxes: list[Box]


def synthesize(
    out: Path,
    *,
    clips: int,
    seed: int,
    stall_rate: float = 0.25,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a synthetic set in the form of the Clog Loss challenge.

    ``out/videos/`` holds all clips, ``out/train_metadata.csv`` and ``out/train_labels.csv`` the
    ``clips`` that are labelled. ``out/submission_format.csv`` lists further, held-out clips, a
    tenth as many and at least one, with 0 in place of their labels, which are written nowhere.

    A run that was killed goes on where it stopped: clips are renamed into place when whole, and
    the CSVs come last.

    Args:
        out: the folder, new or of an earlier run with the same settings.
        clips: number of labelled clips.
        seed: non-negative; the same seed gives the same pixels, at any number of workers.
        stall_rate: share of stalled clips; exactly ``round(clips * stall_rate)`` are stalled.
        workers: number of processes; by default one for each CPU that this process may use.
        progress: called with (clips done, clips in all) after each clip.

    Raises:
        ConfigError: a setting is out of its range.
        StoreError: the folder cannot be written, or was made with other settings.
    """
    _check_settings(clips, seed, stall_rate, workers)
    settings = {"format": FORMAT, "clips": clips, "seed": seed, "stall_rate": stall_rate}
    held_out = max(1, round(HELD_OUT_SHARE * clips))
    training = range(clips)
    indices = [*training, *range(HELD_OUT, HELD_OUT + held_out)]
    stalled = stalled_indices(training, seed, stall_rate)
    stalled |= stalled_indices(indices[clips:], seed, stall_rate)
    try:
        tables = _tables(indices[:clips], indices[clips:], stalled, seed)
        _claim_folder(out, settings, tables)
        _write_videos(out / "videos", indices, stalled, seed, workers, progress)
        for name, content in tables.items():
            write_whole(out / name, content)
    except OSError as error:
        raise StoreError(
            f"cannot be written ({error.strerror or error})",
            where=error.filename or out,
            fix="Check permissions and free space (about 1 MB a clip), then run it again.",
        ) from error


def stalled_indices(indices: Iterable[int], seed: int, rate: float) -> set[int]:
    """Which clips are stalled: the ``round(N * rate)`` of them that draw the lowest lots."""
    lots = {index: _random(seed, index, _LABEL).random() for index in indices}
    return set(sorted(lots, key=lots.__getitem__)[: round(len(lots) * rate)])


def filename(index: int) -> str:
    return f"{100_000 + index}.mp4"


def draw_clip(seed: int, index: int) -> ClipSpec:
    """Draw depth, frame size and box as they are distributed in the challenge, blind to the label.

    Depth follows the histogram of its training clips. Box sides are log-normal, which matches the
    published mean and range, and are clipped to that range.
    """
    rng = _random(seed, index, _SHAPE)
    depth = int(rng.choice(_DEPTHS, p=_DEPTH_SHARES))
    frame_height, frame_width = FRAME_SIZES[int(rng.random() < _NARROW_SHARE)]
    size, aspect = rng.normal(0, (_SIZE_SIGMA, _ASPECT_SIGMA))
    height = min(_side(BOX_HEIGHT, size + aspect), frame_height - 2 * _EDGE)
    width = min(_side(BOX_WIDTH, size - aspect), frame_width - 2 * _EDGE)
    top = int(rng.integers(_EDGE, frame_height - _EDGE - height, endpoint=True))
    left = int(rng.integers(_EDGE, frame_width - _EDGE - width, endpoint=True))
    box = Box(top, left, top + height, left + width)
    return ClipSpec(seed, index, depth, frame_height, frame_width, box)


def render_clip(spec: ClipSpec, *, stalled: bool) -> Clip:
    """Draw the frames of a clip. Everything but the travel of the cells is blind to the label."""
    rng = _random(spec.seed, spec.index, _PICTURE)
    vessel = _draw_vessel(spec.box, rng)
    tissue = _draw_tissue(spec, rng)
    shadows = _draw_shadows(spec.depth, vessel.length, rng, stalled=stalled)
    brightness = rng.uniform(130, 180)
    gain = 1 + 0.06 * _drift(spec.depth, 1, memory=25, rng=rng)[:, 0]
    jitter = 0.2 * _drift(spec.depth, 2, memory=3, rng=rng)
    outline = vessel.outline + 0.4 * _drift(spec.depth, 2, memory=8, rng=rng)[:, None]
    noise = _noise_tile(spec, rng)
    noise_offsets = rng.integers(0, _TILE_MARGIN, (spec.depth, 2), endpoint=True)
    # Photon noise grows with the root of the signal; the rest comes from the detector.
    clear = tissue.copy()
    clear[vessel.rows, vessel.columns] += brightness * vessel.lumen
    noise_level = _NOISE * np.sqrt(0.6 + clear / 100)

    frames = np.empty((spec.depth, spec.frame_height, spec.frame_width, 3), np.uint8)
    for t, frame in enumerate(frames):
        image = tissue.copy()
        light = brightness * vessel.lumen * shadows[t, vessel.station]
        image[vessel.rows, vessel.columns] += light
        image = _shifted(image, jitter[t])
        top, left = noise_offsets[t]
        grain = noise[top : top + spec.frame_height, left : left + spec.frame_width]
        grey = cv2.addWeighted(image, gain[t], grain * noise_level, 1, 0, dtype=cv2.CV_8U)
        cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB, dst=frame)
        _draw_outline(frame, outline[t])
    return Clip(frames, [_box_around(points) for points in outline])


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode RGB uint8 [D, H, W, 3] as H.264 in mp4, written aside and renamed when whole."""
    with written_whole(path) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options=ENCODER)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


# --- one clip ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Vessel:
    """The target vessel and its outline.

    ``rows``, ``columns`` int64 [P]: the pixels of the lumen. ``lumen`` float32 [P]: how much of
    each is inside, 0 to 1. ``station`` int64 [P]: the point along the length that it belongs to.
    ``outline`` float32 [N, 2]: (x, y) of the closed outline. ``length`` in pixels.
    """

    rows: np.ndarray
    columns: np.ndarray
    lumen: np.ndarray
    station: np.ndarray
    outline: np.ndarray
    length: float


def _draw_vessel(box: Box, rng: np.random.Generator) -> _Vessel:
    """A bent tube from one corner of the box to the opposite one, with an outline at the box."""
    height, width = box.bottom - box.top, box.right - box.left
    radius = float(np.clip(0.14 * min(height, width), 2.4, 22))
    distance = radius + max(3.2, 0.5 * radius)
    inset = distance + OUTLINE_WIDTH / 2
    along = np.linspace(0, 1, _STATIONS)
    bend = np.exp(rng.uniform(-0.6, 0.6))
    rising = rng.random() < 0.5
    x = inset + along * (width - 1 - 2 * inset)
    y = inset + along**bend * (height - 1 - 2 * inset)
    centreline = np.stack([x, height - 1 - y if rising else y], axis=1)

    steps = np.linalg.norm(np.diff(centreline, axis=0), axis=1)
    arc = np.concatenate([[0], np.cumsum(steps)])
    canvas = _stroke((height, width), centreline, 2 * (radius + 1))
    rows, columns = np.nonzero(canvas)
    offsets = np.stack([columns, rows], axis=1)[:, None] - centreline
    squared = (offsets**2).sum(axis=-1)
    nearest = squared.argmin(axis=1)
    lumen = np.exp(-((squared.min(axis=1) / radius**2) ** 2))
    outline = _contour(_stroke((height, width), centreline, 2 * distance))
    return _Vessel(
        rows + box.top,
        columns + box.left,
        lumen.astype(np.float32),
        (arc[nearest] / arc[-1] * (_STATIONS - 1)).round().astype(np.int64),
        outline + np.array([box.left, box.top], np.float32),
        float(arc[-1]),
    )


def _stroke(shape: tuple[int, int], line: np.ndarray, width: float) -> np.ndarray:
    canvas = np.zeros(shape, np.uint8)
    points = np.round(line * 16).astype(np.int32)
    cv2.polylines(canvas, [points], False, 1, thickness=round(width), shift=4)
    return canvas


def _contour(mask: np.ndarray) -> np.ndarray:
    """The outer border of a mask, float32 [N, 2] as (x, y), smoothed over three points."""
    (border, *_), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = border[:, 0].astype(np.float32)
    return np.asarray((np.roll(points, 1, axis=0) + points + np.roll(points, -1, axis=0)) / 3)


def _draw_tissue(spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Brightness of everything but the target vessel, float32 [H, W]: mottling, other vessels."""
    size = (spec.frame_width, spec.frame_height)
    mottling = rng.normal(22, 4, (6, 8)).astype(np.float32)
    tissue = np.asarray(cv2.resize(mottling, size, interpolation=cv2.INTER_CUBIC))
    others = np.zeros_like(tissue)
    for _ in range(rng.poisson(5)):
        start, middle, end = rng.uniform((-40, -40), np.add(size, 40), (3, 2))
        t = np.linspace(0, 1, 40)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        points = curve.round().astype(np.int32)
        cv2.polylines(others, [points], False, rng.uniform(10, 45), int(rng.integers(4, 14)))
    return np.asarray(tissue + cv2.GaussianBlur(others, (0, 0), 2.5))


def _draw_shadows(
    depth: int, length: float, rng: np.random.Generator, *, stalled: bool
) -> np.ndarray:
    """Share of the vessel's light that its shadows let through, float32 [D, stations]."""
    width = max(rng.uniform(0.035, 0.055), 1.3 / length)
    darkness = np.clip(rng.lognormal(np.log(1.1), 0.15), 0.7, 1.6)
    in_view = rng.uniform(0.18, 0.27) / width
    frames_in_focus = float(np.clip(depth * rng.uniform(0.15, 0.2), 6, 12))

    # From before the first frame to after the last, one cell follows the other into focus.
    lead = 2 * frames_in_focus
    cells = np.arange(int((depth + 2 * lead) * in_view / frames_in_focus))
    focus_time = cells * frames_in_focus / in_view - lead + rng.uniform(0, 1)
    position = rng.random() + cells * _GOLDEN_SECTION
    cell_darkness = darkness * rng.uniform(0.9, 1.1, len(cells))
    speed = rng.uniform(0.4, 0.7) * 2.35 * width * rng.choice([-1, 1])
    travel = _travel(depth, speed, rng)
    # The only place where the label enters.
    if stalled:
        travel = np.zeros_like(travel)

    frame = np.arange(depth)[:, None]
    focus = _bell((frame - focus_time) / (frames_in_focus / 2.35))
    stations = np.linspace(0, 1, _STATIONS, dtype=np.float32)
    density = np.empty((depth, _STATIONS), np.float32)
    for t in range(depth):
        seen = focus[t] > 0.01
        around = _around(stations, position[seen, None] + travel[t])
        density[t] = (cell_darkness[seen] * focus[t, seen]) @ _bell(around / width)

    adherent = rng.poisson(rng.uniform(0.13, 0.36) / width)
    site = rng.random((adherent, 1))
    site_width = width * rng.uniform(0.6, 1.6, (adherent, 1))
    site_darkness = darkness * rng.lognormal(-0.3, 0.5, adherent)
    density += site_darkness @ _bell(_around(stations, site) / site_width)
    return np.exp(-density)


def _travel(depth: int, speed: float, rng: np.random.Generator) -> np.ndarray:
    """Displacement of pulsating flow, float64 [D], in vessel lengths."""
    period, phase, pulse = rng.uniform(8, 20), rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.4)
    velocity = speed * (1 + pulse * np.sin(2 * np.pi * np.arange(depth) / period + phase))
    return np.cumsum(velocity)


def _bell(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x**2, dtype=np.float32, casting="same_kind")


def _around(stations: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Signed distance on a circle of circumference 1."""
    return np.asarray((stations - position + 0.5) % 1 - 0.5)


def _drift(depth: int, columns: int, *, memory: float, rng: np.random.Generator) -> np.ndarray:
    """Stationary first-order autoregression of unit variance, float64 [D, columns]."""
    keep = np.exp(-1 / memory)
    steps = rng.standard_normal((depth, columns))
    steps[1:] *= np.sqrt(1 - keep**2)
    for t in range(1, depth):
        steps[t] += keep * steps[t - 1]
    return steps


def _noise_tile(spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Grain of unit variance, larger than a frame: each frame cuts its own window out of it."""
    shape = (spec.frame_height + _TILE_MARGIN, spec.frame_width + _TILE_MARGIN)
    grain = cv2.GaussianBlur(rng.standard_normal(shape, dtype=np.float32), (0, 0), 0.7)
    return np.asarray(grain / grain.std())


def _shifted(image: np.ndarray, offset: np.ndarray) -> np.ndarray:
    shift = np.array([[1, 0, offset[0]], [0, 1, offset[1]]], np.float32)
    size = (image.shape[1], image.shape[0])
    return np.asarray(cv2.warpAffine(image, shift, size, borderMode=cv2.BORDER_REPLICATE))


def _draw_outline(frame: np.ndarray, points: np.ndarray) -> None:
    fixed_point = np.round(points * 16).astype(np.int32)
    cv2.polylines(frame, [fixed_point], True, OUTLINE_COLOUR, OUTLINE_WIDTH, cv2.LINE_AA, shift=4)


def _box_around(points: np.ndarray) -> Box:
    left, top = np.floor(points.min(axis=0) - OUTLINE_WIDTH / 2 + 0.5).astype(int)
    right, bottom = np.ceil(points.max(axis=0) + OUTLINE_WIDTH / 2 + 0.5).astype(int)
    return Box(int(top), int(left), int(bottom), int(right))


def _side(facts: tuple[int, int, int], deviation: float) -> int:
    smallest, mean, largest = facts
    median = mean * np.exp(-(_SIZE_SIGMA**2 + _ASPECT_SIGMA**2) / 2)
    return int(np.clip(round(median * np.exp(deviation)), smallest, largest))


def _random(seed: int, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, purpose])


# --- the folder -------------------------------------------------------------------------------


def _check_settings(clips: int, seed: int, stall_rate: float, workers: int | None) -> None:
    if not 1 <= clips <= HELD_OUT:
        raise ConfigError(f"clips is {clips}, not 1 to {HELD_OUT}")
    if seed < 0:
        raise ConfigError(f"seed is {seed}, not 0 or more")
    if not 0 <= stall_rate <= 1:
        raise ConfigError(f"stall_rate is {stall_rate}, not 0 to 1")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}, not 1 or more")


def _claim_folder(out: Path, settings: dict[str, int | float], tables: Mapping[str, bytes]) -> None:
    """Create the folder and note its settings, or check that it was made with the same ones.

    What is there must be what would be written: nothing of the user's is overwritten.
    """
    note = out / "synth.json"
    if os.path.lexists(note):
        try:
            found = read_json(note)
        except FileError as error:
            found = error.what
        if found != settings:
            raise StoreError(
                f"was made with other settings ({found}, not {settings})",
                where=out,
                fix="Give another folder, or delete this one.",
            )
    elif os.path.lexists(out / "videos"):
        raise StoreError(
            "holds videos that were not made by synth",
            where=out,
            fix="Give a new folder.",
        )
    for name, content in tables.items():
        path = out / name
        if os.path.lexists(path) and not (is_plain(path) and path.read_bytes() == content):
            raise StoreError(
                "is there, and is not the table that synth would write",
                where=path,
                fix="Give a new folder, or move the table away.",
            )
    (out / "videos").mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps(settings, indent=2) + "\n")


def _write_videos(
    folder: Path,
    indices: list[int],
    stalled: set[int],
    seed: int,
    workers: int | None,
    progress: Progress | None,
) -> None:
    """Make the clips that are not there yet, in processes of their own if there are several."""
    jobs = [
        (folder / filename(index), seed, index, index in stalled)
        for index in indices
        if not (folder / filename(index)).exists()
    ]
    done = len(indices) - len(jobs)
    for _ in each_done(_make_video, jobs, workers):
        done += 1
        if progress is not None:
            progress(done, len(indices))


def _make_video(job: tuple[Path, int, int, bool]) -> None:
    path, seed, index, stalled = job
    if multiprocessing.parent_process() is not None:
        # A process a core is enough.
        cv2.setNumThreads(1)
    write_video(path, render_clip(draw_clip(seed, index), stalled=stalled).frames)


def _tables(
    training: list[int], held_out: list[int], stalled: set[int], seed: int
) -> dict[str, bytes]:
    """Content of each table by its name; ``train_labels.csv``, the last, says that all is there."""
    metadata = [_draw_metadata(draw_clip(seed, i), stalled=i in stalled) for i in training]
    labels = [{"filename": filename(i), "stalled": int(i in stalled)} for i in training]
    placeholders = [{"filename": filename(i), "stalled": 0} for i in held_out]
    return {
        "train_metadata.csv": _csv(metadata),
        "submission_format.csv": _csv(placeholders),
        "train_labels.csv": _csv(labels),
    }


def _draw_metadata(spec: ClipSpec, *, stalled: bool) -> dict[str, object]:
    """A row of ``train_metadata.csv``. Only the crowd's score depends on the label."""
    rng = _random(spec.seed, spec.index, _METADATA)
    shares = np.array(_PROJECT_SHARES) / sum(_PROJECT_SHARES)
    project = int(rng.choice(len(shares), p=shares))
    tier1 = bool(rng.random() < TIER1_SHARE)
    micro = bool(rng.random() < _MICRO_SHARE)
    nano = micro and bool(rng.random() < 0.5)
    # Each annotator calls 'stalled' with a chance of the clip's own; 0 votes for a stall happen.
    votes = rng.binomial(_CROWD, rng.beta(3, 2) if stalled else rng.beta(0.5, 6))
    return {
        "filename": filename(spec.index),
        "url": f"s3://synthetic-clog-loss/train/{filename(spec.index)}",
        "project_id": f"P{project + 1:02d}",
        "num_frames": spec.depth,
        "crowd_score": votes / _CROWD,
        "tier1": tier1,
        "micro": micro,
        "nano": nano,
    }


def _csv(rows: list[dict[str, object]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
