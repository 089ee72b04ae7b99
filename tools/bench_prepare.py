"""How close `prepare` comes to the video decoder's speed, and how little memory it takes.

Makes noisy videos and compares on them: bare decoding, which is the limit; `prepare`; and the way
of the run that this package was born of. Then `prepare` on one core against all cores, and the
resident memory of its process tree. benchmarks/prepare.md says how to read the figures.

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
from pathlib import Path
from typing import Any

import av
import cv2
import lmdb
import numpy as np
import psutil
from measuring import finish, options, say
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
# Together they give about 2.5 MB a clip, as the challenge's videos have.
NOISE = 14.0
ENCODER = {"preset": "medium", "crf": "23"}
# The one large clip; its memory does not depend on how well it is compressed.
LARGE_DEPTH, LARGE_SIDE, LARGE_ENCODER = 434, 1024, {"preset": "ultrafast", "crf": "23"}
# Enough shards to keep every core busy to the end.
SHARD_CLIPS = 4
FEWEST_ROUNDS = 3
# Of the bare decoder in a round: beside it the start of a worker process, a second, is little.
ROUND_SECONDS = 20
# Tiny clips that the growth of memory is measured with.
FEW, MANY = 1_000, 20_000

Work = Callable[[Path, Path], None]


def main() -> None:
    parser = options(__doc__, "leave the growth of memory out")
    parser.add_argument("--clips", type=int, default=8, help="videos to make (default 8)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=40,
        help="least time for the rounds on one core (default 40)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_prepare.") as folder:
        result = measure(
            Path(folder), arguments.clips, arguments.seconds, growth=not arguments.quick
        )
    finish(arguments.json, result, as_table(result))


def measure(folder: Path, clips: int, seconds: float, *, growth: bool) -> dict[str, Any]:
    say(f"making {clips} videos of {DEPTH} frames, {WIDTH}x{HEIGHT}, and a large one")
    videos = folder / "videos"
    make_videos(videos, clips)
    large = folder / "large"
    make_large_video(large)

    cores = sorted(os.sched_getaffinity(0))
    once = timed(run_decode, videos, folder / "scratch", {cores[0]})
    copies = max(1, round(ROUND_SECONDS / once))
    many = folder / "many"
    link_copies(videos, many, copies)
    say(f"one core, on {copies * clips} clips, in rounds, for {seconds:.0f} s")
    rounds = on_one_core(many, folder / "scratch", cores[0], seconds)
    best = {name: min(times) for name, times in rounds.items()}

    say(f"one core against more, on {copies * clips} clips")
    scaling = {
        number: timed(run_prepare, many, folder / "scratch", set(cores[:number]))
        for number in sorted({1, min(2, len(cores)), len(cores)})
    }

    both = cores[:2]
    decoders = timed_together(run_decode, many, folder / "scratch", both)

    say("memory, with 2 workers and the large clip")
    add_links(large, videos)
    peak = peak_rss_mb(videos, folder / "scratch", "--shard-clips", "2")
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
        "versions": {"av": av.__version__, "cv2": cv2.__version__, "numpy": np.__version__},
    }


# --- the videos -------------------------------------------------------------------------------


def make_videos(folder: Path, clips: int) -> None:
    """``clips`` videos of 2.5 MB, long GOP, with their manifest beside them."""
    folder.mkdir()
    for number in range(clips):
        rng = np.random.default_rng([SEED, number])
        frames = rendered(number, DEPTH, HEIGHT, WIDTH)
        noisy = (with_noise(frame, rng) for frame in frames)
        encode(folder / f"clip{number:04d}.mp4", noisy, ENCODER)
    write_manifest(folder)


def make_large_video(folder: Path) -> None:
    """One clip of the challenge's greatest depth, with its largest outline, in a large frame."""
    folder.mkdir()
    middle, half_height, half_width = LARGE_SIDE // 2, BOX_HEIGHT[2] // 2, BOX_WIDTH[2] // 2
    box = Box(middle - half_height, middle - half_width, middle + half_height, middle + half_width)
    # A few frames, over and over: the clip as a whole would fill more than a gigabyte.
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
    """Grey noise, fresh in every frame: that is what makes a video of this kind large."""
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


def link_copies(source: Path, target: Path, copies: int) -> None:
    """A folder that has each video ``copies`` times, as hard links."""
    target.mkdir()
    for copy in range(copies):
        add_links(source, target, prefix=f"copy{copy}_")


def add_links(source: Path, target: Path, prefix: str = "") -> None:
    for path in sorted(source.glob("*.mp4")):
        os.link(path, target / f"{prefix}{path.name}")
    write_manifest(target)


def write_manifest(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".mp4", ".npy"))
    lines = ["filename,label", *(f"{name},{i % 2}" for i, name in enumerate(names))]
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.mp4")) / 1e6


# --- the contenders: each takes all videos of a folder and writes into an empty one -------------


def run_decode(videos: Path, out: Path) -> None:
    """The limit: demultiplex and decode, with one thread, and look at nothing."""
    for path in sorted(videos.glob("*.mp4")):
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for _ in container.decode(video=0):
                pass


def run_prepare(videos: Path, out: Path) -> None:
    """``prepare`` with a worker for each core that it may run on."""
    settings = PrepareSettings(shard_clips=SHARD_CLIPS)
    prepare(read_manifest(videos / "manifest.csv"), videos, out, settings)


def run_original(videos: Path, out: Path) -> None:
    """The original's method: whole BGR frames, points in Python lists, LMDB of pickles."""
    with (
        lmdb.open(str(out), map_size=1 << 40) as environment,
        environment.begin(write=True) as transaction,
    ):
        for path in sorted(videos.glob("*.mp4")):
            transaction.put(path.name.encode(), pickle.dumps(original_crop(path)))


def original_crop(path: Path) -> np.ndarray:
    """uint8 [D, h, w], cut at the least x and y and the greatest width and height of all boxes,
    which is less than their union as soon as the outline moves."""
    colour = OutlineColour()
    blue_green_red = np.array([colour.blue, colour.green, colour.red])
    # One thread, as everybody here: it gains nothing from more on one core.
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


def on_one_core(videos: Path, scratch: Path, core: int, seconds: float) -> dict[str, list[float]]:
    """Times of every contender, who take turns so that what else the machine does hits them all."""
    contenders: dict[str, Work] = {
        "decode": run_decode,
        "prepare": run_prepare,
        "original": run_original,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.monotonic()
    for number in itertools.count():
        if number >= FEWEST_ROUNDS and time.monotonic() - began > seconds:
            return times
        for name, work in contenders.items():
            times[name].append(timed(work, videos, scratch, {core}))
    raise AssertionError("the rounds end by time")


def timed(work: Work, videos: Path, scratch: Path, cores: set[int]) -> float:
    """Seconds that ``work`` takes in a process of its own, which may run on ``cores`` only."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, os.sched_setaffinity, (0, cores)) as pool:
        return pool.submit(seconds_of, work, videos, scratch).result()


def timed_together(work: Work, videos: Path, scratch: Path, cores: Sequence[int]) -> float:
    """Seconds until each of the cores has done ``work``, all at once."""
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, spawn, os.sched_setaffinity, (0, {core})))
            for core in cores
        ]
        return max(
            run.result()
            for run in [pool.submit(seconds_of, work, videos, scratch) for pool in pools]
        )


def seconds_of(work: Work, videos: Path, out: Path) -> float:
    began = time.perf_counter()
    work(videos, out)
    return time.perf_counter() - began


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
        write_manifest(volumes)
        peaks.append(peak_rss_mb(volumes, folder / "scratch", "--roi", "none"))
    few, many = peaks
    return many / few


def peak_rss_mb(source: Path, scratch: Path, *options: str) -> float:
    """Peak resident memory, in 10^6 bytes, of ``dist-train prepare --workers 2`` and all below it.

    Pages that processes share count once for each of them.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "dist_train", "prepare", "--workers", "2"),
        *("--manifest", str(source / "manifest.csv"), "--source", str(source)),
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
    table = Table(title=f"{clips['number']} clips, {clips['megabytes']:.1f} MB in all")
    for heading in ("", "frames/s", "figure", "goal"):
        table.add_column(heading, justify="right" if heading else "left")
    rates = {
        name: f"{clips['frames'] / min(times):.0f}"
        for name, times in result["seconds_a_round"].items()
    }
    table.add_row("bare decode, one core", rates["decode"])
    table.add_row("the original's method, one core", rates["original"])
    table.add_row("prepare, one core", rates["prepare"])
    table.add_row("  over bare decode", "", f"{summary['vs_decode']:.3f}", ">= 0.85")
    table.add_row("  over the original's method", "", f"{summary['vs_original']:.2f}", "> 1")
    times = scaling["seconds_by_cores"]
    for cores in sorted(times.keys() - {1}):
        rate = f"{scaling['clips'] * DEPTH / times[cores]:.0f}"
        goal = ">= 1.9" if cores == 2 else ""
        table.add_row(f"prepare, {cores} cores", rate)
        table.add_row("  over one core", "", f"{times[1] / times[cores]:.2f}", goal)
    if summary["two_cores_of_decode"] is not None:
        figure = f"{summary['two_cores_of_decode']:.2f}"
        table.add_row("bare decode, 2 cores over one", "", figure)
    table.add_section()
    table.add_row("peak memory, 2 workers", "", f"{summary['peak_rss_mb']:.0f} MB", "<= 1000 MB")
    if summary["rss_growth"] is not None:
        growth = f"peak memory, {MANY} clips over {FEW}"
        table.add_row(growth, "", f"{summary['rss_growth']:.3f}", "<= 1.1")
    return table


if __name__ == "__main__":
    main()
