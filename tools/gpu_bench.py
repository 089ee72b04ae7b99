"""The benches of a card in a minute: rows of the step, a profile, the loader, a checkpoint.

Nothing is installed, no other loader runs, and no operations are counted.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import numpy as np
from bench_plan import challenge_clips
from bench_step import CUDA_ROWS, Workload, make_batch, metrics_of, settings_of
from gpu_check import model_of, row_of
from gpu_record import Record

#: Rows of bench_step.py, the most informative first.
ROWS = ("batch16", "batch32", "fast", "original")
#: Rows that are compiled first, which takes up to a minute.
COMPILED = ("graphs", "fused_norm")
#: Kernels of the profile.
TOP = 15


def steps(record: Record) -> dict[str, Callable[[Record], None]]:
    found: dict[str, Callable[[Record], None]] = {name: partial(row, name) for name in ROWS}
    found |= {"profile": profile, "loader": loader, "checkpoint": checkpoint}
    return found | {name: partial(row, name) for name in COMPILED}


def row(name: str, record: Record) -> None:
    """A row of bench_step.py at the depths of the challenge's clips."""
    if name in CUDA_ROWS and record.device == "cpu":
        record.skip("CUDA graphs need CUDA")
        return
    if name == "fused_norm" and record.device == "cpu" and shutil.which("g++") is None:
        record.skip("there is no C++ compiler here")
        return
    model, more = model_of(record)
    rounds, count = (1, 1) if record.tiny else (3, 2)
    load = workload(model, rounds, count)
    with row_of(record, name) as net:
        turns = [net.turn(steps) for steps in load.turns(net.config)]
        results = metrics_of(net.config, load, turns, net.device, None)
    record.line(**results | {"model": model, "settings": settings_of(name, more)})


@cache
def workload(model: str, rounds: int, steps: int) -> Workload:
    """The workload of all rows; it keeps the plans, each of which takes a second."""
    return Workload(challenge_clips(), model, 1.0, rounds, steps)


def profile(record: Record) -> None:
    """The slowest kernels of the fastest row, and launches and waits of a step."""
    from profile_step import host_calls, profile_steps, top_kernels

    rows = [line for line in record.lines() if line["stage"] == "bench"]
    timed = [line for line in rows if line.get("clips_per_second")]
    if not timed:
        record.skip("no row was timed")
        return
    fastest = max(timed, key=lambda line: float(line["clips_per_second"]))
    count, frames, cuda = 2, 6 if record.tiny else 60, record.device == "cuda"
    with row_of(record, fastest["name"]) as net:
        batch = make_batch(np.full(fastest["batch"], frames), net.config, cuda=cuda)
        events = profile_steps(net, batch, count).key_averages()
    kernels = top_kernels(events, cuda=cuda, steps=count)
    record.line(
        of=fastest["name"],
        busy_ms=sum(milliseconds for _, _, milliseconds, _ in kernels),
        **host_calls(events, steps=count),
        top=[
            {"name": name[:120], "calls": calls, "ms": round(ms, 3), "share": round(share, 4)}
            for name, calls, ms, share in kernels[:TOP]
        ],
    )


def loader(record: Record) -> None:
    """Clips a second of one node's workers: packed for the device, and resized on the host."""
    from bench_loader import OURS, PREFETCH, Bench, make_clips
    from loader_contenders import Task

    folder = record.scratch / "loader"
    clips, batch, workers, batches = (
        (24, 4, 1, 3) if record.tiny else (768, 16, min(12, len(os.sched_getaffinity(0))), 40)
    )
    make_clips(folder, clips)
    bench = Bench(folder, OURS)
    task = Task(batch, workers, PREFETCH, warm_up=PREFETCH * workers, batches=batches)
    for name in reversed(OURS):
        found = bench.child(name, name, asdict(task))
        if found is None:
            raise RuntimeError(f"{name}: {bench.cannot[name]}")
        record.line(f"loader, {name}", workers=workers, batch=batch, **found)


def checkpoint(record: Record) -> None:
    """What a checkpoint costs the steps beside it."""
    from bench_checkpoint import WARM_UP, Training, first_save, saved_beside

    folder = record.scratch / "checkpoint"
    folder.mkdir()
    training = Training(folder, model_of(record)[0], 4 if record.tiny else 64)
    for _ in range(WARM_UP):
        training.step()
    first = first_save(training, "asynchronous")
    saves = [asdict(saved_beside(training, "asynchronous")) for _ in range(3)]
    medians: dict[str, Any] = {
        f"{name}_s": statistics.median(save[name] for save in saves)
        for name in ("stall", "slowdown", "durable", "step")
    }
    record.line(first_stall_s=first.stall, **medians, state_bytes=training.state_bytes)
    training.close()
