"""Write a synthetic set in the form of the Clog Loss challenge: the embedded default data."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import av
import cv2
import numpy as np
import pandas as pd

from dist_train.data.synthetic.challenge_stats import TIER1_SHARE
from dist_train.data.synthetic.drawing import (
    LABEL,
    METADATA,
    ClipSpec,
    draw_clip,
    random_stream,
    render_clip,
)
from dist_train.errors import ConfigError, StoreError
from dist_train.files import is_plain, read_json, write_whole, written_whole
from dist_train.progress import Progress
from dist_train.system.supervised_pool import each_done

# Written into synth.json. A folder of another version of the drawing is refused.
FORMAT: Final = 1
# First number of the held-out clips, so that their pixels do not depend on the number of others.
HELD_OUT: Final = 500_000
HELD_OUT_SHARE: Final = 0.1

FRAME_RATE: Final = 20
# Intra frames with a constant quantiser. A predicted frame looks different after more motion, so a
# single one would reveal the label.
ENCODER: Final = {"preset": "ultrafast", "g": "1", "qp": "27"}

# The challenge's projects hold 0.1 % to 25 % of its clips; the shares between are invented.
_PROJECT_SHARES: Final = (25, 19, 15, 12, 9, 7, 5, 4, 2, 1.2, 0.7, 0.1)
_CROWD: Final = 10
_MICRO_SHARE: Final = 0.4


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

    ``out/videos/`` holds all clips; ``out/train_metadata.csv`` and ``out/train_labels.csv`` list
    the ``clips`` labelled ones. ``out/submission_format.csv`` lists held-out clips, a tenth as many
    and at least one, with 0 in place of their labels.

    A run that was killed continues where it stopped: each clip is written whole or not at all, and
    the tables come last.

    Args:
        out: the folder, new or of an earlier run with the same settings.
        clips: number of labelled clips.
        seed: the same seed gives the same pixels, with any number of workers.
        stall_rate: share of stalled clips; exactly ``round(clips * stall_rate)`` are stalled.
        workers: number of processes; None: one for each CPU that this process may use.
        progress: called with (clips done, clips in all) after each clip.

    Raises:
        ConfigError: a setting is out of its range.
        StoreError: the folder cannot be written, or was made with other settings.
    """
    for name, value, least, most in (
        ("clips", clips, 1, HELD_OUT),
        ("seed", seed, 0, float("inf")),
        ("stall_rate", stall_rate, 0, 1),
        ("workers", 1 if workers is None else workers, 1, float("inf")),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{name} is {value}, not {least} to {most}")
    settings = {"format": FORMAT, "clips": clips, "seed": seed, "stall_rate": stall_rate}
    training = range(clips)
    held_out = range(HELD_OUT, HELD_OUT + max(1, round(HELD_OUT_SHARE * clips)))
    stalled = stalled_indices(training, seed, stall_rate)
    stalled |= stalled_indices(held_out, seed, stall_rate)
    try:
        tables = _tables(training, held_out, stalled, seed)
        _claim_folder(out, settings, tables)
        _write_videos(out / "videos", [*training, *held_out], stalled, seed, workers, progress)
        for name, content in tables.items():
            write_whole(out / name, content)
    except OSError as error:
        raise StoreError(
            f"cannot be written ({error.strerror or error})",
            where=error.filename or out,
            fix="Check permissions and free space (about 1 MB a clip), then run it again.",
        ) from error


def stalled_indices(indices: Iterable[int], seed: int, rate: float) -> set[int]:
    """Draw which clips are stalled: exactly ``round(N * rate)`` of them."""
    lots = {index: random_stream(seed, index, LABEL).random() for index in indices}
    return set(sorted(lots, key=lots.__getitem__)[: round(len(lots) * rate)])


def filename(index: int) -> str:
    return f"{100_000 + index}.mp4"


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode RGB uint8 [D, H, W, 3] as H.264 in mp4; the file appears when it is complete."""
    with written_whole(path) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options=ENCODER)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _claim_folder(out: Path, settings: dict[str, int | float], tables: Mapping[str, bytes]) -> None:
    """Create the folder and record its settings, or check that they are those of an earlier run.

    Raises:
        StoreError: the folder has other settings, or holds files that synth did not write.
    """
    note = out / "synth.json"
    if os.path.lexists(note):
        found = read_json(note)
        if found != settings:
            raise StoreError(
                f"was made with other settings ({found}, not {settings})",
                where=out,
                fix="Give another folder, or delete this one.",
            )
    elif os.path.lexists(out / "videos"):
        raise StoreError(
            "holds videos that were not made by synth", where=out, fix="Give a new folder."
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
    indices: Sequence[int],
    stalled: set[int],
    seed: int,
    workers: int | None,
    progress: Progress | None,
) -> None:
    """Make the clips that are missing."""
    jobs = [
        (folder / filename(index), seed, index, index in stalled)
        for index in indices
        if not (folder / filename(index)).exists()
    ]
    finished = len(indices) - len(jobs)
    for done, _ in enumerate(each_done(_make_video, jobs, workers), finished + 1):
        if progress is not None:
            progress(done, len(indices))


def _make_video(job: tuple[Path, int, int, bool]) -> None:
    path, seed, index, stalled = job
    if multiprocessing.parent_process() is not None:
        # One thread for each process.
        cv2.setNumThreads(1)
    write_video(path, render_clip(draw_clip(seed, index), stalled=stalled).frames)


def _tables(
    training: Sequence[int], held_out: Sequence[int], stalled: set[int], seed: int
) -> dict[str, bytes]:
    """Content of each table. The last, ``train_labels.csv``, marks a complete set."""
    metadata = [_draw_metadata(draw_clip(seed, i), stalled=i in stalled) for i in training]
    labels = [{"filename": filename(i), "stalled": int(i in stalled)} for i in training]
    placeholders = [{"filename": filename(i), "stalled": 0} for i in held_out]
    tables = {
        "train_metadata.csv": metadata,
        "submission_format.csv": placeholders,
        "train_labels.csv": labels,
    }
    return {name: pd.DataFrame(rows).to_csv(index=False).encode() for name, rows in tables.items()}


def _draw_metadata(spec: ClipSpec, *, stalled: bool) -> dict[str, Any]:
    """A row of ``train_metadata.csv``. Only the crowd's score depends on the label."""
    rng = random_stream(spec.seed, spec.index, METADATA)
    shares = np.array(_PROJECT_SHARES) / sum(_PROJECT_SHARES)
    project = int(rng.choice(len(shares), p=shares))
    tier1 = bool(rng.random() < TIER1_SHARE)
    micro = bool(rng.random() < _MICRO_SHARE)
    nano = micro and bool(rng.random() < 0.5)
    # Each annotator votes 'stalled' with a probability that belongs to the clip.
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
