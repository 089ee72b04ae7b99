"""How close `prepare` comes to the video decoder's speed, and how little memory it takes.

Compares on noisy videos: bare decoding, which is the limit; `prepare`; and the method of the
original run. Then `prepare` on one core against more, and the resident memory of its process tree.
benchmarks/prepare.md explains the results.

    python tools/bench_prepare.py [--clips N] [--seconds S] [--quick] [--json FILE]
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2
import lmdb
import numpy as np
import psutil
from measuring import (
    add_goals,
    finish,
    new_table,
    options,
    say,
    seconds,
    versions,
    write_manifest,
)
from rich.table import Table

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.raw.outline import Box, OutlineColour
from dist_train.data.store.build import prepare
from dist_train.data.synthetic.challenge_stats import BOX_HEIGHT, BOX_WIDTH
from dist_train.data.synthetic.drawing import draw_clip, render_clip
from dist_train.data.synthetic.render import FRAME_RATE
from dist_train.data.table.manifest import read_manifest

SEED = 3
DEPTH, HEIGHT, WIDTH = 60, 384, 512
# About 2.5 MB a clip, like the challenge's videos.
NOISE = 14.0
ENCODER = {"preset": "medium", "crf": "23"}
# The one large clip. Fast to encode: its memory does not depend on its compression.
LARGE_DEPTH, LARGE_SIDE, LARGE_ENCODER = 434, 1024, {"preset": "ultrafast", "crf": "23"}
# Enough shards to keep every core busy to the end.
SHARD_CLIPS = 4
FEWEST_ROUNDS = 3
# Length of the bare decoder's part of a round; the start of a worker takes a second.
ROUND_SECONDS = 20
# Numbers of tiny clips for the growth of memory.
FEW, MANY = 1_000, 20_000

Work = Callable[[Path, Path], None]


def main() -> None:
    parser = options(__doc__, "one short round, without the growth of memory")
    parser.add_argument("--clips", type=int, default=8, help="videos to make (default 8)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=40,
        help="least time of the rounds on one core (default 40)",
    )
    arguments = parser.parse_args()
    quick = arguments.quick
    limit, length = (0, ROUND_SECONDS / 5) if quick else (arguments.seconds, ROUND_SECONDS)
    with tempfile.TemporaryDirectory(prefix="bench_prepare.") as folder:
        result = measure(Path(folder), arguments.clips, limit, length, growth=not quick)
    finish(arguments.json, result, as_table(result))


def measure(
    folder: Path, clips: int, limit: float, length: float, *, growth: bool
) -> dict[str, Any]:
    say(f"making {clips} videos of {DEPTH} frames, {WIDTH}x{HEIGHT}, and a large one")
    videos = folder / "videos"
    make_videos(videos, clips)
    large = folder / "large"
    make_large_video(large)

    cores = sorted(os.sched_getaffinity(0))
    scratch = folder / "scratch"
    once = timed(run_decode, videos, scratch, [{cores[0]}])
    copies = max(1, round(length / once))
    many = folder / "many"
    make_copies(videos, many, copies)
    say(f"one core, on {copies * clips} clips, in rounds, for {limit:.0f} s")
    rounds = on_one_core(many, scratch, cores[0], limit)
    best = {name: min(times) for name, times in rounds.items()}

    say(f"one core against more, on {copies * clips} clips")
    scaling = {
        number: timed(run_prepare, many, scratch, [set(cores[:number])])
        for number in sorted({1, min(2, len(cores)), len(cores)})
    }

    both = [{core} for core in cores[:2]]
    decoders = timed(run_decode, many, scratch, both)

    say("memory, with 2 workers and the large clip")
    add_copies(large, videos)
    peak = peak_rss_mb(videos, scratch, "--shard-clips", "2")
    summary: dict[str, float | None] = {
        "vs_decode": best["decode"] / best["prepare"],
        "vs_original": best["original"] / best["prepare"],
        "two_cores": scaling[1] / scaling[2] if 2 in scaling else None,
        "two_cores_of_decode": len(both) * best["decode"] / decoders if len(both) == 2 else None,
        "peak_rss_mb": peak,
        "rss_growth": None,
    }
    if growth:
        say(f"memory, {FEW} against {MANY} tiny clips")
        summary["rss_growth"] = rss_growth(folder)
    return {
        "summary": summary,
        "seconds_a_round": rounds,
        "scaling": {"clips": copies * clips, "seconds_by_cores": scaling},
        "clips": {
            "number": copies * clips,
            "frames": copies * clips * DEPTH,
            "megabytes": megabytes(many),
        },
        "versions": versions("av", "opencv-python-headless", "numpy"),
    }


# --- the videos -------------------------------------------------------------------------------


def make_videos(folder: Path, clips: int) -> None:
    """Make ``clips`` videos of 2.5 MB with a long GOP, and their manifest."""
    folder.mkdir()
    for number in range(clips):
        rng = np.random.default_rng([SEED, number])
        frames = rendered(number, DEPTH, HEIGHT, WIDTH)
        noisy = (with_noise(frame, rng) for frame in frames)
        encode(folder / f"clip{number:04d}.mp4", noisy, ENCODER)
    label_in_turn(folder)


def make_large_video(folder: Path) -> None:
    """Make a clip of the challenge's greatest depth, with its largest outline, in a large frame."""
    folder.mkdir()
    middle, half_height, half_width = LARGE_SIDE // 2, BOX_HEIGHT[2] // 2, BOX_WIDTH[2] // 2
    box = Box(middle - half_height, middle - half_width, middle + half_height, middle + half_width)
    # A few frames, repeated: the whole clip would fill more than a gigabyte.
    few = rendered(0, 16, LARGE_SIDE, LARGE_SIDE, box)
    frames = itertools.islice(itertools.cycle(few), LARGE_DEPTH)
    encode(folder / "large.mp4", frames, LARGE_ENCODER)


def rendered(
    number: int, depth: int, height: int, width: int, box: Box | None = None
) -> np.ndarray:
    """A synthetic clip of a given size: RGB uint8 [D, H, W, 3]."""
    clip = draw_clip(SEED, number)
    clip = replace(clip, depth=depth, frame_height=height, frame_width=width, box=box or clip.box)
    return render_clip(clip, stalled=False).frames


def with_noise(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add grey noise, new in every frame, which makes the video large."""
    grain = rng.normal(0, NOISE, (*frame.shape[:2], 1))
    return np.clip(frame + grain, 0, 255).astype(np.uint8)


def encode(path: Path, frames: Iterable[np.ndarray], options: dict[str, str]) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=FRAME_RATE, options=options)
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[:2]
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


def make_copies(source: Path, target: Path, copies: int) -> None:
    """Make a folder that has each video ``copies`` times."""
    target.mkdir()
    for copy in range(copies):
        add_copies(source, target, prefix=f"copy{copy}_")


def add_copies(source: Path, target: Path, prefix: str = "") -> None:
    for path in sorted(source.glob("*.mp4")):
        shutil.copyfile(path, target / f"{prefix}{path.name}")
    label_in_turn(target)


def label_in_turn(folder: Path) -> None:
    write_manifest(folder, [number % 2 for number in range(len(list(folder.glob("*.[mn]p[4y]"))))])


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.mp4")) / 1e6


# --- the contenders: each takes all videos of a folder and writes into an empty one -------------


def run_decode(videos: Path, out: Path) -> None:
    """The limit: demultiplex and decode with one thread."""
    for path in sorted(videos.glob("*.mp4")):
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for _ in container.decode(video=0):
                pass


def run_prepare(videos: Path, out: Path) -> None:
    """``prepare`` with a worker for each core that it may run on."""
    settings = PrepareSettings(shard_clips=SHARD_CLIPS)
    prepare(read_manifest(videos / "clips.csv"), videos, out, settings)


def run_original(videos: Path, out: Path) -> None:
    """The original's method: whole BGR frames, points in Python lists, LMDB of pickles."""
    with (
        lmdb.open(str(out), map_size=1 << 40) as environment,
        environment.begin(write=True) as transaction,
    ):
        for path in sorted(videos.glob("*.mp4")):
            transaction.put(path.name.encode(), pickle.dumps(original_crop(path)))


def original_crop(path: Path) -> np.ndarray:
    """uint8 [D, h, w], cropped to the least x and y and the greatest width and height of all boxes;
    less than their union if the outline moves."""
    colour = OutlineColour()
    blue_green_red = np.array([colour.blue, colour.green, colour.red])
    # One thread, as all contenders: each has one core.
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames, boxes = [], []
    while True:
        decoded, frame = capture.read()
        if not decoded:
            break
        mask = cv2.inRange(frame, blue_green_red[:, 0], blue_green_red[:, 1])
        points = [(int(x), int(y)) for y, x in np.argwhere(mask)]
        if points:
            boxes.append(cv2.boundingRect(np.array(points)))
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY))
    left, top, width, height = (
        choose(side)
        for choose, side in zip((min, min, max, max), zip(*boxes, strict=True), strict=True)
    )
    return np.stack([frame[top : top + height, left : left + width] for frame in frames])


# --- speed --------------------------------------------------------------------------------------


def on_one_core(videos: Path, scratch: Path, core: int, limit: float) -> dict[str, list[float]]:
    """Seconds of every contender, in turns, until ``limit`` seconds have passed."""
    contenders: dict[str, Work] = {
        "decode": run_decode,
        "prepare": run_prepare,
        "original": run_original,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.monotonic()
    fewest = FEWEST_ROUNDS if limit else 1
    while len(times["decode"]) < fewest or time.monotonic() - began <= limit:
        for name, work in contenders.items():
            times[name].append(timed(work, videos, scratch, [{core}]))
    return times


def timed(work: Work, videos: Path, scratch: Path, cores: Sequence[set[int]]) -> float:
    """Seconds until one process on each set of cores has done ``work``, all at the same time."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, spawn, os.sched_setaffinity, (0, own)))
            for own in cores
        ]
        runs = [pool.submit(seconds, partial(work, videos, scratch)) for pool in pools]
        return max(run.result() for run in runs)


# --- memory ---------------------------------------------------------------------------------------


def rss_growth(folder: Path) -> float:
    """Peak memory with ``MANY`` clips over that with ``FEW``."""
    rng = np.random.default_rng(SEED)
    peaks = []
    for clips in (FEW, MANY):
        volumes = folder / f"volumes{clips}"
        volumes.mkdir()
        for number in range(clips):
            clip = rng.integers(0, 256, (4, 8, 8), dtype=np.uint8)
            np.save(volumes / f"clip{number:05d}.npy", clip)
        label_in_turn(volumes)
        peaks.append(peak_rss_mb(volumes, folder / "scratch", "--roi", "none"))
    few, many = peaks
    return many / few


def peak_rss_mb(source: Path, scratch: Path, *options: str) -> float:
    """Peak resident memory, in 10^6 bytes, of ``dist-train prepare --workers 2`` and its children.
    Pages that processes share are counted once for each."""
    shutil.rmtree(scratch, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "dist_train", "prepare", "--workers", "2"),
        *("--manifest", str(source / "clips.csv"), "--source", str(source)),
        *("--out", str(scratch), *options),
    ]
    with tempfile.TemporaryFile() as output:
        running = subprocess.Popen(command, stdout=output, stderr=output)
        peak = 0
        while running.poll() is None:
            peak = max(peak, tree_rss(running.pid))
            time.sleep(0.02)
        if running.returncode:
            output.seek(0)
            sys.exit(f"error: '{' '.join(command)}' failed: {output.read().decode()}")
    return peak / 1e6


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and its descendants."""
    processes: Sequence[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


# --- the table ------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> Table:
    summary, scaling, clips = result["summary"], result["scaling"], result["clips"]
    table = new_table(
        f"{clips['number']} clips, {clips['megabytes']:.1f} MB in all",
        *("", "value", "frames/s", "goal"),
    )
    for label, name in (
        ("bare decode, one core", "decode"),
        ("the original's method, one core", "original"),
        ("prepare, one core", "prepare"),
    ):
        rate = clips["frames"] / min(result["seconds_a_round"][name])
        table.add_row(label, "", f"{rate:.0f}")
    for cores, took in scaling["seconds_by_cores"].items():
        table.add_row(f"prepare, {cores} cores", "", f"{scaling['clips'] * DEPTH / took:.0f}")
    table.add_section()
    add_goals(
        table,
        summary,
        ("prepare / bare decode, one core", "vs_decode", "{:.3f}", ">= 0.85"),
        ("prepare / the original's method", "vs_original", "{:.2f}", "> 1"),
        ("prepare, 2 cores / one core", "two_cores", "{:.2f}", ">= 1.9"),
        ("bare decode, 2 cores / one core", "two_cores_of_decode", "{:.2f}", ""),
        ("peak memory, 2 workers", "peak_rss_mb", "{:.0f} MB", "<= 1000 MB"),
        (f"peak memory, {MANY} clips / {FEW}", "rss_growth", "{:.3f}", "<= 1.1"),
    )
    return table


if __name__ == "__main__":
    main()
